"""One layer of the job: its grid, its problem and the solver as the spec says, and the record of the result."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.sites import Site, SiteActivations, Walker
from distributed_adaround.checkpoint.layer_files import LayerRecord
from distributed_adaround.errors import InputError
from distributed_adaround.numerics.floats import encode
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.ranges import choose_grid
from distributed_adaround.numerics.soft_rounding import OutputTransform, RoundingSchedule
from distributed_adaround.report.table import LayerReport
from distributed_adaround.runtime.comm import Comm, agreed
from distributed_adaround.solve.adaround import solve_minibatch
from distributed_adaround.solve.gptq import solve_gptq
from distributed_adaround.solve.gram import GramSettings, solve_gram
from distributed_adaround.solve.layer import LayerResult
from distributed_adaround.solve.learner import MinibatchSettings
from distributed_adaround.solve.measure import layer_moments
from distributed_adaround.solve.nearest import solve_nearest
from distributed_adaround.solve.polish import polish
from distributed_adaround.solve.problem import LayerProblem, MomentCache, Monitor, OutputErrors, Solution, Solver
from distributed_adaround.spec.job import MethodSpec
from distributed_adaround.spec.number_format import LayerFormat
from distributed_adaround.spec.rounding import RoundingSpec, SolverName


def make_solver(rounding: RoundingSpec) -> Solver:
    """The solver of the job with its settings, and polish after it where the spec asks for it."""

    def solve(problem: LayerProblem, nearest: OutputErrors, comm: Comm, monitor: Monitor) -> Solution:
        name = solver_of(rounding, problem)
        solution = _solver(name, rounding)(problem, nearest, comm, monitor)
        if rounding.polishes and problem.transform.is_affine:
            solution = polish(problem, solution, comm, monitor)
        return replace(solution, solver=name)

    return solve


def solver_of(rounding: RoundingSpec, problem: LayerProblem) -> SolverName:
    """The solver of a layer. Moments know nothing of an activation: with one inside the loss gram leaves the layer to
    steps on samples."""
    needs_samples = rounding.solver == "gram" and not problem.transform.is_affine
    return "minibatch" if needs_samples else rounding.solver


def _solver(name: SolverName, rounding: RoundingSpec) -> Solver:
    if name == "nearest":
        return solve_nearest
    if name == "gptq":
        return partial(solve_gptq, damping=rounding.damping)
    if name == "gram":
        return partial(solve_gram, settings=GramSettings(rounding.sweeps, rounding.damping, rounding.starts))
    schedule = RoundingSchedule(rounding.max_iter, rounding.warm_start, *rounding.beta, rounding.regularization)
    settings = MinibatchSettings(
        schedule,
        rounding.batch_size,
        rounding.batch_unit,
        rounding.lr,
        rounding.normalization,
        rounding.reproducible,
    )
    return partial(solve_minibatch, settings=settings)


def weighted_grid(problem: LayerProblem, layer_format: LayerFormat, comm: Comm) -> LayerProblem:
    """With the observer output_mse: the problem with scales that minimize the output error, not the weight error.

    The error of each weight counts as much as its input is large, A_jj.
    """
    if layer_format.observer != "output_mse":
        return problem
    power = layer_moments(problem, comm).second.diagonal(dim1=1, dim2=2)
    rows = problem.geometry.out_channels // problem.geometry.groups
    weight = problem.weight
    importance = power[:, None, :].expand(-1, rows, -1).reshape(weight.shape).float().cpu()
    grid = choose_layer_grid(weight.float().cpu(), layer_format, importance)
    _check_scales(grid, problem.name)
    return replace(problem, grid=grid.to(problem.dtype, problem.device))


def choose_layer_grid(weight: Tensor, layer_format: LayerFormat, importance: Tensor | None = None) -> Grid:
    """Grid of a weight matrix `(O, I)`, float32, on the host: the same on every rank and device."""
    return choose_grid(
        weight,
        qmin=layer_format.quant_min,
        qmax=layer_format.quant_max,
        symmetric=layer_format.symmetric,
        zero_point=layer_format.zero_point if layer_format.symmetric else 0,
        strategy=layer_format.strategy,
        group_size=layer_format.group_size,
        # Without importance output_mse is mse: what the grid of nearest rounding is before the moments are known.
        observer="mse" if layer_format.observer == "output_mse" else layer_format.observer,
        percentile=layer_format.percentile,
        element_format=layer_format.element_format,
        scale_format=layer_format.scale_format,
        importance=importance,
    )


def _check_scales(grid: Grid, name: str) -> None:
    """Raises: InputError when a scale is not a positive finite number, on every rank alike."""
    good = torch.isfinite(grid.scale) & (grid.scale > 0)
    if not bool(good.all()):
        channel = int((~good).nonzero()[0, 0])
        value = float(grid.scale[~good][0])
        raise agreed(
            InputError(
                f"layer {name}: the scale of output channel {channel} is {value}, which must be positive and finite; "
                "the weights are too large for float32: leave the layer in float by quantize.ignore"
            )
        )


def make_problem(
    spec: MethodSpec,
    walker: Walker,
    site: Site,
    layer_format: LayerFormat,
    activations: SiteActivations,
    total: int,
    device: torch.device,
    store: ActivationStore,
    moments: MomentCache,
) -> LayerProblem:
    """Everything the solver sees of one layer. total: microbatches of all ranks. moments: of the layer before."""
    grid = choose_layer_grid(site.geometry.to_matrix(walker.tensor(site.weight_name)).cpu(), layer_format)
    _check_scales(grid, site.name)
    dtype = getattr(torch, spec.rounding.compute_dtype)
    weight = site.geometry.to_matrix(walker.tensor(site.weight_name)).to(device, dtype, copy=True)
    return LayerProblem(
        name=site.name,
        geometry=site.geometry,
        weight=weight,
        bias=None if site.bias_name is None else walker.tensor(site.bias_name).to(device, dtype),
        grid=grid.to(dtype, device),
        transform=_output_transform(walker, site, spec.rounding.sees_activation, dtype, device),
        activations=activations,
        total_microbatches=total,
        store=store,
        seed=spec.runtime.seed,
        asymmetry=spec.rounding.damped_asymmetry,
        correct_bias=spec.rounding.corrects_bias and site.shift_name is not None,
        correct_scale=spec.rounding.corrects_scale,
        rows_per_input=spec.rounding.rows_per_input,
        moments=moments,
    )


def _output_transform(
    walker: Walker, site: Site, activation_in_loss: bool, dtype: torch.dtype, device: torch.device
) -> OutputTransform:
    activation = site.activation if activation_in_loss else "identity"
    norm = site.batch_norm
    if norm is None:
        return OutputTransform(activation=activation)
    mean, var = (walker.tensor(name).to(device, dtype) for name in (norm.running_mean, norm.running_var))
    gamma = torch.ones_like(mean) if norm.weight is None else walker.tensor(norm.weight).to(device, dtype)
    beta = torch.zeros_like(mean) if norm.bias is None else walker.tensor(norm.bias).to(device, dtype)
    scale = gamma / torch.sqrt(var + norm.eps)
    return OutputTransform(scale, beta - mean * scale, activation)


def describe_format(layer_format: LayerFormat) -> str:
    """ "int4 per_group_symmetric 128" """
    kind = "symmetric" if layer_format.symmetric else "affine"
    size = f" {layer_format.group_size}" if layer_format.group_size else ""
    return f"{layer_format.dtype} per_{layer_format.strategy}_{kind}{size}"


def make_record(site: Site, layer_format: LayerFormat, result: LayerResult, report: LayerReport) -> LayerRecord:
    """The committed form of a layer's result, on the host."""
    element = layer_format.element_format
    codes = site.geometry.from_matrix(result.codes).cpu()
    grid = result.grid.to(torch.float32, torch.device("cpu"))
    kind = "symmetric" if layer_format.symmetric else "affine"
    shape = {"tensor": (), "channel": (-1,), "group": grid.scale.shape}[layer_format.strategy]
    own: dict[str, Any] = {}
    if element is None:
        stored = codes.to(torch.int8 if layer_format.signed else torch.uint8)
    else:
        stored = encode(codes, element)
        factor = None if grid.tensor_scale is None else grid.tensor_scale.item()
        own = {"element_format": element, "scale_format": grid.scale_format, "tensor_scale": factor}
        own |= {"quant_min": None, "quant_max": None}
    return LayerRecord(
        name=site.name,
        codes=stored,
        scale=grid.scale.reshape(shape),
        zero_point=grid.zero_point.reshape(shape).to(torch.int32),
        format={
            "dtype": layer_format.dtype,
            "qscheme": f"per_{layer_format.strategy}_{kind}",
            "group_size": layer_format.group_size,
            "quant_min": layer_format.quant_min,
            "quant_max": layer_format.quant_max,
            "groups": site.geometry.groups,
            "transposed": site.geometry.transposed,
            **own,
        },
        metrics=report.to_dict(),
        shift=None if result.shift is None else result.shift.float().cpu(),
    )
