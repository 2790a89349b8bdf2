"""Share of samples that get their class."""

import torch
from torch import Tensor

from distributed_adaround.data.encoder import LABELS
from distributed_adaround.errors import InputError
from distributed_adaround.metrics.metric import Metric, Seen


class Accuracy(Metric):
    """Percent of samples whose largest logit is that of their class."""

    needs_labels = True
    unit = "%"

    def sums(self, seen: Seen) -> Tensor:
        logits, labels = seen.logits, seen.fields[LABELS].to(seen.logits.device)
        if labels.is_floating_point() or logits.dim() != 2 or labels.shape != logits.shape[:1]:
            what = f"labels are {labels.dtype} {tuple(labels.shape)}, the output has shape {tuple(logits.shape)}"
            raise InputError(f"accuracy: {what}; it needs whole numbers (samples) and logits (samples, classes)")
        if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
            what = f"labels go from {int(labels.min())} to {int(labels.max())}"
            raise InputError(
                f"accuracy: {what}, but the model has the classes 0 to {logits.shape[1] - 1}; correct them"
            )
        # A logit that is no number has no place in an order.
        hits = torch.where(logits.isnan().any(dim=1), torch.nan, (logits.argmax(dim=1) == labels).double())
        return torch.stack([hits, torch.ones_like(hits)], dim=1)

    def value(self, mean: float) -> tuple[float, float]:
        return 100 * mean, 100.0
