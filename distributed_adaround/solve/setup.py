"""One layer of a job, made ready to solve: its solver, its grid, and its problem."""

from dataclasses import replace

import torch
from torch import Tensor

from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.sites import Batch, Site, Walker
from distributed_adaround.errors import InputError
from distributed_adaround.formats import LayerFormat
from distributed_adaround.numerics.grid import Grid
from distributed_adaround.numerics.moments import quadratic_of
from distributed_adaround.numerics.ranges import choose_grid
from distributed_adaround.numerics.soft_rounding import OutputTransform
from distributed_adaround.runtime.comm import Comm, agreed
from distributed_adaround.runtime.imports import implementation
from distributed_adaround.solve.measure import FoldedMoments
from distributed_adaround.solve.problem import LayerProblem, Solver, Trial
from distributed_adaround.solve.regularize import Expected, expected
from distributed_adaround.spec.job import MethodSpec
from distributed_adaround.spec.rounding import SOLVERS, RoundingSpec

# Channels that a trial takes of a layer: enough to tell one way of rounding from another, few enough to cost little.
_TRIAL_CHANNELS = 64


def solver_name(rounding: RoundingSpec, site: Site) -> str:
    """Moments know nothing of an activation: with one inside the loss gram leaves a layer to steps on samples."""
    if site.is_table:
        return "nearest"
    needs_samples = rounding.solver == "gram" and rounding.sees_activation and site.activation != "identity"
    return "minibatch" if needs_samples else rounding.solver


def make_solver(name: str, rounding: RoundingSpec) -> Solver:
    """The solver of that name, with the settings of the job."""
    solver: type[Solver] = implementation(SOLVERS, name)
    return solver(rounding)


def make_trial_solver(name: str, rounding: RoundingSpec) -> Solver | None:
    """The solver of that name with less effort, for the trials of layers; None: it works on no moments, which they are
    made of."""
    solver = make_solver(name, rounding.for_trials)
    return solver if solver.needs_moments else None


def make_problem(
    spec: MethodSpec,
    walker: Walker,
    site: Site,
    layer_format: LayerFormat,
    batches: list[Batch],
    total_microbatches: int,
    store: ActivationStore,
) -> LayerProblem:
    """Everything the solver sees of one layer; its quadratic comes later, by `with_moments`. walker: has reached the
    layer. batches: of this rank; total_microbatches: of all, times the calls of the layer. store: for what is kept."""
    rounding, device = spec.rounding, store.device
    dtype: torch.dtype = getattr(torch, rounding.compute_dtype)
    weight = site.geometry.to_channels(site.weight_of(walker.tensor(site.weight_name)))
    own = weight.to(device, dtype, copy=True)
    return LayerProblem(
        name=site.name,
        geometry=site.geometry,
        weight=own,
        bias=None if site.bias_name is None else site.bias_of(walker.tensor(site.bias_name)).to(own),
        grid=_grid(weight, layer_format, site.name, own, spec.quantize.keep_zeros),
        transform=_output_transform(walker, site, rounding, own),
        batches=batches,
        total_microbatches=total_microbatches,
        store=store,
        seed=spec.runtime.seed,
        source=site.source,
        asymmetry=rounding.damped_asymmetry,
        correct_bias=rounding.corrects_bias and site.shift_name is not None,
        correct_scale=rounding.corrects_scale,
        rows_per_input=rounding.rows_per_input,
        num_calls=site.num_calls,
    )


def with_moments(problem: LayerProblem, moments: FoldedMoments, layer_format: LayerFormat, comm: Comm) -> LayerProblem:
    """The problem with its quadratic, as other data are expected to give it, and with its trial; with the observer
    output_mse also with scales that minimize the output error, not the weight error: the error of each weight counts as
    much as its input is large, A_jj. A collective."""
    expects = expected(moments, problem.correct_bias, problem.dtype, comm)
    if layer_format.observer == "output_mse":
        energy = expected(moments, False, problem.dtype, comm).second.diagonal(dim1=1, dim2=2)
        importance = energy[:, None, :].expand_as(problem.weight).float().cpu()
        weight, keep_zeros = problem.weight, problem.grid.keep_zeros
        problem = replace(problem, grid=_grid(weight, layer_format, problem.name, weight, keep_zeros, importance))
    problem = replace(problem, effective_rows=expects.effective_rows)
    if not problem.transform.is_affine:
        return problem
    quadratic = quadratic_of(problem.weight, expects.second, expects.cross, problem.asymmetry)
    return replace(problem, quadratic=quadratic, trial=_trial(problem, expects))


def _trial(problem: LayerProblem, expects: Expected) -> Trial | None:
    """A few channels, spread evenly over the layer; None where there is nothing to leave out."""
    held_out = expects.held_out
    if expects.trial_second is None or held_out is None:
        return None
    groups, channels, _ = problem.weight.shape
    place = (slice(None), slice(None, None, max(1, channels // max(1, _TRIAL_CHANNELS // groups))))
    weight = problem.weight[place]
    outputs = torch.arange(groups * channels, device=problem.device).view(groups, channels)[place].flatten()
    known = quadratic_of(weight, expects.trial_second, expects.trial_cross, problem.asymmetry)
    part = replace(problem, weight=weight, grid=problem.grid.part(place), quadratic=known)
    return Trial(part, held_out, outputs, max(1.0, expects.effective_rows * expects.held_out_share))


def _grid(
    weight: Tensor,
    layer_format: LayerFormat,
    name: str,
    like: Tensor,
    keep_zeros: bool,
    importance: Tensor | None = None,
) -> Grid:
    """Chosen on the host, so that it is the same on every rank and device, and brought to where `like` is. Raises
    InputError when a scale is not a positive finite number, on every rank alike."""
    grid = choose_grid(weight.float().cpu(), layer_format, importance)
    bad = ~(torch.isfinite(grid.scale) & (grid.scale > 0)).flatten(0, 1)
    if bool(bad.any()):
        channel, run = bad.nonzero()[0].tolist()
        value = float(grid.scale.flatten(0, 1)[channel, run])
        wrong = f"the scale of output channel {channel} is {value}, which must be positive and finite"
        advice = "the weights are too large for float32: leave the layer in float by quantize.ignore"
        raise agreed(InputError(f"layer {name}: {wrong}; {advice}"))
    return replace(grid.to(like.dtype, like.device), keep_zeros=keep_zeros)


def _output_transform(walker: Walker, site: Site, rounding: RoundingSpec, like: Tensor) -> OutputTransform:
    activation = site.activation if rounding.sees_activation else "identity"
    norm = site.batch_norm
    if norm is None:
        return OutputTransform(activation=activation)

    def tensor(name: str) -> Tensor:
        return walker.tensor(name).to(like)

    mean, var = tensor(norm.running_mean), tensor(norm.running_var)
    gamma = torch.ones_like(mean) if norm.weight is None else tensor(norm.weight)
    beta = torch.zeros_like(mean) if norm.bias is None else tensor(norm.bias)
    scale = gamma / torch.sqrt(var + norm.eps)
    return OutputTransform(scale, beta - mean * scale, activation)
