"""Which layers become sites in replay, and the reason of every parameter that stays in float."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_batches import Batches
from walks import commit, replayed, sites_of

from distributed_adaround.capture.replay_walk import ReplayWalker
from distributed_adaround.capture.sites import Site


def walker_for(module: nn.Module, x: Tensor) -> ReplayWalker:
    return replayed(module, Batches([x]))


def names(sites: Sequence[Site]) -> list[str]:
    return [site.name for site in sites]


def reasons(walker: ReplayWalker) -> dict[str, str]:
    return {parameter.name: parameter.reason for parameter in walker.float_parameters}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.norm = nn.LayerNorm(4)
        self.mixed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.plain = nn.Linear(4, 4)
        self.view = nn.Linear(4, 4)
        self.view.weight = nn.Parameter(self.plain.weight.t())
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = self.norm(self.attention(x, x, x)[0])
        return self.head(self.view(self.plain(self.mixed(x))))


def test_every_parameter_is_a_site_or_has_a_reason() -> None:
    model = Tied().eval()
    walker = walker_for(model, torch.randint(7, (2, 3)))
    assert names(sites_of(walker)) == []
    found = reasons(walker)
    assert set(found) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    assert found["head.weight"] == "shared with embed"
    assert found["embed.weight"] == "not the weight of a Linear or convolution layer (Embedding)"
    assert found["norm.weight"] == "not the weight of a Linear or convolution layer (LayerNorm)"
    assert found["norm.bias"] == "bias"
    hidden = "torch's MultiheadAttention computes with it where hooks do not reach"
    assert found["attention.in_proj_weight"] == found["attention.out_proj.weight"] == hidden
    assert found["plain.weight"] == "shared with view"
    assert "computed from other tensors" in found["mixed.parametrizations.weight.original0"]


def test_layers_cut_from_one_block_of_memory_are_not_shared() -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    block = torch.randn(18)
    model[0].weight.data, model[1].weight.data = block[:9].view(3, 3), block[9:].view(3, 3)
    walker = walker_for(model, torch.randn(2, 3))
    assert names(sites_of(walker)) == ["0", "1"]
    before = model[1].weight.clone()
    commit(walker, sites_of(walker)[0], torch.zeros(3, 3))
    assert torch.equal(model[1].weight, before)


def test_a_subclass_with_its_own_forward_stays_in_float() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * 2, self.bias)

    class Named(nn.Linear):
        pass

    walker = walker_for(nn.Sequential(Scaled(3, 3), Named(3, 3)), torch.randn(2, 3))
    assert [(site.name, site.module_class) for site in sites_of(walker)] == [("1", "Named")]
    assert "Scaled computes its output in its own way" in reasons(walker)["0.weight"]


def test_a_transposed_layer_with_output_size_stays_in_float() -> None:
    class Up(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose1d(2, 2, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x, output_size=[12])

    walker = walker_for(Up(), torch.randn(1, 2, 5))
    assert names(sites_of(walker)) == []
    assert "output_size" in reasons(walker)["up.weight"]
