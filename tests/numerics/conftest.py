"""Layers of every kind, described by torch's own modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from distributed_adaround.numerics.layers import LayerGeometry


class AsymmetricConv1d(nn.Conv1d):
    """Four zeros before and five after, as padding="same" does for an even reach (with a warning)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(F.pad(x, (4, 5)))


# (module, spatial size of its input, padding as (before, after) where torch's module has another word for it)
torch.manual_seed(0)  # layers made while modules load come before the fixture that seeds each test
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], tuple[tuple[int, int], ...] | None]] = {
    "linear": (nn.Linear(6, 4), (), None),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (11,), None),
    "conv1d-asymmetric": (AsymmetricConv1d(4, 6, 4, dilation=3), (11,), ((4, 5),)),
    "conv2d": (nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(0, 1)), (7, 5), None),
    "conv2d-1x1": (nn.Conv2d(4, 6, 1, bias=False), (5, 4), None),
    "conv2d-groups": (nn.Conv2d(6, 4, 3, padding=2, dilation=(1, 2), groups=2), (6, 7), None),
    "conv2d-depthwise": (nn.Conv2d(4, 8, 3, stride=2, groups=4), (7, 6), None),
    "conv3d": (nn.Conv3d(2, 3, (1, 2, 3), padding=(0, 1, 1), stride=(1, 2, 1)), (3, 5, 4), None),
    "conv3d-depthwise": (nn.Conv3d(3, 3, 2, groups=3), (3, 3, 4), None),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=3, padding=1, output_padding=2, dilation=2), (5,), None),
    "transposed2d": (nn.ConvTranspose2d(3, 4, (4, 2), stride=(2, 3), padding=(1, 0)), (4, 5), None),
    "transposed2d-groups": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=(1, 2), output_padding=(1, 0), groups=2, dilation=(1, 2)),
        (4, 3),
        None,
    ),
    "transposed2d-depthwise": (nn.ConvTranspose2d(4, 4, 2, stride=2, groups=4, bias=False), (3, 4), None),
    # Padding beyond the kernel's reach crops the spread input.
    "transposed2d-cropped": (nn.ConvTranspose2d(2, 3, 1, stride=2, padding=1, output_padding=1), (5, 4), None),
    "transposed3d": (
        nn.ConvTranspose3d(2, 4, 2, stride=(1, 2, 2), output_padding=(0, 1, 0), padding=(0, 1, 0), groups=2),
        (2, 3, 3),
        None,
    ),
}


@pytest.fixture(params=LAYERS)
def layer_case(request: pytest.FixtureRequest) -> tuple[nn.Module, LayerGeometry, torch.Tensor]:
    """A float64 layer, its geometry written out by hand, and three samples of input."""
    layer, size, padding = LAYERS[request.param]
    layer = layer.double().requires_grad_(False)
    shape = tuple(layer.weight.shape)
    if not size:
        return layer, LayerGeometry(shape), torch.randn(3, layer.in_features, dtype=torch.float64)
    geometry = LayerGeometry(
        weight_shape=shape,
        stride=layer.stride,
        padding=padding or tuple((amount, amount) for amount in layer.padding),
        dilation=layer.dilation,
        output_padding=layer.output_padding,
        groups=layer.groups,
        transposed=layer.transposed,
    )
    return layer, geometry, torch.randn(3, layer.in_channels, *size, dtype=torch.float64)
