"""Parts of parameters against slices and transposes of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distributed_adaround.numerics.weight_view import WeightView

SHAPE = (3, 4, 6)
# How a part is taken out, and the box it is labelled with, written out.
PARTS: list[tuple[str, Any, str]] = [
    ("whole", lambda p: p, ""),
    ("expert", lambda p: p[1], "[1]"),
    ("transposed expert", lambda p: p[2].T, "[2]"),
    ("rows of all", lambda p: p[:, 1:3], "[:,1:3]"),
    ("columns of one", lambda p: p[0, :, 2:], "[0,:,2:6]"),
    ("interleaved", lambda p: p[1, 1::2], "[1,1:4]"),
    ("joined", lambda p: p.flatten(0, 1), ""),
]


@pytest.mark.parametrize(("take", "label"), [part[1:] for part in PARTS], ids=[part[0] for part in PARTS])
def test_a_part_reads_and_writes_its_place(take: Any, label: str) -> None:
    view = WeightView.like(take(torch.empty(SHAPE, device="meta")))
    # In the middle of a larger storage, as after a load of packed files.
    parameter = torch.randn(5 + 72)[5:].view(SHAPE)
    before = parameter.clone()
    assert torch.equal(view.of(parameter), take(parameter))
    new = torch.randn(view.shape)
    view.of(parameter).copy_(new)
    take(before).copy_(new)
    assert torch.equal(parameter, before)
    assert view.label(SHAPE) == label


def test_the_value_is_in_the_dtype_of_the_run() -> None:
    parameter = torch.randn(4, 6)
    view = WeightView.like(parameter.T, torch.bfloat16)
    assert torch.equal(view.value(parameter), parameter.T.bfloat16())
    assert torch.equal(view.transposed().value(parameter), parameter.bfloat16())


def test_json_and_back() -> None:
    view = WeightView((2, 3), (1, 6), 7, "bfloat16")
    assert WeightView.from_dict(view.to_dict(), 21) == view
    with pytest.raises(ValueError, match="does not lie in a parameter of 20 numbers"):
        WeightView.from_dict(view.to_dict(), 20)


@pytest.mark.parametrize("change", [{"offset": -1}, {"strides": [-1, 6]}, {"shape": [0, 3]}])
def test_a_view_that_leaves_its_parameter_is_refused(change: dict[str, Any]) -> None:
    values = WeightView((2, 3), (1, 6), 7).to_dict() | change
    with pytest.raises(ValueError, match="does not lie in"):
        WeightView.from_dict(values, 100)


def test_views_share_memory_with_the_parameter() -> None:
    parameter: Tensor = torch.zeros(4, 4)
    WeightView((4, 2), (4, 2), 1).of(parameter).fill_(1)
    assert parameter.sum(0).tolist() == [0, 4, 0, 4]
