"""Exporter `gguf`: blocks against numbers written out here, whole files against the packages gguf and transformers."""

import importlib.util
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_base
import numpy as np
import pytest
import torch
from export_tasks import finished
from gguf_base import small_model
from torch import Tensor, nn

from distributed_adaround.errors import AdaRoundError, InputError, SpecError
from distributed_adaround.export.exporter import ExportTask
from distributed_adaround.export.gguf_blocks import pack
from distributed_adaround.export.gguf_file import GgufExporter
from distributed_adaround.export.verify import outputs_of, verify
from distributed_adaround.numerics.layers import LayerGeometry
from distributed_adaround.solve.record import LayerRecord, format_entries
from distributed_adaround.spec.quantize import QuantizeSpec

pytestmark = pytest.mark.filterwarnings("ignore")

GROUPS: dict[str, Any] = {"qscheme": "per_group_symmetric", "group_size": 32}


def prepared(folder: Path, model: Any, base: Path | None = None, **quantize: Any) -> ExportTask:
    base = gguf_base.write_base(model, folder / "base.gguf") if base is None else base
    batch = {"input_ids": torch.randint(3, 96, (3, 6))}
    output = {"formats": ["gguf"], "base_gguf": str(base)}
    # Only experts and embeddings have to be looked for.
    capture = "Moe" in type(model).__name__ or "embeddings" in quantize
    return finished(folder, model, [batch], GgufExporter(), {**GROUPS, **quantize}, output, capture=capture)


def written(folder: Path, model: Any, **quantize: Any) -> tuple[ExportTask, Path]:
    task = prepared(folder, model, **quantize)
    GgufExporter().write(task, task.output.uri)
    return task, Path(task.output.uri, "gguf", "model.gguf")


def record_of(codes: Tensor, scale: Tensor, dtype: str, low: int | None, high: int | None) -> LayerRecord:
    element = "e2m1" if low is None else None
    return LayerRecord(
        "layer", codes, scale, torch.zeros_like(scale, dtype=torch.int32),
        {"dtype": dtype, "qscheme": "per_group_symmetric", "group_size": 32, "quant_min": low, "quant_max": high,
         "element_format": element, "scale_format": "e8m0" if element else "float16", "tensor_scale": None, "groups": 1,
         "transposed": False},
    )  # fmt: skip


@pytest.mark.parametrize(("kind", "low", "high"), [("Q4_0", -8, 7), ("Q5_0", -16, 15), ("Q8_0", -128, 127)])
def test_blocks_of_integers_hold_every_code(kind: str, low: int, high: int) -> None:
    every = torch.arange(low, high + 1)
    codes = torch.cat([every, every.flip(0)]).repeat(64 // len(every) + 1)[: 2 * 64].reshape(2, 64).to(torch.int8)
    codes[1] = torch.randint(low, high + 1, (64,))
    scale = torch.tensor([[2.0**-24, 0.0371], [1.5, 65504.0]], dtype=torch.float16)
    packed = pack(record_of(codes, scale, f"int{(high - low).bit_length()}", low, high), kind)
    weights = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])
    expected = codes.reshape(2, 2, 32).double() * scale.double()[..., None]
    assert np.array_equal(weights.astype(np.float64), expected.reshape(2, 64).numpy())


def test_blocks_of_mxfp4_hold_every_value() -> None:
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    patterns = [*range(8), *range(9, 16), 0]
    codes = torch.tensor([patterns * 2, patterns[::-1] * 2], dtype=torch.uint8)
    scale = torch.tensor([[2.0**-126], [8.0]])
    packed = pack(record_of(codes, scale, "mxfp4", None, None), "MXFP4")
    weights = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.MXFP4)
    table = np.array(values + [-value for value in values])
    assert np.array_equal(weights.astype(np.float64), table[codes.numpy()] * scale.double().numpy())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> ExportTask:
    """A finished job, written; its base is base.gguf two folders above the file."""
    return written(tmp_path_factory.mktemp("llama"), small_model("Llama"), dtype="int4")[0]


def written_to(task: ExportTask) -> Path:
    return Path(task.output.uri, "gguf", "model.gguf")


def with_base(task: ExportTask, base: Path) -> ExportTask:
    return replace(task, output=task.output.model_copy(update={"base_gguf": str(base)}))


CASES: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any], str]] = {
    "Q4_0 of unsigned codes, a tied head": ("Llama", {"tie_word_embeddings": True}, {"dtype": "uint3"}, "Q4_0"),
    "Q5_0, biases, rows in another order": ("Llama", {"attention_bias": True}, {"dtype": "int5"}, "Q5_0"),
    "experts": ("Qwen3-MoE", {}, {"dtype": "mxfp4", "qscheme": None, "group_size": None}, "MXFP4"),
    # Without a row of zeros, which the codes that are moved in tests would not leave zeros.
    "Q8_0, an embedding in blocks": ("Qwen3", {"pad_token_id": None}, {"dtype": "int6", "embeddings": True}, "Q8_0"),
}


@pytest.mark.parametrize("name", CASES)
def test_gguf_and_transformers_read_the_same_weights(name: str, tmp_path: Path) -> None:
    architecture, fields, quantize, kind = CASES[name]
    task, path = written(tmp_path, small_model(architecture, **fields), **quantize)
    (found,) = verify(task, [GgufExporter()])
    assert found.weights == len({layer.owner for layer in task.layers})
    assert (found.different, found.output_error) == (0, 0.0)
    before, after = gguf_base.arrays(tmp_path / "base.gguf"), gguf_base.arrays(path)
    assert list(after) == list(before)
    changed = {name for name in after if after[name][0] != before[name][0]}
    assert {after[name][0] for name in changed} == {kind}
    assert len(changed) == 7 + ("embedding" in name)
    for name in after.keys() - changed:
        assert np.array_equal(after[name][1], before[name][1]), name
    fields_of = gguf.GGUFReader(path).fields
    expected = {"Q4_0": 2, "Q5_0": 8, "Q8_0": 7, "MXFP4": 38}[kind]  # llama.h, enum llama_ftype
    assert fields_of["general.file_type"].contents() == expected
    assert fields_of["general.quantization_version"].contents() == 2


def test_rows_are_in_the_order_that_the_converter_gives_them(llama: ExportTask) -> None:
    """Against the permutation written out in the support file, not against our own reading."""
    after = gguf_base.arrays(written_to(llama))
    for name, heads, target in (("q", 4, "attn_q"), ("k", 2, "attn_k"), ("v", None, "attn_v")):
        weight = llama.result.tensor(f"model.layers.0.self_attn.{name}_proj.weight")
        expected = weight if heads is None else gguf_base.permuted(weight, heads)
        assert np.array_equal(after[f"blk.0.{target}.weight"][1], expected.numpy()), name


def test_metadata_are_copied_as_they_are(llama: ExportTask, tmp_path: Path) -> None:
    kinds = gguf.GGUFValueType
    metadata = {
        "test.no_text": ([b"\xff\xfe", b"ok"], kinds.ARRAY, kinds.STRING),
        "test.double": (0.1, kinds.FLOAT64),
        "test.numbers": ([1, -2, 3], kinds.ARRAY, kinds.INT64),
        "test.truth": ([True, False], kinds.ARRAY, kinds.BOOL),
        "general.alignment": (64, kinds.UINT32),
    }
    base = gguf_base.write_base(small_model("Llama"), tmp_path / "other.gguf", metadata=metadata, alignment=64)
    GgufExporter().write(with_base(llama, base), str(tmp_path))
    before, after = (gguf.GGUFReader(path) for path in (base, tmp_path / "gguf" / "model.gguf"))
    assert set(after.fields) - set(before.fields) == {"general.quantization_version"}
    for name, field in before.fields.items():
        if name not in ("general.file_type", "GGUF.kv_count"):
            assert [bytes(part) for part in field.parts] == [bytes(part) for part in after.fields[name].parts], name
    assert all(tensor.data_offset % 64 == 0 for tensor in after.tensors)


@pytest.mark.parametrize("outtype", ["f16", "bf16"])
def test_floats_keep_the_type_of_the_base(outtype: str, llama: ExportTask, tmp_path: Path) -> None:
    task = with_base(llama, gguf_base.write_base(small_model("Llama"), tmp_path / "base.gguf", outtype))
    GgufExporter().write(task, str(tmp_path))
    after = gguf_base.arrays(tmp_path / "gguf" / "model.gguf")
    assert after["token_embd.weight"][0] == outtype.upper()
    assert after["blk.0.attn_norm.weight"][0] == "F32"
    loaded = GgufExporter().load(task, str(tmp_path))
    assert all(torch.equal(weight, task.result.tensor(name)) for name, weight in loaded.weights)
    assert loaded.run is not None
    inputs, model = task.inputs()[0], task.model()
    assert isinstance(model, nn.Module)
    expected = outputs_of(model, inputs)[0]
    error = (loaded.run(inputs)[0] - expected).abs().max() / expected.abs().max()
    assert 0 < error < loaded.tolerance


def test_changed_biases_are_replaced(tmp_path: Path) -> None:
    model = small_model("Llama", attention_bias=True)
    base = gguf_base.write_base(model, tmp_path / "base.gguf")
    with torch.no_grad():
        for bias in (module.bias for module in model.modules() if isinstance(module, nn.Linear)):
            if bias is not None:
                bias.copy_(torch.randn_like(bias))
    task = prepared(tmp_path, model, base)
    GgufExporter().write(task, task.output.uri)
    (found,) = verify(task, [GgufExporter()])
    assert found.output_error == 0.0


def test_the_same_bytes_each_time(llama: ExportTask, tmp_path: Path) -> None:
    GgufExporter().write(llama, str(tmp_path))
    assert written_to(llama).read_bytes() == (tmp_path / "gguf" / "model.gguf").read_bytes()
    assert str(written_to(llama).parents[2]).encode() not in written_to(llama).read_bytes()


@pytest.mark.slow
def test_the_same_bytes_in_another_process(llama: ExportTask, tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from types import SimpleNamespace
from distributed_adaround.export.gguf_file import GgufExporter
from distributed_adaround.export.stored import StoredResult
from distributed_adaround.files.local_files import LocalFiles
files = LocalFiles(Path(sys.argv[3], "files"))
output = SimpleNamespace(base_gguf=sys.argv[2])
result = StoredResult.open(sys.argv[1], files)
GgufExporter().write(SimpleNamespace(result=result, output=output, files=files), sys.argv[3])
"""
    arguments = [llama.output.uri, str(llama.output.base_gguf), str(tmp_path)]
    subprocess.run([sys.executable, "-c", code, *arguments], env={"PYTHONPATH": ":".join(sys.path)}, check=True)
    assert written_to(llama).read_bytes() == (tmp_path / "gguf" / "model.gguf").read_bytes()


def test_a_kill_leaves_no_file(llama: ExportTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    GgufExporter().write(llama, str(tmp_path))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distributed_adaround.export.gguf_file.pack", fail)
    with pytest.raises(KeyboardInterrupt):
        GgufExporter().write(llama, str(tmp_path))
    assert not list((tmp_path / "gguf").iterdir())


FORMATS: dict[str, tuple[Mapping[str, Any], str]] = {
    "per channel": (
        {"qscheme": "per_channel_symmetric", "group_size": None},
        "qscheme to per_group_symmetric and .* 32",
    ),
    "other groups": ({"group_size": 16}, "quantize.group_size to 32"),
    "zero points": (
        {"qscheme": "per_group_affine", "dtype": "uint4"},
        "no zero point; set quantize.qscheme to per_group_symm",
    ),
    "fp8": ({"dtype": "fp8"}, "no blocks of float8_e4m3fn .*set quantize.dtype to int4"),
    "nvfp4": ({"dtype": "nvfp4", "qscheme": None, "group_size": None, "scale_dtype": None}, "no blocks of nvfp4"),
    "other scales": (
        {"scale_dtype": "bfloat16"},
        "float16, not bfloat16; remove quantize.scale_dtype or set it to float16",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_that_no_block_holds_are_refused(name: str, llama: ExportTask) -> None:
    quantize, message = FORMATS[name]
    spec = QuantizeSpec(**{**GROUPS, "scale_dtype": "float16", **quantize})
    layer = llama.layers[2]
    layer_format = spec.for_layer(layer.name, layer.kind)
    assert layer_format is not None
    layers = [llama.layers[0], replace(layer, format=format_entries(layer_format, LayerGeometry(layer.shape)))]
    with pytest.raises(SpecError, match=message) as error:
        GgufExporter().check(replace(llama, layers=layers))
    assert layer.name in str(error.value)


def _garbage(path: Path, model: Any) -> None:
    path.write_bytes(b"no such file" * 100)


def _cut(path: Path, model: Any) -> None:
    data = gguf_base.write_base(model, path).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _quantized(path: Path, model: Any) -> None:
    gguf_base.write_base(model, path, quantized="model.layers.0.mlp.up_proj.weight")


def _other_sizes(path: Path, model: Any) -> None:
    gguf_base.write_base(small_model("Llama", intermediate_size=96), path)


def _fewer_blocks(path: Path, model: Any) -> None:
    gguf_base.write_base(small_model("Llama", num_hidden_layers=0), path)


def _one_of_several(path: Path, model: Any) -> None:
    gguf_base.write_base(model, path, metadata={"split.count": (2, gguf.GGUFValueType.UINT16)})


BASES: dict[str, tuple[Any, type[AdaRoundError], str]] = {
    "garbage": (_garbage, InputError, "is no GGUF file, or damaged"),
    "cut": (_cut, InputError, "is no GGUF file, or damaged"),
    "quantized": (_quantized, InputError, r"holds blk.0.ffn_up.weight as Q8_0.*--outtype f32"),
    "other sizes": (_other_sizes, InputError, r"shape \[96, 32\], layer 'model.layers.0.mlp.gate_proj' has 64 x 32"),
    "fewer blocks": (_fewer_blocks, SpecError, "no tensor of layer 'model.layers.0.self_attn.q_proj'.*quantize.ignore"),
    "one of several": (_one_of_several, InputError, "llama-gguf-split --merge"),
}


@pytest.mark.parametrize("name", BASES)
def test_other_bases_are_refused_before_anything_is_solved(name: str, llama: ExportTask, tmp_path: Path) -> None:
    write, kind, message = BASES[name]
    write(tmp_path / "base.gguf", small_model("Llama"))
    with pytest.raises(kind, match=message):
        GgufExporter().check(with_base(llama, tmp_path / "base.gguf"))


def test_a_base_of_other_weights_is_refused(llama: ExportTask, tmp_path: Path) -> None:
    task = with_base(llama, tmp_path / "base.gguf")
    for name, changed in (("embed_tokens.weight", "token_embd.weight"), ("mlp.up_proj.weight", "blk.0.ffn_up.weight")):
        other = small_model("Llama")
        with torch.no_grad():
            for key, parameter in other.named_parameters():
                if key.endswith(name):
                    parameter.normal_()
        gguf_base.write_base(other, tmp_path / "base.gguf")
        with pytest.raises(InputError, match=f"{changed}.*give a GGUF made from this very model"):
            GgufExporter().write(task, str(tmp_path))
        assert not (tmp_path / "gguf").exists()


def test_experts_are_quantized_all_and_alike(tmp_path: Path) -> None:
    task = prepared(tmp_path, small_model("Qwen3-MoE"), dtype="int4")
    layers = {layer.stored_name: layer for layer in task.layers}
    one = "model.layers.0.mlp.experts.down_proj[1]"
    without = [layer for name, layer in layers.items() if name != one]
    with pytest.raises(SpecError, match=r"ffn_down_exps.weight holds 3 experts, of which 2 are quantized"):
        GgufExporter().check(replace(task, layers=without))
    other = replace(layers[one], format={**layers[one].format, "dtype": "int8", "quant_min": -128, "quant_max": 127})
    with pytest.raises(SpecError, match=r"all experts of .*down_proj lie in blk.0.ffn_down_exps.weight, in one format"):
        GgufExporter().check(replace(task, layers=[*without, other]))


class Conv(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_layers_that_llms_do_not_have_are_refused(tmp_path: Path) -> None:
    gguf_base.write_base(small_model("Llama"), tmp_path / "base.gguf")
    with pytest.raises(SpecError, match=r"no tensor of layer 'conv'.*add 'conv' to quantize.ignore"):
        finished(
            tmp_path,
            Conv(),
            [torch.randn(2, 32, 4, 4)],
            GgufExporter(),
            GROUPS,
            {"formats": ["gguf"], "base_gguf": str(tmp_path / "base.gguf")},
        )


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, llama: ExportTask) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(SpecError, match=r"pip install 'distributed_adaround\[gguf\]'"):
        GgufExporter().check(llama)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python, which compiles llama.cpp")
def test_llama_cpp_runs_it(tmp_path: Path) -> None:
    import llama_cpp

    task, path = written(tmp_path, small_model("Llama"))
    runtime = llama_cpp.Llama(str(path), logits_all=True, n_ctx=16, verbose=False)
    tokens = [5, 7, 11, 13]
    runtime.eval(tokens)
    model: Any = task.model()
    expected = model(torch.tensor([tokens])).logits[0].numpy()
    # llama.cpp multiplies blocks by activations of 8 bits.
    assert np.abs(runtime.scores[: len(tokens)] - expected).max() < 0.05 * np.abs(expected).max()
