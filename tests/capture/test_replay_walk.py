"""The hook-based walker against plain modules: captured tensors, the two streams, and which parameters it finds."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from walks import commit, plenty, reach, replayed, sites_of

from distributed_adaround.capture.replay_walk import ReplayWalker
from distributed_adaround.capture.sites import Site
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError

CPU = torch.device("cpu")


class Batches:
    """Microbatches in memory; owns all of them."""

    def __init__(self, tensors: Sequence[Tensor], masks: Sequence[Tensor | None] | None = None) -> None:
        self.tensors = list(tensors)
        self.masks = list(masks) if masks else [None] * len(self.tensors)

    @property
    def total(self) -> int:
        return len(self.tensors)

    @property
    def owned(self) -> Sequence[int]:
        return range(len(self.tensors))

    def load(self, index: int) -> ModelInputs:
        return ModelInputs((self.tensors[index],), {}, self.masks[index])

    def __iter__(self) -> Iterator[tuple[int, ModelInputs]]:
        return ((index, self.load(index)) for index in self.owned)


def walker_for(module: nn.Module, tensors: Sequence[Tensor]) -> ReplayWalker:
    return replayed(module, Batches(tensors))


def randomized(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module.eval()


def rounded(weight: Tensor, step: float = 0.25) -> Tensor:
    return torch.round(weight / step) * step


def names(sites: Sequence[Site]) -> list[str]:
    return [site.name for site in sites]


def reasons(walker: ReplayWalker) -> dict[str, str]:
    return {parameter.name: parameter.reason for parameter in walker.float_parameters}


LAYERS: list[tuple[str, nn.Module, tuple[int, ...]]] = [
    ("linear", nn.Linear(6, 5), (4, 6)),
    ("linear over tokens", nn.Linear(6, 5, bias=False), (2, 3, 6)),
    ("conv1d", nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    ("conv1d strided, dilated", nn.Conv1d(4, 6, 3, stride=2, dilation=2, padding=2), (2, 4, 11)),
    ("conv1d same", nn.Conv1d(4, 6, 4, padding="same", dilation=3), (2, 4, 15)),
    ("conv1d unbatched", nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    ("conv2d", nn.Conv2d(4, 6, (3, 5), stride=(2, 1), padding=(1, 2)), (2, 4, 8, 9)),
    ("conv2d grouped", nn.Conv2d(4, 6, 3, groups=2), (2, 4, 6, 6)),
    ("conv2d depthwise", nn.Conv2d(4, 8, 3, groups=4, padding=1), (2, 4, 6, 6)),
    ("conv2d same", nn.Conv2d(4, 6, (4, 3), padding="same"), (2, 4, 7, 7)),
    ("conv2d valid", nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 7)),
    ("conv2d circular", nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="circular"), (2, 4, 7, 7)),
    ("conv2d reflect same", nn.Conv2d(4, 6, 4, padding="same", padding_mode="reflect"), (2, 4, 7, 7)),
    ("conv3d", nn.Conv3d(2, 4, (2, 3, 3), padding=(0, 1, 1), groups=2), (2, 2, 4, 5, 5)),
    ("transposed 1d", nn.ConvTranspose1d(4, 6, 4, stride=3, output_padding=1, dilation=2), (2, 4, 5)),
    ("transposed 2d", nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 4, 5, 5)),
    ("transposed 3d", nn.ConvTranspose3d(2, 3, 2, stride=2), (1, 2, 3, 3, 3)),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
@pytest.mark.parametrize(("layer", "shape"), [case[1:] for case in LAYERS], ids=[case[0] for case in LAYERS])
def test_geometry_on_the_captured_input_gives_the_modules_own_output(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model = randomized(nn.Sequential(layer))
    x = torch.randn(shape)
    walker = walker_for(model, [x])
    (site,) = sites_of(walker)
    found = reach(walker, site)
    bias = walker.tensor(site.bias_name) if site.bias_name else None
    expected = model(x)
    again = site.geometry.apply(found.float_inputs[0], walker.tensor(site.weight_name), bias)
    torch.testing.assert_close(again.reshape(expected.shape), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.float_outputs[0].reshape(expected.shape), expected)
    assert site.module_class == type(layer).__name__


def test_streams_equal_two_models_run_side_by_side() -> None:
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(288, 4))
    )
    first, last = copy.deepcopy(model), copy.deepcopy(model)
    data = [torch.randn(4, 3, 8, 8), torch.randn(2, 3, 8, 8)]
    walker = walker_for(model, data)
    assert names(sites_of(walker)) == ["0", "4"]
    found = reach(walker, sites_of(walker)[0])
    for index, x in enumerate(data):
        assert torch.equal(found.inputs[index], x)
        assert torch.equal(found.float_outputs[index], first[0](x))  # not what the in-place ReLU left behind
    commit(walker, sites_of(walker)[0], rounded(model[0].weight))
    with torch.no_grad():
        last[0].weight.copy_(rounded(first[0].weight))
    found = reach(walker, sites_of(walker)[1])
    assert found.indices == [0, 1]
    for index, x in enumerate(data):
        assert torch.equal(found.float_inputs[index], first[:4](x))
        assert torch.equal(found.float_outputs[index], first(x))
        assert torch.equal(found.inputs[index], last[:4](x))
        assert not torch.equal(found.inputs[index], found.float_inputs[index])
    commit(walker, sites_of(walker)[1], rounded(model[4].weight))
    with torch.no_grad():
        last[4].weight.copy_(rounded(first[4].weight))
    assert found.batch_sizes == [4, 2]
    ends = list(walker.finish())
    assert [index for index, *_ in ends] == [0, 1]
    for index, before, after in ends:
        assert torch.equal(before, first(data[index]))
        assert torch.equal(after, last(data[index]))
    assert torch.equal(model(data[0]), last(data[0]))
    assert walker.tensor("4.weight").unique().numel() < first[4].weight.numel()


def test_a_site_can_be_committed_without_reaching_it() -> None:
    model = randomized(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    other = copy.deepcopy(model)
    x = torch.randn(3, 4)
    walker = walker_for(model, [x])
    commit(walker, sites_of(walker)[0], rounded(model[0].weight))
    found = reach(walker, sites_of(walker)[1])
    assert torch.equal(found.float_inputs[0], other[0](x))
    assert torch.equal(found.inputs[0], F.linear(x, rounded(other[0].weight), other[0].bias))


class Branching(nn.Module):
    """Data-dependent control flow, and a call in an order that differs from the one of registration."""

    def __init__(self, seen_by_torch: bool = True) -> None:
        super().__init__()
        self.late = nn.Linear(4, 2)
        self.large = nn.Linear(4, 4)
        self.small = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.early = nn.Linear(4, 4)
        self.seen_by_torch = seen_by_torch

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(x)
        size = x.abs().mean().item() if self.seen_by_torch else float(x.abs().numpy().mean())
        x = self.large(x) if size > 1 else self.small(x)
        return self.late(x)


def test_a_layer_that_only_a_later_microbatch_runs_is_a_site_in_its_place() -> None:
    model = randomized(Branching())
    data = [torch.randn(5, 4) * 10, torch.randn(5, 4) * 1e-3, torch.randn(5, 4) * 10]
    walker = walker_for(model, data)
    assert names(sites_of(walker)) == ["early", "small", "large", "late"]
    assert reasons(walker)["unused.weight"] == "the layer never runs as a module in the forward pass"
    assert "could not be exported: a test" in walker.notes[0]
    assert reach(walker, sites_of(walker)[2]).indices == [0, 2]
    assert reach(walker, sites_of(walker)[1]).indices == [1]
    assert any("does not run in 1 of this rank's 3 microbatches" in note for note in walker.notes)


@pytest.mark.parametrize("seen_by_torch", [True, False])
def test_the_float_stream_decides_for_both_where_torch_sees_it(seen_by_torch: bool) -> None:
    model = randomized(Branching(seen_by_torch))
    x = torch.randn(5, 4) * 10
    walker = walker_for(model, [x])
    commit(walker, sites_of(walker)[0], torch.zeros(4, 4))
    with torch.no_grad():
        model.early.bias.zero_()  # zero activations would now go through `small`
    found = reach(walker, sites_of(walker)[1])
    if seen_by_torch:
        assert torch.equal(found.inputs[0], torch.zeros(5, 4))
    else:
        assert torch.equal(found.inputs[0], found.float_inputs[0])
    assert any("takes another path" in note for note in walker.notes) != seen_by_torch


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.a(x)))


def test_all_calls_of_shared_and_repeated_layers_are_seen() -> None:
    model = randomized(Twice())
    first = copy.deepcopy(model)
    data = [torch.randn(3, 4), torch.randn(2, 4)]
    walker = walker_for(model, data)
    (site,) = sites_of(walker)
    assert (site.name, site.weight_name, site.num_calls) == ("a", "a.weight", 3)
    found = reach(walker, site)
    assert found.indices == [0, 1, 2, 3, 4, 5]
    for index, x in enumerate(data):
        for call in range(3):
            place = 3 * index + call
            assert torch.equal(found.float_inputs[place], x)
            assert torch.equal(found.inputs[place], x)
            # With the bias of the first layer in all calls: it is that of the site.
            torch.testing.assert_close(found.float_outputs[place], first.a(x))
            x = first.a(x)
    assert reasons(walker) == {"a.bias": "bias", "b.bias": "bias"}


class Routed(nn.Module):
    """Two experts of which each token takes one, picked behind a layer that is rounded."""

    def __init__(self, pick: str) -> None:
        super().__init__()
        self.first = nn.Linear(4, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.last = nn.Linear(8, 3)
        self.pick = pick

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        score = h[:, :2]
        y = torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            if self.pick == "argmax":
                rows = torch.where(score.argmax(-1) == number)[0]
            elif self.pick == "topk":
                rows = (score.topk(1).indices[:, 0] == number).nonzero().flatten()
            else:
                rows = (score[:, 0] > score[:, 1]) == bool(number)
            if len(h[rows]):
                y[rows] = expert(h[rows])
        return self.last(y)


@pytest.mark.parametrize("pick", ["argmax", "topk", "mask"])
def test_rows_are_routed_as_in_the_float_model(pick: str) -> None:
    model = randomized(Routed(pick))
    first = copy.deepcopy(model)
    data = [torch.randn(16, 4), torch.randn(16, 4)]
    walker = walker_for(model, data)
    changed = -first.first.weight.detach()  # routes most tokens to the other expert
    commit(walker, sites_of(walker)[0], changed)
    for expert in (0, 1):
        site = next(site for site in sites_of(walker) if site.name == f"experts.{expert}")
        found = reach(walker, site)
        for index, x_hat in zip(found.indices, found.inputs, strict=True):
            score = first.first(data[index])[:, :2]
            chosen = score.argmax(-1) if pick != "mask" else (score[:, 0] > score[:, 1]).long()
            rows = (chosen == expert).nonzero().flatten()
            assert torch.equal(x_hat, F.linear(data[index], changed, first.first.bias)[rows])
    assert not any("another path" in note for note in walker.notes)


def test_outputs_of_real_numbers_are_compared_where_the_shapes_agree() -> None:
    class Picking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> dict[str, object]:
            y = self.layer(x)
            # Behind torch's back: its own decisions are those of the float model.
            picked = [row for row, values in zip(y, y.detach().numpy(), strict=True) if values.sum() > 0]
            return {"best": y.argmax(-1), "picked": torch.stack([*picked, y[0]]), "rest": (y, None)}

    model = randomized(Picking())
    layer = copy.deepcopy(model.layer)
    same, other = torch.zeros(2, 3), torch.randn(64, 3)
    walker = walker_for(model, [other, same])
    commit(walker, sites_of(walker)[0], -model.layer.weight)
    ends = list(walker.finish())
    assert [index for index, *_ in ends] == [1, 1]
    assert torch.equal(ends[1][1], layer(same))
    assert walker.notes[-1] == "the two models' outputs differ in shape in 1 of this rank's microbatches"


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_encoder_layers_are_captured_although_torch_has_a_fused_path() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)  # with a padding mask torch goes on in nested tensors

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=torch.tensor([[False, False, True], [False, False, False]]))

    model = randomized(Padded()).requires_grad_(False)
    walker = walker_for(model, [torch.randn(2, 3, 8)])
    expected = [f"encoder.layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert names(sites_of(walker)) == expected
    found = reach(walker, sites_of(walker)[2])
    assert found.inputs[0].shape == (2, 3, 8)
    assert not found.inputs[0].is_nested
    assert torch.backends.mha.get_fastpath_enabled()


class Counting(nn.Module):
    """Changes a buffer in place, replaces another, draws random numbers and writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("count", torch.zeros(1))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        x.add_(1)
        self.count.add_(1)
        self.last = self.last + 1
        return self.layer(x + torch.rand_like(x) + self.count)


def test_a_forward_with_side_effects_leaves_none() -> None:
    model = randomized(Counting())
    data = [torch.randn(2, 3), torch.randn(4, 3)]
    kept = copy.deepcopy(data)
    walker = walker_for(model, data)
    state = torch.random.get_rng_state()
    found = reach(walker, sites_of(walker)[0])
    assert torch.equal(found.inputs[0], found.float_inputs[0])
    with torch.random.fork_rng([]):
        torch.manual_seed(99)
        assert torch.equal(found.inputs[1], reach(walker, sites_of(walker)[0]).inputs[1])
    assert model.count.item() == 0
    assert torch.equal(model.last, torch.zeros(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(data, kept, strict=True))
    assert not model.training


def test_captured_tensors_are_own_copies_handed_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomized(nn.Sequential(nn.Linear(3, 3)))
    x = torch.randn(2, 3)
    kept: list[Tensor] = []
    store = plenty()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    monkeypatch.setattr(store, "keep", keep)
    mask = torch.ones(2, 3)
    walker = replayed(model, Batches([x], [mask]), store)
    found = reach(walker, sites_of(walker)[0])
    assert len(kept) == 3
    assert found.masks == [mask]
    assert all(tensor.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() for tensor in kept)


def test_a_models_own_exception_handler_does_not_swallow_the_early_stop() -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.finished = 0

        def forward(self, x: Tensor) -> Tensor:
            try:
                x = self.layer(x)
            except Exception:
                x = x * 0
            self.finished += 1
            return x

    model = Careful()
    walker = walker_for(model, [torch.randn(2, 3)])
    assert model.finished == 1
    assert len(reach(walker, sites_of(walker)[0]).inputs) == 1
    assert model.finished == 1


def test_a_failing_forward_names_the_microbatch_and_restores_the_weights() -> None:
    model = randomized(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    good, bad = torch.randn(2, 3), torch.randn(2, 4)
    with pytest.raises(InputError, match=r"forward failed on microbatch 0: RuntimeError"):
        walker_for(model, [bad])
    batches = Batches([good, good])
    walker = replayed(model, batches)
    batches.tensors[1] = bad
    weight = rounded(model[0].weight.detach())
    commit(walker, sites_of(walker)[0], weight)
    with pytest.raises(InputError, match=r"forward failed on microbatch 1: RuntimeError") as caught:
        reach(walker, sites_of(walker)[1])
    assert "\n" not in str(caught.value)
    assert torch.equal(model[0].weight, weight)
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model)
