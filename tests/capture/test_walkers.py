"""All kinds of microbatches and all ranks decide on the walker; models and data stay as they were."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from torch import Tensor, nn
from walks import plenty, sites_of

from distributed_adaround import quantize
from distributed_adaround.capture import walkers
from distributed_adaround.capture.forward import undisturbed
from distributed_adaround.capture.graph_walk import GraphWalker
from distributed_adaround.capture.replay_walk import ReplayWalker
from distributed_adaround.capture.walkers import make_walker
from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.errors import InputError
from distributed_adaround.runtime.comm import SoloComm

QUICK: dict[str, Any] = {"dtype": "int4", "solver": "nearest", "progress": False}


class Model(nn.Module):
    """`forward` from outside, and the layers that it may use."""

    def __init__(self, function: Any, *widths: int) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.c, self.o = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def by_length(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x))
    return m.o(torch.relu(m.b(h) if x.shape[1] > 8 else m.c(h)))


def by_samples(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x))
    return m.o(torch.relu(m.b(h) if len(x) > 3 else m.c(h)))


def by_rank(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x))
    return m.o(torch.relu(m.b(h) if x.dim() > 2 else m.c(h)))


def by_single(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x))
    return m.o(torch.relu(m.b(h) if x.shape[1] == 1 else m.c(h)))


def by_values(m: Any, x: Tensor) -> Tensor:
    h = torch.relu(m.a(x))
    y = torch.zeros_like(h)
    for sign, expert in enumerate((m.b, m.c)):
        rows = ((x[:, 0] > 0).long() == sign).nonzero().flatten()
        if rows.numel():
            y[rows] = expert(h[rows])
    return m.o(y)


def signed() -> list[Tensor]:
    first = torch.randn(12, 8)
    first[:, 0] = first[:, 0].abs()
    return [first, torch.randn(12, 8), torch.randn(12, 8)]


CASES: dict[str, tuple[Any, Any]] = {
    "length": (by_length, lambda: [torch.randn(6, n, 8) for n in (4, 6, 12)]),
    "length, first": (by_length, lambda: [torch.randn(6, n, 8) for n in (12, 6, 4)]),
    "samples": (by_samples, lambda: [torch.randn(n, 5, 8) for n in (6, 6, 2)]),
    "rank": (by_rank, lambda: [torch.randn(6, 5, 8), torch.randn(6, 8)]),
    "size of 1": (by_single, lambda: [torch.randn(6, n, 8) for n in (1, 3, 5)]),
    "values": (by_values, signed),
}


def case(kind: str) -> tuple[Model, list[Tensor]]:
    torch.manual_seed(0)
    function, data = CASES[kind]
    return Model(function).eval(), data()


def left_in_float(model: nn.Module, quantized: nn.Module) -> list[str]:
    others = dict(quantized.named_parameters())
    return [name for name, p in model.named_parameters() if p.dim() > 1 and torch.equal(p, others[name])]


@pytest.mark.parametrize("kind", CASES)
def test_branches_of_all_kinds_are_quantized(kind: str) -> None:
    model, data = case(kind)
    quantized, _ = quantize(model, data, **QUICK)
    assert left_in_float(model, quantized) == []


def on_a_rank(kind: str, sharded: bool) -> dict[str, Tensor]:
    """The same model and data in every process; sharded: dealt in another way than by turns."""
    model, data = case(kind)
    if sharded:
        data = data[:1] if dist.get_rank() == 0 else data[1:]
    return dict(quantize(model, data, **{**QUICK, "solver": "gram"}, sharded=sharded).model.state_dict())


@pytest.mark.parametrize(
    ("kind", "sharded"),
    [("length", False), pytest.param("length", True, marks=pytest.mark.slow), ("values", True), ("samples", True)],
)
def test_ranks_agree_on_the_walker_and_learn_what_one_rank_learns(pool: RankPool, kind: str, sharded: bool) -> None:
    model, data = case(kind)
    quantized = quantize(model, data, **{**QUICK, "solver": "gram"}).model
    assert left_in_float(model, quantized) == []
    alone = quantized.state_dict()
    for found in pool.run(on_a_rank, 2, kind, sharded):
        assert all(torch.equal(found[name], tensor) for name, tensor in alone.items())


def walker_of(model: Any, data: list[Any]) -> Any:
    model = model.eval() if isinstance(model, nn.Module) else model
    return make_walker(model, Microbatches.of_list(data, SoloComm(), sharded=False), plenty(), SoloComm())


def test_one_check_for_each_kind_of_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    original = walkers._check_same_output

    def check(model: Any, graph: Any, inputs: Any, index: int) -> None:
        checked.append(index)
        original(model, graph, inputs, index)

    monkeypatch.setattr(walkers, "_check_same_output", check)
    data = [torch.randn(n, t, 8) for n, t in ((6, 4), (6, 4), (6, 5), (6, 4), (2, 5), (6, 5))]
    walker = walker_of(Model(lambda m, x: m.o(m.a(x))), data)
    assert isinstance(walker, GraphWalker)
    assert checked == [0, 2, 4]


def test_a_program_refuses_sizes_at_which_its_model_branches() -> None:
    model, data = case("length")
    sizes = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    walker = walker_of(torch.export.export(model, (data[0],), dynamic_shapes={"x": sizes}, strict=False), data)
    with pytest.raises(InputError, match=r"microbatch 2: .* 'x' with sizes 2 to 8 in dimension 1, .* pad or cut"):
        walker.start(Microbatches.of_list(data, SoloComm(), sharded=False))
    walker.start(Microbatches.of_list([*data[:2], torch.randn(1, 4, 8)], SoloComm(), sharded=False))


def test_what_hooks_do_not_reach_is_said() -> None:
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.r = nn.Linear(8, 8), nn.GRU(8, 8, batch_first=True)
            self.m = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.r(self.a(x))[0]
            return self.m(x, x, x)[0] if x.sum() > 0 else self.m(x, x + 1, x)[0]

    reasons = {p.name: p.reason for p in walker_of(Hidden(), [torch.randn(2, 3, 8)]).float_parameters}
    assert reasons["r.weight_hh_l0"] == "torch's GRU computes with it where hooks do not reach"
    assert reasons["m.in_proj_weight"] == "torch's MultiheadAttention computes with it where hooks do not reach"


def in_place(m: Any, x: Tensor) -> Tensor:
    x.mul_(2).add_(1)
    return m.o(torch.relu(m.a(x)))


def in_place_by_hooks(m: Any, x: Tensor) -> Tensor:
    return in_place(m, x) if x.sum() > -1e9 else x


@pytest.mark.parametrize("function", [in_place, in_place_by_hooks])
def test_inputs_and_model_stay_as_the_caller_gave_them(function: Any) -> None:
    torch.manual_seed(0)
    model, data = Model(function), [torch.randn(12, 8) for _ in range(3)]
    before, state = copy.deepcopy(data), copy.deepcopy(model.state_dict())
    walker = walker_of(copy.deepcopy(model), data)
    assert isinstance(walker, ReplayWalker if function is in_place_by_hooks else GraphWalker)
    quantize(model, data, **QUICK)
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    # The model has seen the inputs as given: the same roundings come out as from a model that leaves its input alone.
    pure = Model(lambda m, x: m.o(torch.relu(m.a(x * 2 + 1))))
    pure.load_state_dict(model.state_dict())
    for solver in ("gram", "gptq"):
        ours, theirs = (quantize(m, data, **{**QUICK, "solver": solver}).model for m in (model, pure))
        assert torch.allclose(ours.a.weight, theirs.a.weight)


def test_every_submodules_cache_is_off_inside_and_as_before_afterwards() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    inner = SimpleNamespace(use_cache=True)
    configs = [SimpleNamespace(use_cache=True, text_config=inner), SimpleNamespace(use_cache=True), SimpleNamespace()]
    for module, config in zip(model, configs, strict=True):
        module.config = config
    model.generation_config = SimpleNamespace(use_cache=True)
    with undisturbed(model):
        found = [config.use_cache for config in (*configs[:2], inner, model.generation_config)]
        assert found == [False] * 4
    assert all(config.use_cache for config in (*configs[:2], inner, model.generation_config))
    assert not hasattr(configs[2], "use_cache")


@pytest.mark.slow
def test_t5_is_exported() -> None:
    """test_architectures.py takes one through a whole job."""
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=20, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config)
    batch = {name: torch.randint(20, (3, 6)) for name in ("input_ids", "decoder_input_ids")}
    walker = walker_of(model, [batch])
    assert isinstance(walker, GraphWalker), walker.notes
    assert model.decoder.config.use_cache
    assert len(sites_of(walker)) == 16


def test_torchs_transformers_are_seen_through_their_fast_paths() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 1)
            self.decoder = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)
            self.other = nn.MultiheadAttention(16, 2, kdim=8, vdim=4, batch_first=True)
            self.third = nn.MultiheadAttention(16, 2, kdim=8, vdim=4, batch_first=True)

        def forward(self, x: Tensor, pad: Tensor, k: Tensor, v: Tensor) -> Tensor:
            x = self.decoder(x, self.encoder(x, src_key_padding_mask=pad))
            x = self.other(x, k, v, need_weights=True)[0]
            return self.third(x, k, v, need_weights=False)[0]

    torch.manual_seed(0)
    pad = torch.zeros(4, 10, dtype=torch.bool)
    pad[:, 7:] = True
    batches = [
        {"x": torch.randn(4, 10, 16), "pad": pad, "k": torch.randn(4, 5, 8), "v": torch.randn(4, 5, 4)} for _ in "12"
    ]
    model = Padded()
    quantized, _ = quantize(model, batches, **QUICK)
    assert left_in_float(model, quantized) == []
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_failed_export_says_so_in_one_line(tmp_path: Path) -> None:
    """On the real stderr of a process: torch prints the graph, and logs tracebacks."""
    script = tmp_path / "job.py"
    script.write_text(
        "import torch\nfrom torch import nn\nfrom distributed_adaround import quantize\n"
        "class M(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.l = nn.Linear(4, 4), nn.LSTM(4, 4)\n"
        "    def forward(self, x):\n"
        "        rows = (x[:, 0] > 0).nonzero().flatten()\n"
        "        return self.l(self.a(x[rows] if rows.numel() else x))[0]\n"
        "quantize(M(), [torch.randn(8, 4)], dtype='int4', solver='nearest', progress=False)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line]
    assert lines[0].startswith("could not be exported: GuardOnDataDependentSymNode")
    assert len(lines[0]) < 300
    assert not any("graph" in line or "Traceback" in line or "_flat_weights" in line for line in lines[1:]), lines
    assert logging.root.manager.disable == logging.NOTSET
