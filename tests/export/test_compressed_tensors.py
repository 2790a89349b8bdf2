"""Directories as compressed-tensors: codes compared with what was solved, read by hand and by transformers."""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from architectures import ARCHITECTURES
from export_tasks import finished
from torch import Tensor

from distributed_adaround.errors import SpecError
from distributed_adaround.export.compressed_tensors import CompressedTensorsExporter
from distributed_adaround.export.exporter import ExportTask
from distributed_adaround.export.huggingface import HuggingFaceExporter
from distributed_adaround.export.verify import Verified, verify
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.model.huggingface import open_huggingface
from distributed_adaround.spec.model import ModelSpec

# What the libraries warn about is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

LEFT = ["Conv1d", "Conv2d"]
# Fields that compressed-tensors 0.17 knows, which vLLM 0.33 pins; it refuses others.
CONFIG_FIELDS = {"config_groups", "quant_method", "kv_cache_scheme", "format", "quantization_status",
                 "global_compression_ratio", "ignore", "version"}  # fmt: skip
ARGUMENT_FIELDS = {"num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
                   "scale_dtype", "zp_dtype", "observer", "observer_kwargs"}  # fmt: skip


def exported(
    folder: Path,
    name: str,
    quantize: dict[str, Any],
    exporter: type = CompressedTensorsExporter,
    shard_size: str = "50GB",
    dtype: str | None = None,
    **output: Any,
) -> ExportTask:
    """A tiny random model from its directory, rounded with codes that are not the nearest, and written again."""
    architecture = ARCHITECTURES[name]
    architecture.build().save_pretrained(folder / "model", max_shard_size=shard_size)
    spec = ModelSpec(hf=str(folder / "model"), dtype=dtype)
    opened = open_huggingface(spec, None, LocalFiles(folder / "files"))
    one = exporter()
    formats = {HuggingFaceExporter: "huggingface"}.get(exporter, "compressed_tensors")
    output |= {"formats": [formats]}
    inputs = {
        key: value.to(opened.dtype) if value.is_floating_point() else value
        for key, value in architecture.inputs().items()
    }
    # Llama has nothing but linear layers.
    task = finished(folder, opened, [inputs], one, quantize, output, spec, folder / "model", name != "Llama")
    one.write(task, task.output.uri)
    return task


def written(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of all files, and config.json."""
    out = folder / "out" / "compressed_tensors"
    tensors: dict[str, Tensor] = {}
    for path in sorted(out.glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors, json.loads((out / "config.json").read_text(encoding="utf-8"))


def checked(task: ExportTask, exporter: type = CompressedTensorsExporter) -> Verified:
    (found,) = verify(task, [exporter()])
    assert found.ok, found
    return found


def unpacked(words: Tensor, bits: int, columns: int) -> np.ndarray[Any, Any]:
    """Signed codes of rows of int32 words: element i of a row in bits i * b to i * b + b - 1 of a stream."""
    stream = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")[:, : columns * bits]
    values = stream.reshape(len(words), columns, bits).astype(np.int64) @ (1 << np.arange(bits))
    return values - (1 << (bits - 1))


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [
        ("int3", {}),
        ("int4", {"qscheme": "per_group_symmetric", "group_size": 16}),
        ("uint5", {"qscheme": "per_channel_affine"}),
        pytest.param("int2", {}, marks=pytest.mark.slow),
        pytest.param("uint4", {"qscheme": "per_group_affine", "group_size": 16}, marks=pytest.mark.slow),
        pytest.param("int6", {}, marks=pytest.mark.slow),
        pytest.param("quint8", {}, marks=pytest.mark.slow),
    ],
)
def test_integers_lie_where_the_layout_says(dtype: str, fields: dict[str, Any], tmp_path: Path) -> None:
    task = exported(tmp_path, "Llama", {"dtype": dtype, **fields})
    tensors, config = written(tmp_path)
    bits, affine = int(dtype[-1]), "affine" in fields.get("qscheme", "")
    for layer in task.layers:
        record = task.result.record(layer.stored_name)
        module = layer.name
        rows, columns = record.codes.shape
        shift = 0 if record.codes.dtype == torch.int8 else 1 << (bits - 1)
        codes = unpacked(tensors[f"{module}.weight_packed"], bits, columns)
        assert np.array_equal(codes, record.codes.long().numpy() - shift)
        assert torch.equal(tensors[f"{module}.weight_scale"], record.scale.reshape(rows, -1))
        assert tensors[f"{module}.weight_shape"].tolist() == [rows, columns]
        assert f"{module}.weight" not in tensors
        assert (f"{module}.weight_zero_point" in tensors) == affine
        if affine:
            zero_points = unpacked(tensors[f"{module}.weight_zero_point"].T.contiguous(), bits, rows).T
            assert np.array_equal(zero_points, record.zero_point.reshape(rows, -1).numpy() - shift)
    assert config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] == bits
    found = checked(task)
    assert ("dequantize=True" in found.note) == affine
    assert bool(CompressedTensorsExporter().notes(task)) == affine


@pytest.mark.parametrize(
    ("dtype", "model_dtype", "form"),
    [
        ("nvfp4", "bfloat16", "nvfp4-pack-quantized"),
        pytest.param("nvfp4", None, "nvfp4-pack-quantized", marks=pytest.mark.slow),
        pytest.param("fp8", None, "naive-quantized", marks=pytest.mark.slow),
        pytest.param("fp8", "bfloat16", "naive-quantized", marks=pytest.mark.slow),
        pytest.param("mxfp4", "bfloat16", "mxfp4-pack-quantized", marks=pytest.mark.slow),
        pytest.param("mxfp8", "bfloat16", "mxfp8-quantized", marks=pytest.mark.slow),
    ],
)
def test_floats_come_back_exactly(dtype: str, model_dtype: str | None, form: str, tmp_path: Path) -> None:
    # Blocks of 32 do not divide the inner width of the tiny model.
    quantize = {"dtype": dtype, "ignore": ["re:.*down_proj"] if dtype.startswith("mx") else []}
    task = exported(tmp_path, "Llama", quantize, dtype=model_dtype)
    tensors, config = written(tmp_path)
    assert config["quantization_config"]["format"] == form
    checked(task)
    if dtype == "nvfp4":
        layer = task.layers[0]
        record = task.result.record(layer.stored_name)
        # The runtime divides by it, and ours multiplies.
        factor = tensors[f"{layer.name}.weight_global_scale"]
        assert factor.tolist() == [1 / record.format["tensor_scale"]]
        assert tensors[f"{layer.name}.weight_scale"].dtype == torch.float8_e4m3fn
        assert torch.equal(tensors[f"{layer.name}.weight_scale"].float() / factor, record.scale)
    if model_dtype is not None:
        assert config.get("dtype", config.get("torch_dtype")) == model_dtype


def test_scales_are_solved_in_the_precision_in_which_they_are_stored(tmp_path: Path) -> None:
    task = exported(tmp_path, "Llama", {"dtype": "int4"}, dtype="bfloat16")
    tensors, config = written(tmp_path)
    assert {layer.format["scale_format"] for layer in task.layers} == {"bfloat16"}
    scales = [tensor for name, tensor in tensors.items() if name.endswith("weight_scale")]
    assert {tensor.dtype for tensor in scales} == {torch.bfloat16}
    assert set(config["quantization_config"]) == CONFIG_FIELDS
    arguments = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert set(arguments) <= ARGUMENT_FIELDS
    # The head stays in float, and every runtime must know.
    assert "lm_head" in config["quantization_config"]["ignore"]
    checked(task)


def test_experts_are_stored_one_by_one_under_their_names_in_the_checkpoint(tmp_path: Path) -> None:
    task = exported(tmp_path, "Mixtral", {"dtype": "int4", "qscheme": "per_group_symmetric", "group_size": 16})
    tensors, config = written(tmp_path)
    before = safetensors.torch.load_file(tmp_path / "model" / "model.safetensors")
    packed = {name.removesuffix("_packed") for name in tensors if name.endswith("weight_packed")}
    assert {name for name in before if ".experts." in name} <= packed <= before.keys()
    assert not any("gate_up_proj" in name for name in tensors)
    # w1 and w3 of an expert are the halves of one weight of the model.
    record = task.result.record("model.layers.0.mlp.experts.gate_up_proj[1]")
    block = "model.layers.0.block_sparse_moe.experts.1"
    halves = [unpacked(tensors[f"{block}.{name}.weight_packed"], 4, 32) for name in ("w1", "w3")]
    assert np.array_equal(np.concatenate(halves), record.codes.numpy())
    ignored = config["quantization_config"]["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate", "model.layers.0.block_sparse_moe.gate"} <= set(ignored)
    checked(task)


def test_several_formats_in_one_model(tmp_path: Path) -> None:
    more = [{"match": "re:.*down_proj", "dtype": "int8"}, {"match": "re:.*o_proj", "dtype": "fp8"}]
    task = exported(tmp_path, "Llama", {"dtype": "int4", "overrides": more})
    _, config = written(tmp_path)
    found = config["quantization_config"]
    assert found["format"] == "mixed-precision"
    first, *others = found["config_groups"].values()
    assert (first["targets"], first["weights"]["num_bits"], first["format"]) == (["Linear"], 4, "pack-quantized")
    named = {other["format"]: other["targets"] for other in others}
    assert named == {
        "pack-quantized": ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"],
        "naive-quantized": ["model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"],
    }
    # With dequantize=True transformers would read all layers by the first format.
    (note,) = CompressedTensorsExporter().notes(task)
    assert "load several formats without" in note
    checked(task)


def test_fp8_with_activations_that_runtimes_quantize(tmp_path: Path) -> None:
    task = exported(tmp_path, "Llama", {"dtype": "fp8"}, dynamic_activations=True)
    _, config = written(tmp_path)
    group = config["quantization_config"]["config_groups"]["group_0"]
    assert group["format"] == "float-quantized"
    assert (group["input_activations"]["strategy"], group["input_activations"]["dynamic"]) == ("token", True)
    found = checked(task)
    assert found.output_error is not None
    assert 0 < found.output_error < found.tolerance
    assert found.note == "activations are fp8 too"


@pytest.mark.parametrize("exporter", [HuggingFaceExporter, CompressedTensorsExporter])
def test_shards_are_those_of_the_input_and_all_files_come_along(exporter: type, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.model").write_bytes(b"words")
    (tmp_path / "model" / "code.py").write_text("raise SystemExit")
    task = exported(tmp_path, "Llama", {"dtype": "int4"}, exporter, shard_size="20KB")
    source, target = tmp_path / "model", tmp_path / "out" / exporter.files[0]
    names = {path.name for path in source.iterdir()} - {"code.py"}
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    assert {path.name for path in target.iterdir()} == names
    for path in source.glob("*.safetensors"):
        before, after = (set(safetensors.torch.load_file(folder / path.name)) for folder in (source, target))
        parts = {name.replace("weight_packed", "weight") for name in after if not name.endswith(("_scale", "_shape"))}
        assert parts == before
    index = json.loads((target / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        assert name in safetensors.torch.load_file(target / file)
    held = [safetensors.torch.load_file(path) for path in target.glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for part in held for tensor in part.values())
    assert sum(map(len, held)) == len(index["weight_map"])
    checked(task, exporter)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "quantize", "note"),
    [
        ("Qwen3", {"dtype": "int4"}, ""),
        ("Qwen3-MoE", {"dtype": "int4"}, ""),
        ("DeepSeek-V3", {"dtype": "int4"}, ""),
        ("Mixtral", {"dtype": "fp8"}, ""),
        ("BERT", {"dtype": "int4"}, ""),
        ("T5", {"dtype": "int4"}, "dequantize=True"),
        ("Whisper", {"dtype": "int4", "ignore": LEFT}, ""),
        ("ViT", {"dtype": "int4", "ignore": LEFT}, ""),
        ("ConvNeXt", {"dtype": "int4", "ignore": LEFT}, ""),
        ("ResNet", {"dtype": "int4", "ignore": LEFT}, "dequantize=True"),
        ("CLIP", {"dtype": "int4", "ignore": LEFT}, ""),
        ("Phi-3", {"dtype": "int4"}, ""),
        ("Gemma 3", {"dtype": "int4"}, ""),
    ],
)
def test_models_load_again(name: str, quantize: dict[str, Any], note: str, tmp_path: Path) -> None:
    found = checked(exported(tmp_path, name, quantize))
    assert note in found.note
    assert bool(found.note) == bool(note)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM, which pins another torch")
def test_vllm_writes_the_same_words(tmp_path: Path) -> None:
    task = exported(tmp_path, "Llama", {"dtype": "int4", "qscheme": "per_group_symmetric", "group_size": 16})
    vllm = importlib.import_module("vllm")
    folder = str(tmp_path / "out" / "compressed_tensors")
    engine = vllm.LLM(model=folder, skip_tokenizer_init=True, dtype="float32", enforce_eager=True)
    tokens = torch.randint(3, 96, (4, 6), generator=torch.Generator().manual_seed(0))
    prompts = [{"prompt_token_ids": row} for row in tokens.tolist()]
    found = engine.generate(prompts, vllm.SamplingParams(temperature=0, max_tokens=1, detokenize=False))
    model = task.model()
    assert isinstance(model, torch.nn.Module)
    expected = model(input_ids=tokens).logits[:, -1].argmax(dim=-1).tolist()
    assert [one.outputs[0].token_ids[0] for one in found] == expected


REFUSED = [
    ("Llama", {"dtype": "int4", "qscheme": "per_tensor_symmetric"}, "per_channel_symmetric"),
    ("Llama", {"dtype": "fp4"}, "dtype: mxfp4 or nvfp4"),
    ("Llama", {"dtype": "fp8", "qscheme": "per_group_symmetric", "group_size": 16}, "per_channel_symmetric"),
    ("ConvNeXt", {"dtype": "int4"}, "Conv2d; add it to quantize.ignore"),
    ("GPT-2", {"dtype": "int4"}, "Conv1D.*add it to quantize.ignore"),
    ("gpt-oss", {"dtype": "int4"}, "a part of 'model.layers.0.mlp.experts.gate_up_proj'"),
    ("Mixtral", {"dtype": "nvfp4"}, "dtype: mxfp4 or int4"),
    ("Mixtral", {"dtype": "uint4", "qscheme": "per_channel_affine"}, "per_channel_symmetric"),
]


@pytest.mark.parametrize(
    ("name", "quantize", "words"),
    [pytest.param(*case, marks=[] if case[0] == "Llama" else pytest.mark.slow) for case in REFUSED],
)
def test_what_the_format_cannot_hold_is_refused(
    name: str, quantize: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(SpecError, match=words):
        exported(tmp_path, name, quantize)
    assert not (tmp_path / "out").exists()


def test_scales_finer_than_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"these are float32; set quantize\.scale_dtype: bfloat16, or none"):
        exported(tmp_path, "Llama", {"dtype": "int4", "scale_dtype": "float32"}, dtype="bfloat16")


def test_a_missing_library_is_told_before_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.startswith("compressed_tensors"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return find(name, package)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(SpecError, match=r"pip install 'distributed_adaround\[compressed-tensors\]'"):
        exported(tmp_path, "Llama", {"dtype": "int4"})
