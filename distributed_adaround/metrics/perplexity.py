"""Perplexity of the next token."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from distributed_adaround.data.encoder import DECODER_INPUT
from distributed_adaround.errors import InputError
from distributed_adaround.metrics.metric import Metric, Seen

# Rows of logits, each as long as the vocabulary, that are held in float32 at once.
_ROWS = 128


class Perplexity(Metric):
    """exp of the mean negative log-likelihood of each next token that counts."""

    def sums(self, seen: Seen) -> Tensor:
        logits, (tokens, mask) = seen.logits, _targets(seen)
        if logits.dim() != 3 or logits.shape[:2] != tokens.shape:
            what = f"has shape {tuple(logits.shape)}, the tokens {tuple(tokens.shape)}"
            raise InputError(f"perplexity needs logits (samples, tokens, vocabulary), but the output {what}")
        if bool((tokens < 0).any()) or int(tokens.max()) >= logits.shape[2]:
            what = f"tokens go from {int(tokens.min())} to {int(tokens.max())}"
            raise InputError(f"perplexity: {what}, but the logits are of {logits.shape[2]}; give the model's tokenizer")
        # A token is predicted where it counts, from one that counts.
        counts = mask[:, 1:] & mask[:, :-1]
        rows = zip(logits[:, :-1], tokens[:, 1:], counts, strict=True)
        return torch.stack([torch.stack([_surprise(*row), row[2].sum().double()]) for row in rows])

    def value(self, mean: float) -> tuple[float, float]:
        try:
            found = math.exp(mean)
        except OverflowError:
            found = math.inf
        return found, found


class _Targets(NamedTuple):
    """tokens: int64 `(N, T)`. mask: bool, alike: those that count."""

    tokens: Tensor
    mask: Tensor


def _targets(seen: Seen) -> _Targets:
    """What the logits predict, on their device."""
    tokens = seen.fields.get(DECODER_INPUT if DECODER_INPUT in seen.fields else "input_ids")
    if tokens is None or tokens.is_floating_point() or tokens.dim() != 2:
        names = ", ".join(seen.fields)
        what = f"perplexity needs the field input_ids, whole numbers (samples, tokens); there are {names}"
        raise InputError(f"{what}; name it by evaluate.data.fields")
    counting = torch.ones_like(tokens, dtype=torch.bool) if seen.mask is None else seen.mask != 0
    if counting.shape != tokens.shape:
        what = f"the mask has shape {tuple(counting.shape)}, the tokens {tuple(tokens.shape)}"
        raise InputError(f"perplexity: {what}; both must be (samples, tokens)")
    device = seen.logits.device
    return _Targets(tokens.long().to(device), counting.to(device))


def _surprise(logits: Tensor, tokens: Tensor, counts: Tensor) -> Tensor:
    """Negative log-likelihoods, summed in float64 over the tokens that count."""
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    for start in range(0, len(logits), _ROWS):
        rows = slice(start, start + _ROWS)
        losses = F.cross_entropy(logits[rows].float(), tokens[rows], reduction="none")
        total += losses[counts[rows]].double().sum()
    return total
