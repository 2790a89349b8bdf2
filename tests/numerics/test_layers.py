"""Each layer type against its torch module: the matrix view, the shapes and the layer itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distributed_adaround.numerics.layers import LayerGeometry, pad

LayerCase = tuple[nn.Module, LayerGeometry, Tensor]


def channel_dim(geometry: LayerGeometry) -> int:
    return 1 if geometry.num_spatial_dims else -1


def test_apply_is_the_module(layer_case: LayerCase) -> None:
    layer, geometry, x = layer_case
    torch.testing.assert_close(geometry.apply(x, layer.weight, layer.bias), layer(x), rtol=1e-12, atol=1e-12)
    expected = layer(x)
    if layer.bias is not None:
        shape = [1] * expected.dim()
        shape[channel_dim(geometry)] = -1
        expected = expected - layer.bias.view(shape)
    torch.testing.assert_close(geometry.apply(x, layer.weight), expected, rtol=1e-12, atol=1e-12)


def test_channels_and_inputs(layer_case: LayerCase) -> None:
    layer, geometry, x = layer_case
    dim = channel_dim(geometry)
    assert geometry.out_channels == layer(x).shape[dim]
    assert geometry.in_channels == x.shape[dim]
    assert geometry.out_channels * geometry.inputs_per_output == layer.weight.numel()


def test_matrix_round_trip(layer_case: LayerCase) -> None:
    layer, geometry, _ = layer_case
    matrix = geometry.to_matrix(layer.weight)
    assert matrix.shape == (geometry.out_channels, geometry.inputs_per_output)
    assert torch.equal(geometry.from_matrix(matrix), layer.weight)


def test_a_row_of_the_matrix_makes_one_output_channel(layer_case: LayerCase) -> None:
    layer, geometry, x = layer_case
    before = layer(x)
    for o in range(geometry.out_channels):
        matrix = geometry.to_matrix(layer.weight).clone()
        matrix[o] += 1 + torch.rand_like(matrix[o])
        after = geometry.apply(x, geometry.from_matrix(matrix), layer.bias)
        changed = (after - before).abs().movedim(channel_dim(geometry), 0).flatten(1).amax(dim=1) > 1e-9
        assert changed.tolist() == [channel == o for channel in range(geometry.out_channels)]


def test_columns_are_input_channels_then_kernel(layer_case: LayerCase) -> None:
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
    assert torch.equal(geometry.to_matrix(weight), expected)


def test_linear_takes_any_leading_dimensions() -> None:
    geometry = LayerGeometry((4, 6))
    x, weight = torch.randn(2, 3, 5, 6), torch.randn(4, 6)
    torch.testing.assert_close(geometry.apply(x, weight), x @ weight.T)


def test_pad_before_after_and_crop() -> None:
    x = torch.arange(1.0, 7.0).reshape(1, 1, 2, 3)
    assert pad(x, ((0, 0), (0, 0))) is x
    assert pad(x, ((1, 0), (0, 2)))[0, 0].tolist() == [[0, 0, 0, 0, 0], [1, 2, 3, 0, 0], [4, 5, 6, 0, 0]]
    assert pad(x, ((0, -1), (-1, 1)))[0, 0].tolist() == [[2, 3, 0]]
