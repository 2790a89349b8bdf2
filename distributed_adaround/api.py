"""Python entry: round a model in a script or notebook, alone or inside an initialised process group."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from distributed_adaround.data.manifest import owner, prove_coverage
from distributed_adaround.distributed.comm import Comm
from distributed_adaround.distributed.runtime import RankContext, process_group
from distributed_adaround.errors import InputError, SpecError
from distributed_adaround.model.sites import ModelInputs
from distributed_adaround.network import NetworkRounder, activation_store, make_walker, plan_layers
from distributed_adaround.report.console import Progress, SilentProgress
from distributed_adaround.report.events import EventLog
from distributed_adaround.report.layers import LayerTable
from distributed_adaround.spec import MethodSpec, QuantizeSpec, RoundingSpec, RuntimeSpec

Batch = Tensor | Sequence[Any] | Mapping[str, Any]
_MASK = "attention_mask"


class Quantized(NamedTuple):
    """Result of `quantize`: the model with weights on the grid, and the table of its layers."""

    model: nn.Module
    table: LayerTable


def quantize(
    model: nn.Module,
    batches: Iterable[Batch],
    spec: MethodSpec | Mapping[str, Any] | None = None,
    *,
    inplace: bool = False,
    sharded: bool = False,
    progress: bool = True,
    **fields: Any,
) -> Quantized:
    """Learn the rounding of a model's weights.

    model: any module; it is switched to eval mode. batches: calibration batches as the model takes them: a tensor, a
    tuple of positional arguments, or a dict of keyword arguments (its "attention_mask" says which tokens count). They
    are all read at once and held on the host. spec: a MethodSpec, or a mapping with its sections quantize, rounding,
    runtime and preset. Instead of it, fields of these sections as keyword arguments: dtype="int3", max_iter=2000.
    inplace: change the caller's model instead of a copy. In a process group: with sharded=False every rank passes the
    same batches and works on its part; with sharded=True every rank passes its own.

    Raises:
        SpecError: a setting is unknown or wrong.
        InputError: the model or the batches do not fit.
    """
    method = _method(spec, fields)
    context = RankContext.from_environment(method.runtime.device, method.runtime.backend)
    working = model if inplace else copy.deepcopy(model)
    was_training = model.training
    working.eval()
    with process_group(context, method.runtime.timeout_minutes, join_only=True) as comm:
        microbatches = _ListMicrobatches(batches, comm, sharded)
        store = activation_store(method.runtime, context)
        example = microbatches.example
        walker = make_walker(working, example, varying=microbatches.varying, device=context.device, store=store)
        planned = plan_layers(walker, method.quantize)
        silent = not progress or comm.rank != 0
        shown = SilentProgress() if silent else Progress(sum(layer.format is not None for layer in planned))
        with shown:
            rounder = NetworkRounder(method, comm, context.device, store, shown, EventLog.null())
            result = rounder.run(walker, planned, microbatches, load=lambda name: None, commit=lambda record: None)
    working.train(was_training)
    return Quantized(working, result.table)


def _method(spec: MethodSpec | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> MethodSpec:
    """The spec from either form; keyword arguments find their section by name."""
    if isinstance(spec, MethodSpec):
        if fields:
            raise SpecError(f"{sorted(fields)}: give either a spec or keyword arguments, not both")
        return spec
    sections: dict[str, Any] = {name: dict(value) if isinstance(value, Mapping) else value
                                for name, value in (spec or {}).items()}  # fmt: skip
    owners = {"quantize": QuantizeSpec, "rounding": RoundingSpec, "runtime": RuntimeSpec}
    for name, value in fields.items():
        if name in ("preset", *owners):
            sections[name] = value
            continue
        section = next((key for key, cls in owners.items() if name in cls.model_fields), None)
        if section is None:
            known = sorted(field for cls in owners.values() for field in cls.model_fields)
            raise SpecError(f"{name}: no such setting; known are preset, {', '.join(known)}")
        sections.setdefault(section, {})[name] = value
    return MethodSpec(**sections)


class _ListMicrobatches:
    """Batches in memory as microbatches with global indices."""

    def __init__(self, batches: Iterable[Batch], comm: Comm, sharded: bool) -> None:
        if isinstance(batches, Tensor | Mapping):
            raise InputError("batches must be a list or another iterable of batches; wrap a single batch in a list")
        given = [_model_inputs(batch) for batch in batches]
        if sharded:
            counts = comm.all_gather_object(len(given))
            first = sum(counts[: comm.rank])
            self.total = sum(counts)
            self._inputs = {first + position: inputs for position, inputs in enumerate(given)}
        else:
            self.total = len(given)
            self._inputs = {i: inputs for i, inputs in enumerate(given) if owner(i, comm.world_size) == comm.rank}
        self.owned: Sequence[int] = tuple(self._inputs)
        prove_coverage(self.total, comm.all_gather_object(self.owned))
        if not self.total:
            raise InputError("batches is empty; give at least one calibration batch")
        # Every rank captures the same graph, so all take the first batch of the first rank that has one.
        examples = comm.all_gather_object(given[0] if given else None)
        self.example: ModelInputs = next(example for example in examples if example is not None)
        shapes = comm.all_gather_object({_inner_shapes(inputs) for inputs in given})
        self.varying = len(set().union(*shapes)) > 1

    def load(self, index: int) -> ModelInputs:
        return self._inputs[index]

    def __iter__(self) -> Iterator[tuple[int, ModelInputs]]:
        yield from self._inputs.items()


def _inner_shapes(inputs: ModelInputs) -> tuple[tuple[int, ...], ...]:
    """Shapes without the batch dimension."""
    tensors = (value for value in (*inputs.args, *inputs.kwargs.values()) if isinstance(value, Tensor))
    return tuple(tuple(tensor.shape[1:]) for tensor in tensors)


def _model_inputs(batch: Batch) -> ModelInputs:
    if isinstance(batch, Tensor):
        return ModelInputs((batch,), {})
    if isinstance(batch, Mapping):
        mask = batch.get(_MASK)
        return ModelInputs((), dict(batch), mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return ModelInputs(tuple(batch), {})
    raise InputError(f"a batch is a {type(batch).__name__}; give a tensor, a tuple of arguments or a dict of keywords")
