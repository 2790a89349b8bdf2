"""From a model and its data to a walk through its layers, each with its format: what jobs, plans and Python share."""

import logging
import re
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.export import ExportedProgram

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.fused import check_fused, share_tensor_scales
from distributed_adaround.capture.sites import FloatParameter, Site, Unit, Walker, largest_first
from distributed_adaround.capture.walkers import make_walker
from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.errors import InputError, shorten
from distributed_adaround.formats import LayerFormat
from distributed_adaround.model.parametrizations import fold_parametrizations
from distributed_adaround.model.source import OpenedModel
from distributed_adaround.runtime.comm import Comm, agreed, phase
from distributed_adaround.runtime.context import RankContext
from distributed_adaround.runtime.memory import free_bytes
from distributed_adaround.spec.quantize import QuantizeSpec
from distributed_adaround.spec.runtime import RuntimeSpec, parse_bytes

logger = logging.getLogger(__name__)

_MOST_NAMED = 12
# It weighs the expert that all tokens pass.
_GATE = re.compile(r"(^|\.)shared_expert_gate$")


@dataclass(frozen=True)
class PlannedUnit:
    """A unit and the format of its weights; None: it stays in float, for this reason."""

    unit: Unit
    format: LayerFormat | None
    reason: str = "ignored by quantize.ignore"

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.unit.sites


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
        return sum(len(planned.sites) for planned in self.planned if planned.format is not None)

    @property
    def float_parameters(self) -> tuple[FloatParameter, ...]:
        """Every parameter left in float, with its reason."""
        ignored = (
            FloatParameter(site.stored_name, site.geometry.weight_shape, planned.reason)
            for planned in self.planned
            if planned.format is None
            for site in planned.sites
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
    folded = [] if isinstance(opened.model, ExportedProgram) else fold_parametrizations(opened.model)
    digest = _agree_on_weights(opened, comm)
    store = activation_store(runtime, context)
    walker = make_walker(opened.model, microbatches, store, comm, quantize.embeddings)
    if folded:
        walker.notes.append(f"computed weights were folded into plain ones: {shorten(', '.join(folded), 200)}")
    with phase(comm, "plan the layers"):
        modules = [] if isinstance(opened.model, ExportedProgram) else opened.model.named_modules()
        classes = {name: type(module).__name__ for name, module in modules}
        planned = tuple(plan_layers(walker, quantize, classes, head_names(opened.model)))
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


def head_names(model: nn.Module | ExportedProgram) -> set[str]:
    """Names of the layers that the words of a language model come out of, as models of transformers tell."""
    if isinstance(model, ExportedProgram):
        return set()
    heads = []
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        with suppress(AttributeError, NotImplementedError):  # of parts that have no words
            heads.append(get() if callable(get) else None)
    return {name for name, module in model.named_modules() if any(module is head for head in heads)}


def _plan(unit: Unit, quantize: QuantizeSpec, heads: Container[str]) -> PlannedUnit:
    site = unit.sites[0]
    found = quantize.for_layer(unit.name, site.module_class)
    if found is None:
        return PlannedUnit(unit, None)
    if (site.is_router or _GATE.search(unit.name)) and not quantize.routers:
        return PlannedUnit(unit, None, "a router: it picks experts; quantize.routers=true rounds it")
    if unit.name in heads and not quantize.heads:
        return PlannedUnit(unit, None, "the head of a language model; quantize.heads=true rounds it")
    return PlannedUnit(unit, found)


def plan_layers(
    walker: Walker, quantize: QuantizeSpec, modules: Mapping[str, str], heads: Container[str] = ()
) -> list[PlannedUnit]:
    """Format of every layer, checked before anything is solved. modules: all of the model, with the names of their
    classes: a pattern may name one that stays in float anyway, as a head that is tied to an embedding. heads: names of
    the layers that words come out of.

    Raises:
        SpecError: a group size does not divide, overrides contradict each other, or layers that are run as one differ.
        InputError: the model has no layer to quantize, or one whose weight is not finite.
    """
    planned = [_plan(unit, quantize, heads) for unit in walker.units]
    for layer in planned:
        if layer.format is not None:
            site = layer.sites[0]
            layer.format.check(site.name, site.geometry.inputs_per_output)
            if not bool(torch.isfinite(walker.tensor(site.weight_name)).all()):
                what = f"layer {layer.unit.name}: its weight {site.weight_name!r} is not finite"
                raise InputError(f"{what}; load other weights, or leave the layer in float by quantize.ignore")
    _tell_unmatched(quantize, planned, modules)
    if not any(layer.format for layer in planned):
        what = f"none of the model's {len(planned)} linear and convolution layers is to be quantized"
        if planned:
            raise InputError(f"{what}; see quantize.ignore")
        raise InputError(f"{what}: {_all_reasons(walker.float_parameters)}")
    formatted = [(layer.sites, layer.format) for layer in planned]
    if quantize.fused == "check":
        check_fused(formatted)
    shared = share_tensor_scales(formatted, walker)
    return [replace(layer, format=each) for layer, each in zip(planned, shared, strict=True)]


def _tell_unmatched(quantize: QuantizeSpec, planned: Sequence[PlannedUnit], modules: Mapping[str, str]) -> None:
    unmatched = quantize.unmatched([(layer.unit.name, layer.unit.sites[0].module_class) for layer in planned])
    nowhere = quantize.unmatched(list(modules.items()))
    for pattern in unmatched:
        if pattern in nowhere:
            logger.warning("quantize: the pattern %r matches no layer of this model", pattern)
        else:
            logger.info("quantize: the pattern %r matches a module that stays in float anyway", pattern)


def _all_reasons(parameters: Sequence[FloatParameter]) -> str:
    """In one line, the largest first."""
    shapes = ((each, "x".join(map(str, each.shape))) for each in largest_first(parameters))
    named = [f"{shorten(each.name, 80)} {shape}: {each.reason}" for each, shape in shapes]
    more = [f"{len(named) - _MOST_NAMED} more"] if len(named) > _MOST_NAMED else []
    return "; ".join([*named[:_MOST_NAMED], *more]) or "it has no parameters"
