"""The real models and their data, from a folder that the user names.

Each module there has `load_model()`, `calibration(n, seed=...)` and `evaluate(model)`. Calibration draws a permutation
by its seed, so the first n of a larger draw are the same samples; what is drawn beyond them is held out.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.benchmarks.configurations import Case

Batch = Tensor | dict[str, Tensor]


def load_case(case: Case, folder: Path) -> ModuleType:
    if not (folder / f"{case.module_name}.py").exists():
        raise FileNotFoundError(f"{folder} has no {case.module_name}.py; name the folder of the cases with --cases")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(case.module_name)


def batches(module: ModuleType, case: Case, samples: tuple[int, int], seed: int) -> tuple[list[Batch], list[Batch]]:
    """Calibration and held-out samples as microbatches. samples: how many of each."""
    drawn = module.calibration(sum(samples), seed=seed)
    found = len(drawn) if isinstance(drawn, Tensor) else len(next(iter(drawn.values())))
    if found != sum(samples):
        raise ValueError(f"case {case.name} has {found} samples, {sum(samples)} are asked for; lower --samples")
    calibration, held_out = (
        _cut(drawn, start, stop, case.microbatch_size) for start, stop in ((0, samples[0]), (samples[0], sum(samples)))
    )
    return calibration, held_out


def _cut(drawn: Batch, start: int, stop: int, size: int) -> list[Batch]:
    bounds = [(first, min(first + size, stop)) for first in range(start, stop, size)]
    if isinstance(drawn, Tensor):
        return [drawn[first:last] for first, last in bounds]
    return [{key: value[first:last] for key, value in drawn.items()} for first, last in bounds]


class OnDevice(nn.Module):
    """A model on another device behind an interface on the host, which is what the cases' `evaluate` uses."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.model = model.to(device)
        self.device = device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(Tensor, lambda value: value.to(self.device), (args, kwargs))
        return pytree.tree_map_only(Tensor, lambda value: value.cpu(), self.model(*args, **kwargs))


def forward(model: nn.Module, batch: Batch) -> Any:
    """The model's output for one microbatch."""
    return model(batch) if isinstance(batch, Tensor) else model(**batch)


def metrics_of(
    module: ModuleType, model: nn.Module, original: nn.Module, device: torch.device, cache: Path
) -> dict[str, float]:
    """The case's own metrics on its whole evaluation set; for embeddings also the mean cosine to the float model's.

    cache: folder for the float model's embeddings, which are the same for every run.
    """
    shown = OnDevice(model, device).eval()
    if not hasattr(module, "embed"):
        return dict(module.evaluate(shown))
    with _recorded(module) as calls:
        metrics = dict(module.evaluate(shown))
    texts = [text for given, _ in calls for text in given]
    ours = torch.cat([embeddings for _, embeddings in calls])
    theirs = _float_embeddings(module, OnDevice(original, device).eval(), texts, cache / f"{module.__name__}-float.pt")
    return {**metrics, "cosine": float((ours * theirs).sum(1).mean())}


@contextmanager
def _recorded(module: ModuleType) -> Iterator[list[tuple[list[str], Tensor]]]:
    """What `evaluate` gives to the case's `embed`, and gets: embedding again would take as long as the metric."""
    embed, calls = module.embed, []

    def recording(model: nn.Module, texts: list[str], *args: Any, **kwargs: Any) -> Tensor:
        calls.append((texts, embed(model, texts, *args, **kwargs)))
        return calls[-1][1]

    vars(module)["embed"] = recording
    try:
        yield calls
    finally:
        vars(module)["embed"] = embed


def _float_embeddings(module: ModuleType, original: nn.Module, texts: list[str], path: Path) -> Tensor:
    """Embeddings by the float model, from a file where an earlier run has left them for the same texts."""
    if path.exists():
        kept = torch.load(path, weights_only=True)
        if kept["texts"] == texts:
            embeddings: Tensor = kept["embeddings"]
            return embeddings
    embeddings = module.embed(original, texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"texts": texts, "embeddings": embeddings}, path)
    return embeddings
