"""Einsums with weights: the same values, and the layers that are found in them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from distributed_adaround.capture.exported import export_model, straight_line
from distributed_adaround.capture.graph import capture
from distributed_adaround.data.microbatches import ModelInputs

SIZES = {"b": 5, "t": 3, "i": 6, "o": 4, "e": 2, "h": 2, "d": 3, "k": 3}

# The equation, which operand is the weight, and shapes of the layers in it.
CASES = [
    ("bti,oi->bto", 1, [(4, 6)]),
    ("oi,bti->bto", 0, [(4, 6)]),
    ("bti,ihk->bthk", 1, [(6, 6)]),
    ("bthd,hdo->bto", 1, [(4, 6)]),
    ("bi,eoi->beo", 1, [(8, 6)]),
    ("ebi,eoi->ebo", 1, [(4, 6)] * 2),
    ("ebi,eio->ebo", 1, [(4, 6)] * 2),
    ("be,eoi,bi->bo", 1, [(4, 6)] * 2),
    ("be,bi,eio->bo", 2, [(4, 6)] * 2),
    ("eoi,be,bi->bo", 0, [(4, 6)] * 2),
    ("bi, oi -> b", 1, None),
]


@pytest.mark.parametrize(("equation", "place", "shapes"), CASES, ids=[case[0] for case in CASES])
def test_einsums_are_products(equation: str, place: int, shapes: list[tuple[int, int]] | None) -> None:
    letters = equation.replace(" ", "").split("->")[0].split(",")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn([SIZES[letter] for letter in letters[place]]))
            self.first = nn.Linear(7, 7)

        def forward(self, *operands: Tensor) -> Tensor:
            parts = list(operands)
            parts.insert(place, self.weight)
            return torch.einsum(equation, *parts)

    model = Model().eval()
    others = [torch.randn([SIZES[c] for c in part]) for number, part in enumerate(letters) if number != place]
    program = torch.export.export(model, tuple(others), strict=False)
    module = straight_line(program)
    torch.testing.assert_close(module(*others), model(*others))
    sites = capture(module).sites
    if shapes is not None:
        assert [site.geometry.weight_shape for site in sites] == shapes


def test_einsums_without_weights_and_diagonals_are_left_alone() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return torch.einsum("bi,bj->bij", y, y)

    module = straight_line(export_model(Model().eval(), ModelInputs((torch.randn(3, 4),), {})))
    assert torch.ops.aten.einsum.default in [node.target for node in module.graph.nodes]
