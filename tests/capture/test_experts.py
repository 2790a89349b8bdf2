"""Experts in one parameter: each is a site with its own rows, whatever runs them and however it lies there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from torch import Tensor, nn
from torch.nn import functional as F
from walks import clone, close, inputs_of, rounded, walker_for

from distributed_adaround import quantize
from distributed_adaround.capture.exported import export_model, straight_line
from distributed_adaround.capture.graph import capture
from distributed_adaround.data.microbatches import ModelInputs

EXPERTS = 3


class Experts(nn.Module):
    """Top-1 experts behind a layer. kind: the operation, and how a matrix lies in the parameter; `picked` replays a
    routing."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind.startswith("grouped"):
            # Not inside torch.export, where transformers would leave its outputs unregistered.
            pytest.importorskip("transformers.integrations.moe")
        self.inp, self.gate, self.out = nn.Linear(6, 8), nn.Linear(8, EXPERTS), nn.Linear(4, 4)
        shape = (8, 4) if kind.endswith("transposed") else (4, 8)
        self.w = nn.Parameter(torch.randn(EXPERTS, *shape))
        self.kind = kind.removesuffix(", transposed")
        self.transposed = kind.endswith("transposed")
        self.picked: Tensor | None = None

    def hidden(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.inp(x))
        return h, self.gate(h)

    def forward(self, x: Tensor) -> Tensor:
        h, scores = self.hidden(x)
        top = scores.argmax(-1) if self.picked is None else self.picked
        inputs = self.w if self.transposed else self.w.transpose(1, 2)  # (E, I, O)
        if self.kind == "grouped":
            order = top.argsort(stable=True)
            ends = torch.histc(top.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
            y = torch.ops.transformers.grouped_mm_fallback(h[order], inputs, ends)[order.argsort()]
        elif self.kind == "bmm":
            share = F.one_hot(top, EXPERTS).T[:, :, None].float()
            y = torch.bmm(h.expand(EXPERTS, -1, -1) * share, inputs).sum(0)
        elif self.kind == "left":
            share = F.one_hot(top, EXPERTS).T[:, None, :].float()
            y = torch.bmm(inputs.transpose(1, 2), h.T.expand(EXPERTS, -1, -1) * share).sum(0).T
        else:
            share = F.one_hot(top, EXPERTS).float()
            letters = "eio" if self.transposed else "eoi"
            y = torch.einsum(f"te,{letters},ti->to", share, self.w, h)
        return self.out(y)

    def matrix(self, expert: int) -> Tensor:
        """`(O, I)`, a view."""
        return self.w.data[expert].T if self.transposed else self.w.data[expert]


KINDS = [f"{kind}{layout}" for kind in ("grouped", "bmm", "left", "einsum") for layout in ("", ", transposed")]


def expected_rows(kind: str, h: Tensor, top: Tensor, expert: int) -> Tensor:
    """Input of one expert: its rows in the order of the tokens, or all rows with zeros in the place of others."""
    mine = top == expert
    return h[mine] if kind.startswith("grouped") else h * mine[:, None]


@pytest.mark.parametrize("kind", KINDS)
def test_each_expert_sees_its_own_rows(kind: str) -> None:
    torch.manual_seed(0)
    model = Experts(kind)
    batches = inputs_of(*(torch.randn(size, 6) for size in (20, 5, 1)))
    before, after = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model).requires_grad_(False)
    walker = walker_for(model, batches)
    assert [unit.name for unit in walker.units] == ["inp", "gate", "w", "out"]
    for unit in walker.units:
        tensors = {}
        reached = walker.reach(unit)
        if unit.name == "w":
            assert [site.name for site in unit.sites] == [f"w[{expert}]" for expert in range(EXPERTS)]
            for place, site in enumerate(unit.sites):
                check_rows(kind, (before, after), [batch.of_site(place) for batch in reached], batches, place)
                whole = tensors.get("w", walker.tensor("w"))
                assert torch.equal(site.weight_of(whole), before.matrix(place))
                assert site.geometry.weight_shape == (4, 8)
                tensors["w"] = site.stored(whole, rounded(before.matrix(place)))
                after.matrix(place).copy_(rounded(before.matrix(place)))
        else:
            tensors[unit.site.weight_name] = rounded(before.get_parameter(unit.site.weight_name))
            after.get_parameter(unit.site.weight_name).copy_(tensors[unit.site.weight_name])
        walker.commit(unit, tensors)
    assert torch.equal(model.w, after.w)
    for (_, one, other), inputs in zip(walker.finish(), batches, strict=True):
        after.picked = before.hidden(inputs.args[0])[1].argmax(-1)
        close(one, before(*clone(inputs.args)))
        close(other, after(*clone(inputs.args)))


def check_rows(kind: str, models: Any, found: list[Any], batches: list[ModelInputs], expert: int) -> None:
    before, after = models
    for batch, inputs in zip(found, batches, strict=True):
        h, scores = before.hidden(inputs.args[0])
        top = scores.argmax(-1)
        x = expected_rows(kind, h, top, expert)
        close(batch.x, x)
        close(batch.x_hat, expected_rows(kind, after.hidden(inputs.args[0])[0], top, expert))
        close(batch.y, x @ before.matrix(expert).T)


def test_layers_that_pick_experts_are_known_and_others_are_not() -> None:
    class Picking(nn.Module):
        def __init__(self, forward: Callable[..., Tensor]) -> None:
            super().__init__()
            self.a, self.gate, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
            self.table = nn.Embedding(6, 6)
            self.function = forward

        def forward(self, x: Tensor) -> Tensor:
            return self.function(self, self.a(x).relu())

    def switch(m: Any, h: Tensor) -> Tensor:
        share = m.gate(h).softmax(-1)
        rows = (share.argmax(-1) == 2).nonzero().flatten()
        return h.index_put((rows,), m.b(h[rows]) * share.max(-1).values[rows][:, None])

    def codebook(m: Any, h: Tensor) -> Tensor:
        return m.b(m.table(m.gate(h).argmax(-1)))

    def chosen_word(m: Any, h: Tensor) -> Tensor:
        return m.gate(m.b(h)).argmax(-1)

    def sorted_by_a(m: Any, h: Tensor) -> Tensor:
        return m.b(m.gate(h)[h[:, 0].argsort()])

    def soft(m: Any, h: Tensor) -> Tensor:
        return m.b(h * m.gate(h).softmax(-1))

    for function, expected in ((switch, ["gate"]), (codebook, []), (chosen_word, []), (sorted_by_a, []), (soft, [])):
        model = Picking(function).eval()
        graph = capture(straight_line(export_model(model, ModelInputs((torch.randn(5, 6),), {}))))
        assert [site.name for site in graph.sites if site.is_router] == expected, function.__name__


def of_two_kinds() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Experts("grouped").eval()
    with torch.no_grad():
        # The first expert gets a few rows, fewer than inputs.
        model.gate.bias.copy_(torch.tensor([0.2, 0.2, 0.0]))
    return model, [torch.randn(15, 6) for _ in range(4)]


def rounded_network(solver: str) -> tuple[list[Any], dict[str, Tensor]]:
    model, batches = of_two_kinds()
    found, table = quantize(model, batches, dtype="int4", solver=solver, max_iter=30, progress=False)
    return [(row.name, row.rows, row.note) for row in table], dict(found.state_dict())


@pytest.mark.parametrize("solver", ["gram", "minibatch"])
def test_experts_are_solved_one_by_one_and_few_rows_fall_back_on_all(solver: str) -> None:
    rows, weights = rounded_network(solver)
    model, batches = of_two_kinds()
    counts = torch.cat([model.hidden(x)[1].argmax(-1) for x in batches]).bincount(minlength=EXPERTS).tolist()
    assert 0 < counts[0] < 8 <= min(counts[1:]), "the case shows nothing"
    note = f"{counts[0]} rows of its own: learned from those of all experts of w"
    assert [row for row in rows if row[0].startswith("w")] == [
        ("w[0]", counts[0], note), ("w[1]", counts[1], ""), ("w[2]", counts[2], "")
    ]  # fmt: skip
    assert "gate" not in [name for name, *_ in rows]
    assert torch.equal(weights["gate.weight"], model.gate.weight)
    for expert in range(EXPERTS):
        matrix = weights["w"][expert]
        assert all(channel.unique().numel() <= 16 for channel in matrix)
        # On the grid, and near the float weight: each channel has 15 steps of its own.
        assert not torch.equal(matrix, model.w[expert])
        assert (matrix - model.w[expert]).abs().amax(1).max() < 0.5 * model.w.abs().max()


@pytest.mark.slow
def test_the_same_bytes_on_two_ranks(pool: RankPool) -> None:
    alone = rounded_network("gram")
    for rows, weights in pool.run(rounded_network, 2, "gram"):
        assert rows == alone[0]
        for name, tensor in alone[1].items():
            assert torch.equal(weights[name], tensor), name


def test_embeddings_on_request_are_rounded_to_nearest_row_by_row() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(20, 6), nn.Embedding(9, 6)
            self.a, self.head = nn.Linear(6, 6), nn.Linear(6, 20, bias=False)
            self.tied = nn.Embedding(20, 6)
            self.head.weight = self.tied.weight

        def forward(self, x: Tensor) -> Tensor:
            h = self.words(x) + self.places(torch.arange(x.shape[1])) + self.tied(x)
            return self.head(self.a(h))

    torch.manual_seed(0)
    model, batches = Words().eval(), [torch.randint(20, (4, 7)) for _ in range(3)]
    assert [row.name for row in quantize(model, batches, dtype="int4", sweeps=2, progress=False)[1]] == ["a"]
    found, table = quantize(
        model, batches, dtype="int4", observer="minmax", embeddings=True, solver="gram", sweeps=2, progress=False
    )
    assert [(row.name, row.note, row.solver) for row in table] == [
        ("words", "a table: rounded to nearest", "nearest"), ("a", "", "gram")
    ]  # fmt: skip
    weight = model.words.weight.detach()
    scale = weight.abs().amax(dim=1, keepdim=True) / 7.5
    steps = found.words.weight / found.words.weight.abs().amax(dim=1, keepdim=True)
    assert all(row.unique().numel() <= 6 for row in steps)
    assert ((found.words.weight - weight).abs() <= 0.51 * scale * 7.5 / 7).all()
    for name in ("places.weight", "tied.weight"):
        assert torch.equal(found.get_parameter(name), model.get_parameter(name))
