"""Where activations stop being finite: looked for only when a sum over them came out infinite or NaN."""

import math

import torch
from torch import Tensor

from distributed_adaround.capture.sites import Batch, rows_that_count
from distributed_adaround.errors import InputError
from distributed_adaround.runtime.comm import Comm, agreed
from distributed_adaround.solve.problem import LayerProblem

# (microbatch, sample in it, what, value)
_Place = tuple[int, int, str, float]


def non_finite_error(problem: LayerProblem, comm: Comm) -> InputError:
    """The error to raise, with the first microbatch and sample over all ranks. A collective: all ranks ask together."""
    places = [place for place in comm.all_gather_object(_first_place(problem)) if place is not None]
    problem_is, where = f"too large for {str(problem.dtype).removeprefix('torch.')}", ""
    if places:
        microbatch, sample, what, value = min(places, key=lambda place: place[:3])
        problem_is = problem_is if math.isfinite(value) else "not finite"
        where = f": {value:.3g} in its {what}, sample {sample} of microbatch {microbatch}"
    return agreed(
        InputError(
            f"layer {problem.name}: its activations are {problem_is}{where}; check the weights and the calibration data"
        )
    )


def _first_place(problem: LayerProblem) -> _Place | None:
    """Of this rank. The float stream comes first: what it cannot compute, the quantized one cannot either."""
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
