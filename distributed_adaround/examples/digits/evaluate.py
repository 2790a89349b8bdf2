"""Top-1 on the held-out digits."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from distributed_adaround.examples.digits import data
from distributed_adaround.examples.digits.model import build


def top1(weights: Path) -> float:
    """Share of the held-out images, 0 to 1, that the network with these weights (.safetensors) names correctly."""
    model = build()
    model.load_state_dict(load_file(weights))
    images, labels = data.held_out()
    with torch.inference_mode():
        predicted = model.eval()(images).argmax(dim=1)
    return int((predicted == labels).sum()) / len(labels)


def table(rows: dict[str, Path]) -> str:
    """Lines of text: name and top-1 in percent for each weights file."""
    num_images = len(data.held_out()[1])
    lines = [f"top-1 on {num_images} held-out digits"]
    lines += [f"  {name:<10}{100 * top1(weights):7.2f} %" for name, weights in rows.items()]
    return "\n".join(lines)
