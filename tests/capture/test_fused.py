"""Layers that serving engines run as one matrix: what is refused, what shares a scale, what stays in float."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file
from torch import nn
from walks import plenty

from distributed_adaround.capture.open import PlannedUnit, head_names, plan_layers
from distributed_adaround.capture.sites import Walker
from distributed_adaround.capture.walkers import make_walker
from distributed_adaround.data.microbatches import Microbatches
from distributed_adaround.errors import SpecError
from distributed_adaround.export.codes import read_codes
from distributed_adaround.job import run_job
from distributed_adaround.runtime.comm import SoloComm
from distributed_adaround.spec.job import JobSpec
from distributed_adaround.spec.quantize import QuantizeSpec

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
# Largest value of E2M1 times the largest of E4M3.
LARGEST = 6 * 448


class Captured:
    """A model and the walk through it, of which plans are made."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = model
        batches = Microbatches.of_list([inputs], SoloComm(), sharded=False)
        self.walker: Walker = make_walker(model, batches, plenty(), SoloComm())
        self.names = [unit.name for unit in self.walker.units]

    def plan(self, **quantize: Any) -> dict[str, PlannedUnit]:
        classes = {name: type(module).__name__ for name, module in self.model.named_modules()}
        planned = plan_layers(self.walker, QuantizeSpec(**quantize), classes, head_names(self.model))
        return {layer.unit.name: layer for layer in planned}

    def formats(self, **quantize: Any) -> dict[str, str | None]:
        return {name: layer.format and layer.format.number.name for name, layer in self.plan(**quantize).items()}

    def largest(self, *names: str) -> float:
        return max(float(self.model.get_submodule(name).weight.abs().max()) for name in names)


def captured(architecture: str) -> Captured:
    """With one block."""
    whole = ARCHITECTURES[architecture]
    found = replace(whole, fields={**whole.fields, "num_hidden_layers": 1})
    return Captured(found.build(), found.inputs())


@pytest.fixture(scope="module")
def llama() -> Captured:
    return captured("Llama")


def override(*names: str, **fields: Any) -> dict[str, Any]:
    return {"match": list(names)} | fields


def projections(*letters: str) -> list[str]:
    return [f"{ATTENTION}.{letter}_proj" for letter in letters]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"overrides": [override(f"{ATTENTION}.k_proj", dtype="int8")]},
            ("q_proj' is int4", "k_proj' is int8", "set quantize.fused=ignore"),
        ),
        ({"ignore": [f"{ATTENTION}.v_proj"]}, ("q_proj' is int4", "v_proj' is float", "one matrix")),
        ({"overrides": [override(f"{MLP}.up_proj", quant_min=-7)]}, ("gate_proj' is int4", "up_proj' is int4")),
    ],
)
def test_a_pair_that_differs_is_refused_by_name(
    llama: Captured, fields: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(SpecError) as error:
        llama.plan(dtype="int4", **fields)
    message = str(error.value)
    assert message.startswith("quantize: ")
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert len(llama.plan(dtype="int4", fused="ignore", **fields)) == len(llama.names)


def test_what_runs_alone_or_is_changed_as_a_whole_may_differ(llama: Captured) -> None:
    wide = projections("q", "k", "v")
    overrides = [
        override(*wide[:2], dtype="int8"),
        override(wide[2], dtype="int8"),
        override(f"{MLP}.down_proj", dtype="int2"),
    ]
    formats = llama.formats(dtype="int4", overrides=overrides, ignore=[*projections("o")])
    first = {name: formats[name] for name in llama.names if ".layers.0." in name}
    assert first == {
        **dict.fromkeys(wide, "int8"),
        f"{ATTENTION}.o_proj": None,
        f"{MLP}.gate_proj": "int4",
        f"{MLP}.up_proj": "int4",
        f"{MLP}.down_proj": "int2",
    }
    # Engines do not see how a range was found.
    llama.plan(dtype="int4", overrides=[override(wide[0], observer="percentile", percentile=99.0)])


def test_the_head_stays_in_float_unless_it_is_asked_for(llama: Captured) -> None:
    assert llama.formats(dtype="int4")["lm_head"] is None
    assert "quantize.heads=true" in llama.plan(dtype="int4")["lm_head"].reason
    assert llama.formats(dtype="int4", heads=True)["lm_head"] == "int4"


def test_packed_layers_share_the_factor_of_the_tensor(llama: Captured) -> None:
    planned = llama.plan(dtype="nvfp4", heads=True)
    for together in (projections("q", "k", "v"), [f"{MLP}.gate_proj", f"{MLP}.up_proj"]):
        amax = {planned[name].format.tensor_amax for name in together}
        assert amax == {llama.largest(*together)}
    for alone in (f"{ATTENTION}.o_proj", f"{MLP}.down_proj"):
        assert planned[alone].format.tensor_amax is None
    # A layer whose others are in float, or have no such factor, has its own.
    alone = llama.plan(
        dtype="nvfp4", fused="ignore", overrides=[override(*projections("k"), dtype="int4")], ignore=[f"{MLP}.up_proj"]
    )
    assert alone[f"{ATTENTION}.q_proj"].format.tensor_amax == llama.largest(*projections("q", "v"))
    assert alone[f"{ATTENTION}.k_proj"].format.tensor_amax is None
    assert alone[f"{MLP}.gate_proj"].format.tensor_amax is None


class Crossing(nn.Module):
    """Queries of the rows x; keys and values of a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.q_proj(x) @ self.k_proj(memory).mT @ self.v_proj(memory)
        return found


def test_keys_of_another_input_are_packed_with_their_values_only() -> None:
    torch.manual_seed(0)
    found = Captured(Crossing().eval(), {"x": torch.randn(2, 3, 8), "memory": torch.randn(2, 5, 8)})
    formats = found.formats(dtype="int4", overrides=[override("q_proj", dtype="int8")])
    assert formats == {"q_proj": "int8", "k_proj": "int4", "v_proj": "int4"}
    with pytest.raises(SpecError, match=r"'k_proj' is int4.*, 'v_proj' is int8.*one matrix"):
        found.plan(dtype="int4", overrides=[override("v_proj", dtype="int8")])


def test_all_experts_of_a_block_have_one_format() -> None:
    found = captured("Mixtral")
    experts = [name for name in found.names if ".experts." in name]
    assert [name.rpartition(".")[2] for name in experts] == ["gate_up_proj", "down_proj"]
    assert set(found.formats(dtype="int4").items()) >= {(name, "int4") for name in experts}
    assert found.formats(dtype="int4")["model.layers.0.mlp.gate"] is None
    for name in experts:
        with pytest.raises(SpecError, match=r"experts\.gate_up_proj.* is .*experts\.down_proj.* is .*one matrix"):
            found.plan(dtype="int4", overrides=[override(name, dtype="int8")])
    formats = found.formats(dtype="int4", overrides=[override(*experts, dtype="int8")])
    assert [formats[name] for name in experts] == ["int8", "int8"]


class Decoder(nn.Module):
    """The weights of queries, and of keys and values, are parts of one parameter with inputs of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Linear(16, 16)

    def forward(self, x: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(self.attention(x, memory, memory, need_weights=False)[0])
        return found


def test_parts_of_one_parameter_are_one_matrix() -> None:
    torch.manual_seed(0)
    found = Captured(Decoder().eval(), {"x": torch.randn(3, 5, 16), "memory": torch.randn(3, 4, 16)})
    parts = [name for name in found.names if "in_proj" in name]
    assert [name.partition("[")[2] for name in parts] == ["0:16]", "16:48]"]
    with pytest.raises(SpecError, match=r"\[0:16\]' is int4 .*, '\S*\[16:48\]' is int8 .*one matrix"):
        found.plan(dtype="int4", overrides=[override(f"re:.*{re.escape(parts[1][-7:])}", dtype="int8")])
    planned = found.plan(dtype="nvfp4")
    whole = float(found.model.get_parameter("attention.in_proj_weight").abs().max())
    assert [planned[name].format.tensor_amax for name in parts] == [whole] * 2
    assert planned["last"].format.tensor_amax is None


def test_the_gate_of_a_shared_expert_is_a_router() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = transformers.Qwen2MoeConfig(
        **sizes, **experts, num_key_value_heads=2, intermediate_size=48, shared_expert_intermediate_size=24
    )
    found = Captured(transformers.Qwen2MoeForCausalLM(config).eval(), {"input_ids": torch.randint(3, 96, (3, 6))})
    gate = f"{MLP}.shared_expert_gate"
    formats = found.formats(dtype="int4")
    assert formats[gate] is None
    assert formats[f"{MLP}.gate"] is None
    assert formats[f"{MLP}.shared_expert.up_proj"] == "int4"
    formats = found.formats(dtype="int4", routers=True)
    assert formats[gate] == formats[f"{MLP}.gate"] == "int4"


def test_the_checkpoint_holds_the_shared_factor(tmp_path: Path) -> None:
    hf_directories = pytest.importorskip("hf_directories")
    folder = hf_directories.llama(tmp_path / "model")
    before = load_file(folder / "model.safetensors")
    text = hf_directories.text(tmp_path / "words.txt", 400)
    job = {
        "model": {"hf": str(folder)},
        "data": {"uri": str(text), "text": {"sequence_length": 16}, "microbatch_size": 8},
        "quantize": {"dtype": "nvfp4"},
        "rounding": {"solver": "nearest"},
        "output": {"uri": str(tmp_path / "out")},
    }
    run_job(JobSpec(**job))
    layers = json.loads((tmp_path / "out" / "quantized.json").read_text())["layers"]
    scales = {name.removesuffix(".weight"): layer["tensor_scale"] for name, layer in layers.items()}
    assert set(scales) == {*projections("q", "k", "v", "o"), *(f"{MLP}.{name}_proj" for name in ("gate", "up", "down"))}
    groups = [
        projections("q", "k", "v"),
        projections("o"),
        [f"{MLP}.gate_proj", f"{MLP}.up_proj"],
        [f"{MLP}.down_proj"],
    ]
    for together in groups:
        largest = max(float(before[f"{name}.weight"].abs().max()) for name in together)
        assert [scales[name] for name in together] == [2.0 ** math.ceil(math.log2(largest / LARGEST))] * len(together)
    dequantized = load_file(tmp_path / "out" / "dequantized.safetensors")
    for name, weight in read_codes(str(tmp_path / "out")).items():
        assert torch.equal(weight, dequantized[name]), name
    for name in scales:
        assert (
            0
            < float((dequantized[f"{name}.weight"] - before[f"{name}.weight"]).norm())
            < 0.2 * float(before[f"{name}.weight"].norm())
        )
