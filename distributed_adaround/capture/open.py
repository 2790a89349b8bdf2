"""From a model and its data to a walk through its layers, each with its format: what jobs, plans and Python share."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.graph import capture, export_model, straight_line, without_cache
from distributed_adaround.capture.graph_walk import GraphWalker
from distributed_adaround.capture.replay_walk import ReplayWalker
from distributed_adaround.capture.sites import FloatParameter, Site, Unit, Walker
from distributed_adaround.data.microbatches import Microbatches, ModelInputs
from distributed_adaround.errors import InputError, first_line
from distributed_adaround.formats import LayerFormat
from distributed_adaround.model.source import OpenedModel
from distributed_adaround.runtime.comm import Comm, agreed, phase
from distributed_adaround.runtime.context import RankContext
from distributed_adaround.runtime.memory import free_bytes
from distributed_adaround.spec.quantize import QuantizeSpec
from distributed_adaround.spec.runtime import RuntimeSpec, parse_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedUnit:
    """A unit and the format of its weights; None: it stays in float because the job says so."""

    unit: Unit
    format: LayerFormat | None

    @property
    def site(self) -> Site:
        return self.unit.site


@dataclass(frozen=True)
class CapturedModel:
    """A model ready to be walked through, on one rank. digest: of its weights, the same on all ranks."""

    walker: Walker
    planned: tuple[PlannedUnit, ...]
    store: ActivationStore
    digest: str

    @property
    def num_layers(self) -> int:
        """Those that are quantized."""
        return sum(planned.format is not None for planned in self.planned)

    @property
    def float_parameters(self) -> tuple[FloatParameter, ...]:
        """Every parameter left in float, with its reason."""
        ignored = (
            FloatParameter(planned.site.weight_name, planned.site.geometry.weight_shape, "ignored by quantize.ignore")
            for planned in self.planned
            if planned.format is None
        )
        return (*self.walker.float_parameters, *ignored)


def capture_model(
    opened: OpenedModel,
    microbatches: Microbatches,
    quantize: QuantizeSpec,
    runtime: RuntimeSpec,
    context: RankContext,
    comm: Comm,
) -> CapturedModel:
    """Compare the weights of all ranks, capture the model and plan its layers. A collective.

    Raises:
        SpecError: the formats do not fit the layers.
        InputError: ranks hold other weights, or the model cannot be used.
    """
    digest = _agree_on_weights(opened, comm)
    store = activation_store(runtime, context)
    with phase(comm, "capture the model"):
        walker = make_walker(opened.model, microbatches.examples, varying=microbatches.varying, store=store)
        planned = tuple(plan_layers(walker, quantize))
    for note in walker.notes if comm.rank == 0 else ():
        logger.warning("%s", note)
    return CapturedModel(walker, planned, store, digest)


def activation_store(runtime: RuntimeSpec, context: RankContext) -> ActivationStore:
    """Budgets of this rank: as the spec says, else half of what is free now, shared by the ranks of this machine."""
    host = free_bytes() // (2 * context.local_world_size)
    device = torch.cuda.mem_get_info(context.device)[0] // 2 if context.device.type == "cuda" else 0
    return ActivationStore(
        context.device,
        host_budget=host if runtime.activation_memory is None else parse_bytes(runtime.activation_memory),
        device_budget=device if runtime.device_memory is None else parse_bytes(runtime.device_memory),
        spill_dir=runtime.spill_dir,
    )


def _agree_on_weights(opened: OpenedModel, comm: Comm) -> str:
    """Digest of the weights, which all ranks must share: other ones, from a factory that draws at random, say, would
    spoil the result in silence. Raises InputError."""
    with phase(comm, "hash the model"):
        digest = opened.digest
    digests = comm.all_gather_object(digest)
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    if odd:
        remedy = "load the same weights on all ranks, with model.weights in a job file, or seed the factory"
        raise agreed(InputError(f"the model on ranks {odd} has other weights than on rank 0; {remedy}"))
    return digest


def make_walker(
    model: nn.Module | ExportedProgram, examples: Sequence[ModelInputs], *, varying: bool, store: ActivationStore
) -> Walker:
    """Walk through the exported graph; by hooks and replay where the model cannot be exported, with a note.

    Args:
        model: module or program.
        examples: microbatches, of different shapes where the data has them; the graph must do for all.
        varying: shapes differ between microbatches in more than the number of samples.
        store: its device is that of the walk.

    Raises InputError for a program that cannot be walked, or a model whose forward fails.
    """
    if isinstance(model, ExportedProgram):
        return GraphWalker(capture(straight_line(model)), store)
    try:
        # Only what torch and the model do is tried here: an error of our own in reading the graph is not to be hidden.
        graph = straight_line(export_model(model, _beside(model, examples[0]), varying))
        for inputs in examples:
            _check_same_output(model, graph, _beside(model, inputs))
    except Exception as error:
        # torch.export documents no closed set of errors; whatever stops it, hooks still work.
        reason = first_line(error)
        logger.debug("torch.export failed", exc_info=True)
        return ReplayWalker(model, examples[0], reason[:200], store)
    return GraphWalker(capture(graph), store)


def _beside(model: nn.Module, inputs: ModelInputs) -> ModelInputs:
    """The inputs on the model's device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    args, kwargs = pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device), (inputs.args, inputs.kwargs))
    return replace(inputs, args=args, kwargs=kwargs)


def _check_same_output(model: nn.Module, graph: nn.Module, example: ModelInputs) -> None:
    with torch.no_grad(), without_cache(model):
        ours, theirs = (_real_tensors(module(*example.args, **example.kwargs)) for module in (graph, model))
    # The tolerance covers another order of sums. Rows that are all padding may be NaN.
    if len(ours) != len(theirs) or not all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True)
        for a, b in zip(ours, theirs, strict=True)
    ):
        raise InputError("its exported graph does not compute what the model computes")


def _real_tensors(output: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def plan_layers(walker: Walker, quantize: QuantizeSpec) -> list[PlannedUnit]:
    """Format of every layer, checked before anything is solved.

    Raises:
        SpecError: a group size does not divide, or overrides contradict each other.
        InputError: the model has no layer to quantize, or one whose weight is not finite.
    """
    planned = [PlannedUnit(unit, quantize.for_layer(unit.site.name, unit.site.module_class)) for unit in walker.units]
    for layer in planned:
        if layer.format is not None:
            layer.format.check(layer.site.name, layer.site.geometry.inputs_per_output)
            if not bool(torch.isfinite(walker.tensor(layer.site.weight_name)).all()):
                what = f"layer {layer.site.name}: its weight {layer.site.weight_name!r} is not finite"
                raise InputError(f"{what}; load other weights, or leave the layer in float by quantize.ignore")
    for pattern in quantize.unmatched([(layer.site.name, layer.site.module_class) for layer in planned]):
        logger.warning("quantize: the pattern %r matches no layer of this model", pattern)
    if not any(layer.format for layer in planned):
        what = f"none of the model's {len(planned)} linear and convolution layers is to be quantized"
        raise InputError(f"{what}; see quantize.ignore")
    return planned
