"""A float and a quantized model side by side on held-out data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from distributed_adaround.capture.sites import counting_rows
from tests.benchmarks.cases import Batch, OnDevice, forward


@torch.no_grad()
def held_out_errors(
    original: nn.Module, quantized: nn.Module, layers: Sequence[str], batches: Sequence[Batch], device: torch.device
) -> dict[str, float]:
    """Squared error over squared float output: of the model's output, and the mean over its layers.

    Each layer stands behind its own model's prefix, so its error holds what the layers before it lost.
    """
    before, after = (OnDevice(model, device).eval() for model in (original, quantized))
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for batch in batches:
        mask = None if isinstance(batch, Tensor) else batch.get("attention_mask")
        with _outputs(before.model, layers) as expected:
            expected[""].append(_main_output(forward(before, batch)))
        with _outputs(after.model, layers) as actual:
            actual[""].append(_main_output(forward(after, batch)))
        for name in ("", *layers):
            for theirs, ours in zip(expected[name], actual[name], strict=True):
                theirs, ours = counting_rows(theirs, mask), counting_rows(ours, mask)
                sums[name][0] += float((ours - theirs).square().sum(dtype=torch.float64))
                sums[name][1] += float(theirs.square().sum(dtype=torch.float64))
    relative = {name: error / energy if energy else error for name, (error, energy) in sums.items()}
    return {
        "output_error": relative[""],
        "layer_error": sum(relative[name] for name in layers) / len(layers),
    }


@contextmanager
def _outputs(model: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Outputs of layers by name, one entry per call."""
    kept: dict[str, list[Tensor]] = defaultdict(list)

    def keep_as(name: str) -> Any:
        return lambda module, args, output: kept[name].append(output)

    hooks = [model.get_submodule(name).register_forward_hook(keep_as(name)) for name in layers]
    try:
        yield kept
    finally:
        for hook in hooks:
            hook.remove()


def _main_output(output: Any) -> Tensor:
    """The first tensor of real numbers: logits or hidden states, not a cache."""
    leaves = pytree.tree_leaves(dict(output) if hasattr(output, "keys") else output)
    return next(leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point())
