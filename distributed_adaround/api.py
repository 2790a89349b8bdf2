"""Python entry: round a model in a script or notebook, alone or inside an initialised process group."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from distributed_adaround.capture.sites import ModelInputs
from distributed_adaround.data.manifest import owner, prove_coverage
from distributed_adaround.errors import InputError, SpecError
from distributed_adaround.report.console import Progress, SilentProgress
from distributed_adaround.report.events import EventLog
from distributed_adaround.report.table import LayerTable
from distributed_adaround.rounding import NetworkRounder, activation_store, agree_on_weights, make_walker, plan_layers
from distributed_adaround.runtime.comm import Comm, agreed, phase
from distributed_adaround.runtime.context import RankContext, process_group
from distributed_adaround.spec.job import MethodSpec
from distributed_adaround.spec.quantize import QuantizeSpec
from distributed_adaround.spec.rounding import RoundingSpec
from distributed_adaround.spec.runtime import RuntimeSpec

logger = logging.getLogger(__name__)

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

    model: any module; it runs in eval mode. batches: calibration batches as the model takes them: a tensor, a
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
    working = model if inplace else _copy(model)
    with process_group(context, method.runtime.timeout_minutes, join_only=True) as comm, _eval_mode(working):
        microbatches = _ListMicrobatches(batches, comm, sharded)
        agree_on_weights(working.state_dict(), comm)
        store = activation_store(method.runtime, context)
        with phase(comm, "capture the model"):
            walker = make_walker(
                working,
                microbatches.example,
                other=microbatches.other,
                varying=microbatches.varying,
                device=context.device,
                store=store,
            )
            planned = plan_layers(walker, method.quantize)
        for note in walker.notes if comm.rank == 0 else ():
            logger.warning("%s", note)
        silent = not progress or comm.rank != 0
        shown = SilentProgress() if silent else Progress(sum(layer.format is not None for layer in planned))
        with shown:
            rounder = NetworkRounder(method, comm, context.device, store, shown, EventLog.null())
            result = rounder.run(walker, planned, microbatches)
    return Quantized(working, result.table)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"the model cannot be copied ({line}); pass inplace=True to change it directly") from error


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, and afterwards as it was: parts of a model may be frozen."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _method(spec: MethodSpec | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> MethodSpec:
    """The spec from either form; keyword arguments find their section by name."""
    if isinstance(spec, MethodSpec):
        if fields:
            raise SpecError(f"{sorted(fields)}: give either a spec or keyword arguments, not both")
        return spec
    if spec is not None and not isinstance(spec, Mapping):
        raise SpecError(f"spec is a {type(spec).__name__}; give a MethodSpec or a mapping of its sections")
    sections: dict[str, Any] = dict(spec or {})
    owners = {"quantize": QuantizeSpec, "rounding": RoundingSpec, "runtime": RuntimeSpec}
    whole = {name: value for name, value in fields.items() if name in ("preset", *owners)}
    twice = sorted(whole.keys() & sections.keys())
    if twice:
        raise SpecError(f"{twice[0]}: given in spec and as a keyword argument; give it once")
    sections |= whole
    for name in fields.keys() - whole.keys():
        section = next((key for key, cls in owners.items() if name in cls.model_fields), None)
        if section is None:
            known = sorted(field for cls in owners.values() for field in cls.model_fields)
            raise SpecError(f"{name}: no such setting; known are preset, {', '.join(known)}")
        given = sections.get(section, {})
        if not isinstance(given, Mapping) or name in given:
            raise SpecError(f"{name}: given as a keyword argument and in section {section} too; give it once")
        sections[section] = {**given, name: fields[name]}
    return MethodSpec(**sections)


class _ListMicrobatches:
    """Batches in memory as microbatches with global indices."""

    def __init__(self, batches: Iterable[Batch], comm: Comm, sharded: bool) -> None:
        with phase(comm, "read the batches"):
            given = _read(batches)
        counts = comm.all_gather_object(len(given))
        if sharded:
            first = sum(counts[: comm.rank])
            self.total = sum(counts)
            self._inputs = {first + position: inputs for position, inputs in enumerate(given)}
        else:
            if len(set(counts)) > 1:
                raise agreed(
                    InputError(
                        f"ranks pass {counts} batches; with sharded=False every rank passes the same ones, "
                        "else set sharded=True"
                    )
                )
            self.total = len(given)
            self._inputs = {i: inputs for i, inputs in enumerate(given) if owner(i, comm.world_size) == comm.rank}
        if not self.total:
            raise agreed(InputError("batches is empty; give at least one calibration batch"))
        self.owned: Sequence[int] = tuple(self._inputs)
        prove_coverage(self.total, comm.all_gather_object(self.owned))
        # Every rank captures the same graph, so all look at the same one or two batches.
        offered = comm.all_gather_object(_of_two_kinds(given))
        self.example, *others = _of_two_kinds([inputs for rank in offered for inputs in rank])
        self.other = others[0] if others else None
        self.varying = bool(others)

    def load(self, index: int) -> ModelInputs:
        return self._inputs[index]

    def __iter__(self) -> Iterator[tuple[int, ModelInputs]]:
        yield from self._inputs.items()


def _read(batches: Iterable[Batch]) -> list[ModelInputs]:
    if isinstance(batches, Tensor | Mapping | str):
        raise InputError("batches must be a list or another iterable of batches; wrap a single batch in a list")
    given = [_model_inputs(batch) for batch in batches]
    for index, inputs in enumerate(given):
        sizes = [value.shape[:1] for value in (*inputs.args, *inputs.kwargs.values()) if isinstance(value, Tensor)]
        if not sizes or (0,) in sizes:
            what = "is empty" if sizes else "holds no tensor"
            raise InputError(f"batch {index} {what}; give tensors whose first dimension is the samples")
    return given


def _of_two_kinds(given: Sequence[ModelInputs]) -> list[ModelInputs]:
    """The first batch, and the first one of another kind if there is any."""
    by_kind: dict[object, ModelInputs] = {}
    for inputs in given:
        by_kind.setdefault(_kind(inputs), inputs)
    return list(by_kind.values())[:2]


def _kind(inputs: ModelInputs) -> tuple[object, ...]:
    """What must be the same in all batches for one graph to do: shapes without the batch, and other values."""
    values = (*enumerate(inputs.args), *sorted(inputs.kwargs.items()))
    return tuple((key, value.shape[1:] if isinstance(value, Tensor) else repr(value)) for key, value in values)


def _model_inputs(batch: Batch) -> ModelInputs:
    if isinstance(batch, Tensor):
        return ModelInputs((batch,), {})
    if isinstance(batch, Mapping):
        mask = batch.get(_MASK)
        return ModelInputs((), dict(batch), mask if isinstance(mask, Tensor) and mask.dim() == 2 else None)
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        return ModelInputs(tuple(batch), {})
    raise InputError(f"a batch is a {type(batch).__name__}; give a tensor, a tuple of arguments or a dict of keywords")
