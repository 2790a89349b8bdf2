"""Models of the transformers library as their users have them: through `quantize`, and in a job file with a factory."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sample_jobs import texts, write_job
from torch import Tensor, nn

from distributed_adaround import cli, quantize

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 20}
FACTORY = f"""
import torch
from transformers import BertConfig, BertModel

def build():
    torch.manual_seed(0)
    return BertModel(BertConfig(**{SIZES!r})).eval()
"""


def token_batches(folder: Path) -> list[dict[str, Tensor]]:
    stored = np.load(texts(folder / "texts.npz", num_samples=12))
    whole = {name: torch.from_numpy(stored[name]) for name in ("input_ids", "attention_mask")}
    return [{name: tensor[first : first + 4] for name, tensor in whole.items()} for first in (0, 4, 8)]


def linears(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.weight.detach().clone() for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }


def test_a_decoder_keeps_its_cache_and_generates(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=1, tie_word_embeddings=True, pad_token_id=0)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = token_batches(tmp_path)
    quantized, table = quantize(model, batches, dtype="int4", solver="gram", sweeps=5, progress=False)
    projections = [name for name in linears(model) if name != "lm_head"]
    assert len(projections) == 7
    assert sorted(row.name for row in table) == sorted(projections)
    assert all(row.solver == "gram" and row.hard_error <= row.nearest_error for row in table)
    before, after = linears(model), linears(quantized)
    for name in projections:
        assert not torch.equal(after[name], before[name])
        assert all(len(row.unique()) <= 16 for row in after[name]), name
    # The output layer is the embedding still.
    assert quantized.lm_head.weight is quantized.model.embed_tokens.weight
    assert torch.equal(after["lm_head"], before["lm_head"])
    assert quantized.config.use_cache
    tokens = batches[0]["input_ids"][:1, :2]
    found = quantized.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False)
    without = quantized.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3, do_sample=False, use_cache=False
    )
    assert torch.equal(found, without)
    assert found.shape == (1, 5)


def test_an_encoder_in_a_job_file(tmp_path: Path) -> None:
    path = write_job(
        tmp_path,
        "attention",
        model={"factory": "encoder:build"},
        quantize={"dtype": "int4", "observer": "minmax"},
        rounding={"solver": "gram", "sweeps": 5},
    )
    (tmp_path / "encoder.py").write_text(FACTORY, encoding="utf-8")
    assert cli.main([str(path)]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["notes"] == []
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(**SIZES)).eval()
    before = linears(model)
    (inputs, *_) = token_batches(tmp_path)
    with torch.no_grad():
        wanted = model(**inputs).last_hidden_state
    assert {layer["name"] for layer in report["layers"]} <= before.keys()
    # The pooler is beside the path to the output, not on it, and is rounded like the others.
    assert len(report["layers"]) == len(before) == 6 + 1
    model.load_state_dict(safetensors.torch.load_file(tmp_path / "out" / "dequantized.safetensors"))
    for name, weight in linears(model).items():
        assert not torch.equal(weight, before[name])
        assert all(len(row.unique()) <= 16 for row in weight), name
    with torch.no_grad():
        found = model(**inputs).last_hidden_state
    keep = inputs["attention_mask"] != 0
    error = (found - wanted)[keep].square().mean() / wanted[keep].square().mean()
    assert 0 < error < 0.02
