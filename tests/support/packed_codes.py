"""What quantized.safetensors and quantized.json say, read by hand: numpy's bits, no function of the program."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor


def read_by_hand(folder: Path) -> dict[str, Tensor]:
    """All tensors. Of a quantized weight W: its codes under W, in its shape, W_scale and W_zero_point."""
    text = json.loads((folder / "quantized.json").read_text(encoding="utf-8"))
    tensors: dict[str, Tensor] = {}
    for file, entry in text["files"].items():
        held = safetensors.torch.load_file(folder / file)
        assert sorted(held) == entry["tensors"]
        tensors |= held
    for name, layer in text["layers"].items():
        scale = tensors.pop(f"{name}.scale")
        constant = layer["zero_point"]
        zero_point = (
            torch.full(scale.shape, constant or 0) if constant is not None else tensors.pop(f"{name}.zero_point")
        )
        codes = _unpacked(tensors.pop(f"{name}.codes"), layer)
        tensors |= {name: codes, f"{name}_scale": scale, f"{name}_zero_point": zero_point.to(torch.int32)}
    return tensors


def _unpacked(codes: Tensor, layer: dict[str, Any]) -> Tensor:
    bits, shape = layer["packed"], layer["shape"]
    if bits is None:
        assert list(codes.shape) == shape
        return codes
    count = math.prod(shape)
    assert codes.dtype == torch.uint8
    assert codes.numel() == math.ceil(count * bits / 8)
    stream = np.unpackbits(codes.numpy(), bitorder="little")[: count * bits].reshape(count, bits)
    values = stream.astype(np.int64) @ (1 << np.arange(bits))
    if layer["element_format"] is not None or layer["dtype"].startswith(("uint", "quint")):
        return torch.from_numpy(values.astype(np.uint8)).reshape(shape)
    values -= (values >= 1 << (bits - 1)) * (1 << bits)
    return torch.from_numpy(values.astype(np.int8)).reshape(shape)
