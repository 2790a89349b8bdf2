"""Whole jobs on directories with pictures and recordings: the bytes of a job on the arrays that the processor makes of
the same files, written out here, on one rank and on two."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import transformers
from PIL import Image
from rank_pool import RankPool

from distributed_adaround.files.job_file import load_spec
from distributed_adaround.job import run_job

# What the libraries warn about is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
SAMPLES = 5


def vit(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A model and pictures of several sizes; returns what the model gets of them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=3)
    transformers.set_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "model")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "model")
    draw, rows = np.random.default_rng(0), []
    for index in range(SAMPLES):
        picture = Image.fromarray(draw.integers(0, 256, (40 + index, 50, 3), dtype=np.uint8))
        picture.save(folder / "data" / f"{index}.png")
        rows.append(processor(picture, return_tensors="np")["pixel_values"][0])
    return {"pixel_values": np.stack(rows).astype(np.float32)}


def whisper(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A model of 2 s of sound, and recordings of several lengths; returns what the model gets of them."""
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 1}
    widths = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "num_mel_bins": 8, "vocab_size": 40}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = transformers.WhisperConfig(**heads, **widths, **tokens, max_source_positions=100, max_target_positions=8)
    transformers.set_seed(0)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(folder / "model")
    extractor = transformers.WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    extractor.save_pretrained(folder / "model")
    draw, rows = np.random.default_rng(0), []
    for index in range(SAMPLES):
        sound = draw.uniform(-0.5, 0.5, 16_000 + 1_000 * index).astype(np.float32)
        soundfile.write(folder / "data" / f"{index}.wav", sound, 16_000, subtype="FLOAT")
        rows.append(extractor(sound, sampling_rate=16_000, return_tensors="np")["input_features"][0])
    return {"input_features": np.stack(rows), "decoder_input_ids": np.full((SAMPLES, 1), 3)}


def job(folder: Path, out: str, **data: Any) -> Path:
    content = {
        "model": {"hf": str(folder / "model")},
        "data": {"microbatch_size": 2, **data},
        "quantize": {"dtype": "int4"},
        "rounding": {"solver": "gram", "sweeps": 2, "starts": 1},
        "output": {"uri": str(folder / out)},
        "runtime": {"device": "cpu", "threads": 1},
    }
    path = folder / f"{out}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def run(path: str) -> list[str]:
    return [row.name for row in run_job(load_spec(path))]


@pytest.mark.parametrize(("make", "section"), [(vit, "images"), pytest.param(whisper, "audio", marks=pytest.mark.slow)])
def test_files_and_their_arrays_give_the_same_bytes(
    make: Callable[[Path], dict[str, Any]], section: str, tmp_path: Path, pool: RankPool
) -> None:
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "arrays.npz", **make(tmp_path))
    files: dict[str, Any] = {"uri": str(tmp_path / "data"), section: {}}
    names = run(str(job(tmp_path, "one", **files)))
    assert len(names) > 6
    assert run(str(job(tmp_path, "arrays", uri=str(tmp_path / "arrays.npz")))) == names
    assert pool.run(run, 2, str(job(tmp_path, "two", **files))) == [names, names]
    expected = (tmp_path / "arrays" / "quantized.safetensors").read_bytes()
    for out in ("one", "two"):
        assert (tmp_path / out / "quantized.safetensors").read_bytes() == expected, out
