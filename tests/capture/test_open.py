"""Which walker a model gets, what falls back and says so, and which layers are planned."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_batches import Batches
from walks import commit, plenty, reach, sites_of

from distributed_adaround.capture import walkers
from distributed_adaround.capture.activation_store import ActivationStore
from distributed_adaround.capture.exported import export_model
from distributed_adaround.capture.graph_walk import GraphWalker
from distributed_adaround.capture.open import CapturedModel, plan_layers
from distributed_adaround.capture.replay_walk import ReplayWalker
from distributed_adaround.capture.sites import Walker
from distributed_adaround.capture.walkers import make_walker
from distributed_adaround.data.microbatches import Microbatches, ModelInputs
from distributed_adaround.errors import InputError, SpecError
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.spec.quantize import QuantizeSpec

CPU = torch.device("cpu")


class Calling(nn.Module):
    """Two layers, and a forward from outside."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 4)
        self._function = forward

    def forward(self, x: Tensor) -> Any:
        return self._function(self, x)


def plain(model: Any, x: Tensor) -> Tensor:
    return model.second(model.first(x).relu())


def walker_of(model: Any, *batches: Any) -> Walker:
    """batches: as a caller of `quantize` gives them."""
    model = model.eval() if isinstance(model, nn.Module) else model
    return make_walker(model, Microbatches.of_list(batches, SoloComm(), sharded=False), plenty(), SoloComm())


def one_by_one(model: Any, x: Tensor) -> Tensor:
    return torch.stack([plain(model, row) for row in x])


def branching(model: Any, x: Tensor) -> Tensor:
    return plain(model, x) if x.sum() > 0 else plain(model, -x)


def through_numpy(model: Any, x: Tensor) -> Tensor:
    return plain(model, torch.from_numpy(x.numpy().copy()))


def noisy(model: Any, x: Tensor) -> Tensor:
    return plain(model, x + torch.rand_like(x))


def recurrent(model: Any, x: Tensor) -> Tensor:
    state = torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = model.first(x[:, t] + state).tanh()
    return model.second(state)


FALLBACKS: list[tuple[Any, tuple[int, ...], str]] = [
    (one_by_one, (3, 6), "InputError: its graph only takes batches of 2 samples"),
    (branching, (3, 6), "GuardOnDataDependentSymNode: Could not guard on data-dependent expression"),
    (through_numpy, (3, 6), "numpy"),
    (noisy, (3, 6), "InputError: its exported graph does not compute what the model computes"),
]


def test_a_model_that_exports_is_walked_without_a_note() -> None:
    walker = walker_of(Calling(plain), torch.randn(3, 6))
    assert isinstance(walker, GraphWalker)
    assert list(walker.notes) == []


@pytest.mark.parametrize(("forward", "shape", "reason"), FALLBACKS, ids=[case[0].__name__ for case in FALLBACKS])
def test_a_model_that_does_not_export_is_replayed_with_a_note(
    forward: Any, shape: tuple[int, ...], reason: str
) -> None:
    walker = walker_of(Calling(forward), torch.randn(shape))
    assert isinstance(walker, ReplayWalker)
    (note,) = walker.notes
    assert note.startswith("could not be exported: ")
    assert reason in note
    assert "\n" not in note
    assert [site.name for site in sites_of(walker)] == ["first", "second"]


def test_a_length_that_is_baked_in_is_found_with_the_other_microbatch() -> None:
    short, long = torch.randn(3, 4, 6), torch.randn(2, 5, 6)
    assert isinstance(walker_of(Calling(recurrent), short), GraphWalker)
    assert isinstance(walker_of(Calling(recurrent), short, torch.randn(1, 4, 6)), GraphWalker)
    walker = walker_of(Calling(recurrent), short, long)
    assert isinstance(walker, ReplayWalker)


@pytest.mark.parametrize("forward", [one_by_one, through_numpy])
def test_replay_gives_what_the_graph_gives(forward: Any) -> None:
    reference, model = Calling(plain), Calling(forward)
    model.load_state_dict(reference.state_dict())
    data = [torch.randn(3, 6), torch.randn(2, 6)]
    walkers = walker_of(reference, *data), walker_of(model, *data)
    assert [type(walker) for walker in walkers] == [GraphWalker, ReplayWalker]
    for walker in walkers:
        walker.start(Batches(data))
    for sites in zip(*(sites_of(walker) for walker in walkers), strict=True):
        assert sites[0].weight_name == sites[1].weight_name
        found = [reach(walker, site) for walker, site in zip(walkers, sites, strict=True)]
        if forward is one_by_one:
            # Replay brings one batch for each call, which sees one sample.
            assert found[1].indices == [0, 1, 2, 3, 4]
            for name in ("inputs", "float_inputs", "float_outputs"):
                rows = [row for whole in getattr(found[0], name) for row in whole]
                for row, call in zip(rows, getattr(found[1], name), strict=True):
                    torch.testing.assert_close(row, call)
        else:
            for name in ("inputs", "float_inputs", "float_outputs"):
                for one, other in zip(*(getattr(each, name) for each in found), strict=True):
                    torch.testing.assert_close(one, other)
            assert found[0].indices == found[1].indices
            assert found[0].batch_sizes == found[1].batch_sizes
        for walker, site in zip(walkers, sites, strict=True):
            commit(walker, site, torch.round(walker.tensor(site.weight_name) * 4) / 4)
    for one, other in zip(*(list(walker.finish()) for walker in walkers), strict=True):
        assert one[0] == other[0]
        torch.testing.assert_close(one[1:], other[1:])


def test_errors_of_our_own_are_not_taken_for_a_failed_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setattr(walkers, "capture", broken)
    with pytest.raises(KeyError, match="a bug of ours"):
        walker_of(Calling(plain), torch.randn(3, 6))


def test_a_forward_that_fails_is_an_input_error() -> None:
    with pytest.raises(InputError, match="forward failed on microbatch 0"):
        walker_of(Calling(plain), torch.randn(3, 7))


def test_a_program_is_walked_as_it_is() -> None:
    model = Calling(plain).eval()
    x = torch.randn(3, 6)
    walker = walker_of(export_model(model, ModelInputs((x,), {})), x)
    assert isinstance(walker, GraphWalker)
    assert walker.tensor("first.weight").data_ptr() == model.first.weight.data_ptr()


def test_rows_that_are_not_a_number_in_both_are_no_difference() -> None:
    walker = walker_of(Calling(lambda m, x: plain(m, x) * (x[:, :1] > 0) / (x[:, :1] > 0)), torch.randn(8, 6))
    assert isinstance(walker, GraphWalker)


def test_a_cache_that_only_the_model_returns_is_no_difference() -> None:
    def forward(model: Any, x: Tensor) -> Any:
        y = plain(model, x)
        return {"cache": x * 2, "y": y} if model.config.use_cache else {"y": y}

    model = Calling(forward)
    model.config = SimpleNamespace(use_cache=True)
    assert isinstance(walker_of(model, torch.randn(3, 6)), GraphWalker)
    assert model.config.use_cache


def test_a_transformer_with_a_cache_and_hidden_states_is_walked() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, intermediate_size=24,
        vocab_size=20, output_hidden_states=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    walker = walker_of(model, torch.randint(20, (3, 6)), torch.randint(20, (1, 4)))
    assert isinstance(walker, GraphWalker), walker.notes


def test_planned_layers_have_the_format_that_matches_them() -> None:
    walker = walker_of(Calling(plain), torch.randn(3, 6))
    quantize = QuantizeSpec(dtype="int4", overrides=[{"match": "second", "dtype": "uint3"}], ignore=["re:fir"])
    planned = plan_layers(walker, quantize, {})
    assert [layer.unit.site.name for layer in planned] == ["first", "second"]
    assert planned[0].format is None
    assert planned[1].format is not None
    assert str(planned[1].format) == "uint3 per_channel_symmetric"
    captured = CapturedModel(walker, tuple(planned), ActivationStore(CPU, device_budget=0, host_budget=0), "")
    left = {parameter.name: parameter.reason for parameter in captured.float_parameters}
    assert left == {"first.bias": "bias", "second.bias": "bias", "first.weight": "ignored by quantize.ignore"}


def test_plans_that_cannot_be(caplog: pytest.LogCaptureFixture) -> None:
    walker = walker_of(Calling(plain), torch.randn(3, 6))
    with pytest.raises(SpecError, match=r"group_size: 4 must divide the 6 inputs .* layer .?first"):
        plan_layers(walker, QuantizeSpec(qscheme="per_group_symmetric", group_size=4), {})
    with pytest.raises(InputError, match="none of the model's 2 linear and convolution layers"):
        plan_layers(walker, QuantizeSpec(ignore=["Linear"]), {})
    with caplog.at_level(logging.WARNING):
        plan_layers(walker, QuantizeSpec(ignore=["third"]), {})
    assert "'third' matches no layer" in caplog.text
    nothing = walker_of(nn.Sequential(nn.LayerNorm(6)), torch.randn(3, 6))
    with pytest.raises(InputError, match="none of the model's 0"):
        plan_layers(nothing, QuantizeSpec(), {})
