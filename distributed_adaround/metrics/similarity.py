"""How alike the outputs of two models are, without labels."""

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_adaround.capture.sites import rows_that_count
from distributed_adaround.metrics.metric import Metric, Seen


class Similarity(Metric):
    """Mean cosine between first outputs of the float and the quantized model. Those of the float model, averaged over
    the tokens that count where they are `(N, T, H)`, are held on the host until the end."""

    def __init__(self) -> None:
        self._reference: dict[int, Tensor] = {}

    def sums(self, seen: Seen) -> Tensor:
        vectors = _vectors(seen.first_output, seen.mask)
        if seen.index not in self._reference:
            self._reference[seen.index] = vectors
            cosines = torch.where(vectors.isfinite().all(dim=1), 1.0, torch.nan).double()
        else:
            cosines = F.cosine_similarity(vectors.double(), self._reference[seen.index].double(), dim=1)
        return torch.stack([cosines, torch.ones_like(cosines)], dim=1)


def _vectors(output: Tensor, mask: Tensor | None) -> Tensor:
    """`(N, H)`, float32 on the host."""
    if output.dim() != 3:
        return output.reshape(len(output), -1).float().cpu()
    keep = rows_that_count(mask, tuple(output.shape[:2]))
    kept = output if keep is None else [row[which.to(row.device)] for row, which in zip(output, keep, strict=True)]
    return torch.stack([row.double().mean(dim=0).float().cpu() for row in kept])
