"""Python entry: round a model in a script or notebook, alone or inside an initialised process group."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from distributed_adaround.capture.open import capture_model
from distributed_adaround.data.microbatches import CallerBatch, Microbatches
from distributed_adaround.errors import InputError, SpecError
from distributed_adaround.model.parametrizations import computed_tensors
from distributed_adaround.model.source import OpenedModel, check_module
from distributed_adaround.numerics.weight_view import dtype_name
from distributed_adaround.report.console import Progress
from distributed_adaround.report.coverage import tell_coverage
from distributed_adaround.report.job_log import JobLog
from distributed_adaround.report.table import LayerTable
from distributed_adaround.report.time_left import layer_costs
from distributed_adaround.rounding import NetworkRounder
from distributed_adaround.runtime.comm import phase
from distributed_adaround.runtime.context import RankContext, process_group
from distributed_adaround.spec.job import MethodSpec
from distributed_adaround.spec.quantize import QuantizeSpec
from distributed_adaround.spec.rounding import RoundingSpec
from distributed_adaround.spec.runtime import RuntimeSpec


class Quantized(NamedTuple):
    """Result of `quantize`: the model with weights on the grid, and the table of its layers, whose `float_parameters`
    are what stayed in float, each with its reason, and whose `coverage` is the share that did not."""

    model: nn.Module
    table: LayerTable


def quantize(
    model: nn.Module,
    batches: Iterable[CallerBatch],
    spec: MethodSpec | Mapping[str, Any] | None = None,
    *,
    inplace: bool = False,
    sharded: bool = False,
    progress: bool = True,
    **fields: Any,
) -> Quantized:
    """Learn the rounding of a model's weights, alone or inside an initialised process group.

    Args:
        model: any module; it runs in eval mode.
        batches: as the model takes them: a tensor, a tuple of positional arguments, or a dict of keyword arguments (its
            "attention_mask" says which tokens count). They are all read at once and held on the host.
        spec: a MethodSpec, or a mapping with its sections quantize, rounding, runtime and preset.
        inplace: change the caller's model instead of a copy.
        sharded: in a process group, every rank passes its own batches; else every rank passes the same ones and works
            on its part.
        progress: show where it is, on rank 0.
        fields: instead of spec, fields of these sections: dtype="int3", max_iter=2000. `bits=4` is short for
            dtype="int4", and dtype may be one of torch's, as torch.int8.

    Raises:
        SpecError: a setting is unknown or wrong.
        InputError: the model or the batches do not fit.
    """
    method = _method(spec, fields)
    context = RankContext.from_environment(method.runtime.device, method.runtime.backend)
    with process_group(context, method.runtime.timeout_minutes, join_only=True) as comm, ExitStack() as stack:
        with phase(comm, "use the model"):
            _check_model(model)
            working = model if inplace else _copy(model)
            stack.enter_context(_eval_mode(working))
        opened = OpenedModel(working)
        microbatches = Microbatches.of_list(batches, comm, sharded, opened.dtype)
        captured = capture_model(opened, microbatches, method.quantize, method.runtime, context, comm)
        tell_coverage(captured, comm)
        shown = Progress(captured.num_layers, costs=layer_costs(captured)) if progress and comm.rank == 0 else None
        with JobLog(shown) as log:
            result = NetworkRounder(method, comm, log).run(captured, microbatches)
    return Quantized(working, result.table)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        what = "name a model in a job file, or pass" if isinstance(model, str) else "pass"
        raise InputError(f"model is a {type(model).__name__}; {what} the torch.nn.Module itself")
    check_module(model, "model")


def _copy(model: nn.Module) -> nn.Module:
    try:
        # What is computed anew in every forward is copied by value: with its history it cannot be.
        return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed_tensors(model)})
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


def _named_by_users(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields, with `bits` and dtypes of torch under the names of the spec."""
    given = dict(fields)
    if "bits" in given:
        if "dtype" in given:
            raise SpecError("bits: given beside dtype, which says the bits too; give one of them")
        bits = given.pop("bits")
        if isinstance(bits, bool) or not isinstance(bits, int) or not 2 <= bits <= 8:
            raise SpecError(f"bits: {bits!r} is not a whole number from 2 to 8; dtype also takes floats, as in 'fp8'")
        given["dtype"] = f"int{bits}"
    if isinstance(given.get("dtype"), torch.dtype):
        given["dtype"] = dtype_name(given["dtype"])
    return given


def _method(spec: MethodSpec | Mapping[str, Any] | None, fields: Mapping[str, Any]) -> MethodSpec:
    """The spec from either form; keyword arguments find their section by name."""
    if isinstance(spec, MethodSpec):
        if fields:
            raise SpecError(f"{sorted(fields)}: give either a spec or keyword arguments, not both")
        return spec
    if spec is not None and not isinstance(spec, Mapping):
        raise SpecError(f"spec is a {type(spec).__name__}; give a MethodSpec or a mapping of its sections")
    sections: dict[str, Any] = dict(spec or {})
    fields = _named_by_users(fields)
    owners = {"quantize": QuantizeSpec, "rounding": RoundingSpec, "runtime": RuntimeSpec}
    section_of = {field: section for section, cls in owners.items() for field in cls.model_fields}
    whole = {name: value for name, value in fields.items() if name in ("preset", *owners)}
    twice = sorted(whole.keys() & sections.keys())
    if twice:
        raise SpecError(f"{twice[0]}: given in spec and as a keyword argument; give it once")
    sections |= whole
    for name in fields.keys() - whole.keys():
        if name not in section_of:
            raise SpecError(f"{name}: no such setting; known are preset, {', '.join(sorted(section_of))}")
        section = section_of[name]
        given = sections.get(section, {})
        if not isinstance(given, Mapping) or name in given:
            raise SpecError(f"{name}: given as a keyword argument and in section {section} too; give it once")
        sections[section] = {**given, name: fields[name]}
    return MethodSpec(**sections)
