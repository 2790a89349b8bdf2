"""Rows of a layer's input against torch's modules and F.unfold."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distributed_adaround.numerics import patches
from distributed_adaround.numerics.layers import LayerGeometry

LayerCase = tuple[nn.Module, LayerGeometry, Tensor]


def all_rows(x: Tensor, output_size: tuple[int, ...], geometry: LayerGeometry) -> Tensor:
    """Rows of all samples and output pixels, `(G, R, J)`."""
    if not geometry.num_spatial_dims:
        return patches.gather_rows(x, torch.arange(x.shape[0])[:, None], geometry)
    padded = patches.channels_last_padded(x, geometry)
    size = tuple(padded.shape[1:-1])
    first = patches.row_positions(size, output_size, geometry)
    starts = (torch.arange(x.shape[0])[:, None] * math.prod(size) + first).flatten()
    positions = starts[:, None] + patches.kernel_offsets(size, geometry)
    return patches.gather_rows(padded.flatten(0, -2), positions, geometry)


def test_rows_times_weights_are_the_layer(layer_case: LayerCase) -> None:
    layer, geometry, x = layer_case
    expected = layer(x).movedim(1, -1)
    rows = all_rows(x, tuple(expected.shape[1:-1]), geometry)
    weight = patches.to_patch_layout(geometry.to_channels(layer.weight), geometry)
    assert rows.shape == (geometry.groups, expected.numel() // geometry.out_channels, geometry.inputs_per_output)
    product = torch.einsum("grj,goj->rgo", rows, weight).reshape(expected.shape)
    if layer.bias is not None:
        product = product + layer.bias
    torch.testing.assert_close(product, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 3])
def test_rows_equal_unfold(groups: int) -> None:
    stride, padding, dilation, kernel = (2, 1), (1, 2), (1, 2), (3, 2)
    geometry = LayerGeometry((6, 6 // groups, *kernel), stride, ((1, 1), (2, 2)), dilation, (0, 0), groups)
    x = torch.randn(2, 6, 7, 5)
    columns = F.unfold(x, kernel, dilation, padding, stride)  # (N, C * K, L), channels major
    by_row = columns.transpose(1, 2).reshape(-1, groups, 6 // groups, math.prod(kernel))
    expected = by_row.permute(1, 0, 3, 2).reshape(groups, by_row.shape[0], -1)
    height, width = ((n + 2 * p - d * (k - 1) - 1) // s + 1
                     for n, p, d, k, s in zip((7, 5), padding, dilation, kernel, stride, strict=True))  # fmt: skip
    assert torch.equal(all_rows(x, (height, width), geometry), expected)


def test_patch_layout_round_trip(layer_case: LayerCase) -> None:
    layer, geometry, _ = layer_case
    by_channel = geometry.to_channels(layer.weight)
    layout = patches.to_patch_layout(by_channel, geometry)
    assert layout.shape == (geometry.groups, geometry.out_channels // geometry.groups, geometry.inputs_per_output)
    assert layout.is_contiguous()
    assert torch.equal(patches.from_patch_layout(layout, geometry), by_channel)


def test_padded_size_is_the_size_of_the_padded_input(layer_case: LayerCase) -> None:
    _, geometry, x = layer_case
    padded = patches.channels_last_padded(x, geometry)
    assert patches.padded_size(tuple(x.shape[2:]), geometry) == tuple(padded.shape[1:-1])
    assert padded.is_contiguous()


def test_no_rows(layer_case: LayerCase) -> None:
    _, geometry, x = layer_case
    kernel = math.prod(geometry.kernel_size)
    for features in (x.movedim(1, -1).flatten(0, -2), torch.empty(0, geometry.in_channels)):
        rows = patches.gather_rows(features, torch.empty(0, kernel, dtype=torch.int64), geometry)
        assert rows.shape == (geometry.groups, 0, geometry.inputs_per_output)


def joined(x: Tensor, geometry: LayerGeometry) -> Tensor:
    return torch.cat(list(patches.unfolded_pieces(x, geometry)), dim=1)


@pytest.mark.parametrize("piece", [1, 40, 10**6])
def test_unfolded_pieces_times_weights_are_the_layer(
    layer_case: LayerCase, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, geometry, x = layer_case
    monkeypatch.setattr(patches, "_PIECE", piece)
    expected = layer(x).movedim(1, -1)
    pieces = list(patches.unfolded_pieces(x, geometry))
    weight = patches.to_patch_layout(geometry.to_channels(layer.weight), geometry)
    product = torch.einsum("grj,goj->rgo", torch.cat(pieces, dim=1), weight).reshape(expected.shape)
    if layer.bias is not None:
        product = product + layer.bias
    torch.testing.assert_close(product, expected, rtol=1e-11, atol=1e-11)
    # A piece is at least one row, and else no larger than it may be.
    row = geometry.groups * geometry.inputs_per_output
    assert all(part.numel() <= max(piece, row) for part in pieces)
    total = sum(part.numel() for part in pieces)
    assert (len(pieces) == 1) == (total <= max(piece, row))


def test_unfolded_pieces_hold_what_gather_rows_does(layer_case: LayerCase) -> None:
    layer, geometry, x = layer_case
    assert torch.equal(joined(x, geometry), all_rows(x, tuple(layer(x).shape[2:]), geometry))


@pytest.mark.parametrize("groups", [1, 3])
def test_unfolded_pieces_equal_unfold(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    stride, padding, dilation, kernel = (2, 1), (1, 2), (1, 2), (3, 2)
    geometry = LayerGeometry((6, 6 // groups, *kernel), stride, ((1, 1), (2, 2)), dilation, (0, 0), groups)
    x = torch.randn(5, 6, 7, 5)
    columns = F.unfold(x, kernel, dilation, padding, stride).transpose(1, 2)
    expected = columns.reshape(-1, groups, 6 // groups * math.prod(kernel)).transpose(0, 1)
    row = groups * expected.shape[2]
    # 28 rows of each of 5 samples: one row at a time; three; a sample; all.
    for allowed, count in ((1, 140), (3 * row, 47), (28 * row, 5), (140 * row, 1)):
        monkeypatch.setattr(patches, "_PIECE", allowed)
        pieces = list(patches.unfolded_pieces(x, geometry))
        assert len(pieces) == count
        assert torch.equal(torch.cat(pieces, dim=1)[:, :, patches.weight_order(geometry)], expected)


def test_unfolded_pieces_of_any_memory_layout(layer_case: LayerCase) -> None:
    _, geometry, x = layer_case
    expected = joined(x.contiguous(), geometry)
    last = x.dim() - 1
    for other in (
        x.movedim(1, -1).contiguous().movedim(-1, 1),  # channels last
        x.transpose(0, last).contiguous().transpose(0, last),
        torch.cat([torch.randn_like(x), x])[x.shape[0] :],  # not from the start of its storage
        torch.stack([x, torch.randn_like(x)], dim=-1)[..., 0],
    ):
        assert torch.equal(other, x)
        assert torch.equal(joined(other, geometry), expected)
    one = x[:1].expand(3, *x.shape[1:])
    assert torch.equal(joined(one, geometry), torch.cat([joined(x[:1], geometry)] * 3, dim=1))


def test_unfolded_pieces_of_a_linear_layer_with_many_dimensions(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 3, 4, 6)
    geometry = LayerGeometry((5, 6))
    assert torch.equal(joined(x, geometry), x.reshape(1, 24, 6))
    monkeypatch.setattr(patches, "_PIECE", 31)
    pieces = list(patches.unfolded_pieces(x, geometry))
    assert [tuple(piece.shape) for piece in pieces] == [(1, 5, 6)] * 4 + [(1, 4, 6)]
    assert torch.equal(torch.cat(pieces, dim=1), x.reshape(1, 24, 6))


def test_unfolding_leaves_the_input_as_it_is(layer_case: LayerCase) -> None:
    _, geometry, x = layer_case
    before = x.clone()
    joined(x, geometry)
    assert torch.equal(x, before)


@pytest.mark.parametrize(("first", "every"), [(0, 2), (1, 3), (6, 7), (2, 1)])
def test_unfolded_pieces_of_some_rows(
    first: int, every: int, layer_case: LayerCase, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, geometry, x = layer_case
    whole = joined(x, geometry)
    monkeypatch.setattr(patches, "_PIECE", 2 * geometry.groups * geometry.inputs_per_output)
    some = torch.cat(list(patches.unfolded_pieces(x, geometry, first, every)), dim=1)
    assert torch.equal(some, whole[:, first::every])
