"""The stored form of a layer: what fits together, and what it weighs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy_records import record

from distributed_adaround.errors import AdaRoundError
from distributed_adaround.solve.record import LayerRecord


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codes": torch.zeros(4, 6)}, "float32"),
        ({"codes": torch.full((4, 6), 8, dtype=torch.int8)}, "from 8 to 8, allowed are -8 to 7"),
        ({"scale": torch.ones(4, dtype=torch.float64)}, "float64"),
        ({"scale": torch.ones(4, 1)}, "zero point"),
        ({"scale": torch.ones(6), "zero_point": torch.zeros(6, dtype=torch.int32)}, "does not fit"),
        ({"scale": torch.ones(4, 4), "zero_point": torch.zeros(4, 4, dtype=torch.int32)}, "does not fit"),
        ({"format": {"dtype": "int4"}}, "keys"),
        ({"shift": torch.zeros(6)}, r"shift is torch.float32 of shape \(6,\), not one float32 for each output"),
        ({"shift": torch.zeros(4, 1)}, "not one float32 for each output"),
        ({"shift": torch.zeros(4, dtype=torch.float64)}, "shift is torch.float64"),
    ],
)
def test_parts_that_do_not_fit_are_never_committed(change: dict[str, Tensor], words: str) -> None:
    with pytest.raises(AdaRoundError, match=words):
        replace(record(), **change)


def _reference(item: LayerRecord) -> Tensor:
    """Dequantized one weight at a time from the meaning of each index."""
    weight = torch.empty(item.codes.shape)
    groups = int(str(item.format["groups"]))
    for index in map(tuple, torch.nonzero(torch.ones(item.codes.shape)).tolist()):
        kernel, kernel_sizes = index[2:], item.codes.shape[2:]
        if item.format["transposed"]:
            per_group = item.codes.shape[0] // groups
            output = index[0] // per_group * item.codes.shape[1] + index[1]
            position = index[0] % per_group
        else:
            output, position = index[0], index[1]
        for offset, size in zip(kernel, kernel_sizes, strict=True):
            position = position * size + offset
        scale, zero_point = item.scale, item.zero_point
        if scale.dim() == 1:
            scale, zero_point = scale[output], zero_point[output]
        elif scale.dim() == 2:
            num_inputs = item.codes.numel() // scale.shape[0]
            run = position // (num_inputs // scale.shape[1])
            scale, zero_point = scale[output, run], zero_point[output, run]
        weight[index] = (item.codes[index].int() - zero_point) * scale
    return weight


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
@pytest.mark.parametrize(
    ("shape", "num_outputs", "groups", "transposed"),
    [
        ((4, 6), 4, 1, False),
        ((4, 3, 2), 4, 2, False),
        ((6, 1, 3, 3), 6, 6, False),
        ((4, 4, 3), 4, 1, True),
        ((6, 2, 3, 2), 4, 2, True),
        ((4, 2, 3, 1, 2), 4, 2, True),
    ],
)
def test_dequantize_is_what_the_description_says(
    shape: tuple[int, ...], num_outputs: int, groups: int, transposed: bool, strategy: str
) -> None:
    scale_shape = {"tensor": (), "channel": (num_outputs,), "group": (num_outputs, 3)}[strategy]
    if strategy == "group" and (torch.Size(shape).numel() // num_outputs) % 3:
        scale_shape = (num_outputs, 2)
    item = record("x", shape, scale_shape, groups=groups, transposed=transposed)
    assert torch.equal(item.dequantize(torch.float32), _reference(item))
    assert torch.equal(item.dequantize(torch.bfloat16), _reference(item).bfloat16())
