"""Output error of rounded weights over the whole calibration set, with the same bits on any number of ranks."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from distributed_adaround.capture.sites import Batch, rows_that_count
from distributed_adaround.errors import InputError
from distributed_adaround.runtime.comm import Comm, agreed
from distributed_adaround.solve.problem import LayerProblem, OutputErrors


def output_errors(
    problem: LayerProblem, candidates: Sequence[Tensor], comm: Comm, shift: Tensor | None = None
) -> OutputErrors:
    """Errors of weights `(G, R, J)` against the float layer, through what follows the layer. A collective.

    Each microbatch's sums fill a place of their own, so the reduction only ever adds zeros to them and the total does
    not depend on the number of ranks. shift: `(O,)`, added to the outputs of the first candidate (a corrected bias).
    Raises InputError when the layer's inputs or outputs are not finite, or no row counts.
    """
    shifts = [shift, *[None] * (len(candidates) - 1)]
    sums, dim = error_sums(problem, 2 * len(candidates)), problem.geometry.channel_dim
    for batch in problem.batches:
        x_hat, keep = problem.on_device(batch.x_hat), batch.keep(dim)
        one_stream = batch.x is batch.x_hat
        base, y = problem.base(batch, x_hat), problem.on_device(batch.y)
        wanted = float_outputs = problem.transform(y, dim)
        if not one_stream and problem.asymmetry < 1:
            wanted = problem.transform(problem.target(batch, base), dim)
        for place, (weight, own) in enumerate(zip(candidates, shifts, strict=True)):
            outputs = _outputs(problem, x_hat, weight, own, base if one_stream else None)
            outputs = problem.transform(outputs, dim)
            error = sums[batch.index, 2 * place] = channel_sums((outputs - wanted).square_(), keep, dim)
            same = wanted is float_outputs
            apart = error if same else channel_sums((outputs - float_outputs).square_(), keep, dim)
            sums[batch.index, 2 * place + 1] = apart
        sums[batch.index, -3] = channel_sums(float_outputs.square(), keep, dim)
        if not one_stream:
            difference = problem.transform.linear_part()(y - base, dim)
            sums[batch.index, -2] = channel_sums(difference.square(), keep, dim)
        sums[batch.index, -1] = num_rows(batch, keep, dim)
    total = reduced(sums, problem, comm)
    return OutputErrors(total[:-3:2], total[1:-3:2], total[-3], total[-2], int(total[-1, 0]))


def _outputs(problem: LayerProblem, x_hat: Tensor, weight: Tensor, shift: Tensor | None, base: Tensor | None) -> Tensor:
    """`Ŵ x̂ + b` and the shift. base: the float layer's outputs, where its inputs are the same: they may have few bits,
    and what these cut off is no error of the weight."""
    if base is not None:
        return problem.outputs(x_hat, weight - problem.weight, shift).add_(base)
    bias = problem.bias
    return problem.outputs(x_hat, weight, bias if shift is None else shift if bias is None else bias + shift)


def error_sums(problem: LayerProblem, number: int) -> Tensor:
    """Places `(batches, number + 3, O)` for errors, energy, what the inputs take away, and how many rows count."""
    shape = (problem.total_microbatches, number + 3, problem.geometry.out_channels)
    return torch.zeros(shape, dtype=torch.float64, device=problem.device)


def reduced(sums: Tensor, problem: LayerProblem, comm: Comm) -> Tensor:
    """The sums `(number + 3, O)` of all ranks. A collective. Raises InputError as `output_errors` does."""
    total = comm.all_reduce(sums).sum(dim=0)
    if not bool(torch.isfinite(total).all()):
        raise non_finite_error(problem, comm)
    if not total[-1, 0]:
        message = f"layer {problem.name}: the attention mask leaves no row to learn from; check the mask"
        raise agreed(InputError(message))
    return total


def num_rows(batch: Batch, keep: Tensor | None, channel_dim: int) -> Tensor:
    """How many rows of a microbatch count: a number, float64, on the device of its outputs."""
    if keep is not None:
        return keep.sum(dtype=torch.float64)
    return torch.full((), batch.y.numel() / batch.y.shape[channel_dim], dtype=torch.float64, device=batch.y.device)


def channel_sums(values: Tensor, keep: Tensor | None, channel_dim: int) -> Tensor:
    """Sum over all rows that count, `(O,)` float64.

    Rows of a sample (of a Linear layer: all) are summed in the dtype of the values, which torch does pairwise: on a CPU
    ten times as fast as in float64, and as exact as the values are.
    """
    if keep is None and channel_dim == 1:
        return values.flatten(2).sum(dim=2).sum(dim=0, dtype=torch.float64)
    rows = values.movedim(channel_dim, -1)
    rows = rows.flatten(0, -2) if keep is None else rows[keep.to(rows.device)]
    return rows.sum(dim=0).double()


def non_finite_error(problem: LayerProblem, comm: Comm) -> InputError:
    """The error to raise, with the first microbatch and sample over all ranks. A collective.

    Looked for only when a sum over activations came out infinite or NaN.
    """
    places = [place for place in comm.all_gather_object(_first_place(problem)) if place is not None]
    problem_is, where = f"too large for {str(problem.dtype).removeprefix('torch.')}", ""
    if places:
        microbatch, sample, what, value = min(places, key=lambda place: place[:3])
        problem_is = problem_is if math.isfinite(value) else "not finite"
        where = f": {value:.3g} in its {what}, sample {sample} of microbatch {microbatch // problem.num_calls}"
    advice = "check the weights and the calibration data"
    return agreed(InputError(f"layer {problem.name}: its activations are {problem_is}{where}; {advice}"))


def _first_place(problem: LayerProblem) -> tuple[int, int, str, float] | None:
    """(microbatch, sample in it, what, value) of this rank, of the float stream first: the other one follows it."""
    for batch in sorted(problem.batches, key=lambda batch: batch.index):
        streams = {"float input": batch.x, "float output": batch.y, "quantized input": batch.x_hat}
        for what, values in streams.items():
            found = _first_sample(values.to(problem.dtype), batch, problem.geometry.channel_dim)
            if found is not None:
                return (batch.index, found[0], what, found[1])
    return None


def _first_sample(values: Tensor, batch: Batch, channel_dim: int) -> tuple[int, float] | None:
    """(position in the microbatch, value) of the first sample with a value that counts and has no finite square."""
    rows, mask = values.movedim(channel_dim, -1), batch.mask
    bad = ~torch.isfinite(rows.square())
    keep = rows_that_count(mask, tuple(rows.shape[:-1]))
    if keep is not None:
        bad &= keep.to(bad.device).unsqueeze(-1)
    if not bool(bad.any()):
        return None
    place = tuple(bad.nonzero()[0].tolist())
    # Tokens of all samples may lie in one dimension.
    flattened = mask is not None and rows.shape[0] == mask.numel() != mask.shape[0]
    return (place[0] // mask.shape[1] if flattened and mask is not None else place[0]), float(rows[place])
