"""Each layer type against its torch module: the view by channels, the shapes and the layer itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distributed_adaround.numerics.layers import LayerGeometry, pad

LayerCase = tuple[nn.Module, LayerGeometry, Tensor]


def test_apply_is_the_module(layer_case: LayerCase) -> None:
    layer, geometry, x = layer_case
    torch.testing.assert_close(geometry.apply(x, layer.weight, layer.bias), layer(x), rtol=1e-12, atol=1e-12)
    expected = layer(x)
    if layer.bias is not None:
        shape = [1] * expected.dim()
        shape[geometry.channel_dim] = -1
        expected = expected - layer.bias.view(shape)
    torch.testing.assert_close(geometry.apply(x, layer.weight), expected, rtol=1e-12, atol=1e-12)


def test_channels_and_inputs(layer_case: LayerCase) -> None:
    layer, geometry, x = layer_case
    dim = geometry.channel_dim
    assert dim == (1 if geometry.num_spatial_dims else -1)
    assert geometry.out_channels == layer(x).shape[dim]
    assert geometry.in_channels == x.shape[dim]
    assert geometry.out_channels * geometry.inputs_per_output == layer.weight.numel()


def test_by_channels_and_back(layer_case: LayerCase) -> None:
    layer, geometry, _ = layer_case
    by_channel = geometry.to_channels(layer.weight)
    channels = geometry.out_channels // geometry.groups
    assert by_channel.shape == (geometry.groups, channels, geometry.inputs_per_output)
    assert torch.equal(geometry.from_channels(by_channel), layer.weight)


def test_weights_of_one_channel_make_one_output_channel(layer_case: LayerCase) -> None:
    layer, geometry, x = layer_case
    before = layer(x)
    for o in range(geometry.out_channels):
        by_channel = geometry.to_channels(layer.weight).clone()
        own = by_channel.flatten(0, 1)[o]
        own += 1 + torch.rand_like(own)
        after = geometry.apply(x, geometry.from_channels(by_channel), layer.bias)
        changed = (after - before).abs().movedim(geometry.channel_dim, 0).flatten(1).amax(dim=1) > 1e-9
        assert changed.tolist() == [channel == o for channel in range(geometry.out_channels)]


def test_inputs_are_input_channels_then_kernel(layer_case: LayerCase) -> None:
    _, geometry, _ = layer_case
    # Number every weight by (input channel within its group, kernel position) in torch's own layout.
    kernel = int(torch.Size(geometry.kernel_size).numel())
    per_group = geometry.in_channels // geometry.groups
    number = torch.arange(per_group * kernel).reshape(per_group, *geometry.kernel_size)
    if geometry.transposed:
        weight = number.repeat(geometry.groups, *(1,) * geometry.num_spatial_dims)[:, None].expand(
            geometry.weight_shape
        )
    else:
        weight = number[None].expand(geometry.weight_shape)
    expected = torch.arange(per_group * kernel).expand(geometry.out_channels, -1)
    assert torch.equal(geometry.to_channels(weight).flatten(0, 1), expected)


def test_linear_takes_any_leading_dimensions() -> None:
    geometry = LayerGeometry((4, 6))
    x, weight = torch.randn(2, 3, 5, 6), torch.randn(4, 6)
    torch.testing.assert_close(geometry.apply(x, weight), x @ weight.T)


def test_pad_before_after_and_crop() -> None:
    x = torch.arange(1.0, 7.0).reshape(1, 1, 2, 3)
    assert pad(x, ((0, 0), (0, 0))) is x
    assert pad(x, ((1, 0), (0, 2)))[0, 0].tolist() == [[0, 0, 0, 0, 0], [1, 2, 3, 0, 0], [4, 5, 6, 0, 0]]
    assert pad(x, ((0, -1), (-1, 1)))[0, 0].tolist() == [[2, 3, 0]]
