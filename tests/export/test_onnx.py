"""Exporter `onnx`: files that onnx checks and ONNX Runtime runs, against the rounded model in torch."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import toy_models
from architectures import ARCHITECTURES
from export_tasks import finished
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.onnx._internal.exporter import _registration

from distributed_adaround import export
from distributed_adaround.data.microbatches import ModelInputs
from distributed_adaround.errors import InputError, OutputError, SpecError
from distributed_adaround.export.exporter import ExportTask
from distributed_adaround.export.onnx_model import OnnxExporter
from distributed_adaround.export.verify import Verified, outputs_of, verify
from distributed_adaround.files import storage
from distributed_adaround.model.source import OpenedModel

# What the libraries warn about is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")
EXPORTER = OnnxExporter()


@pytest.fixture(scope="module", autouse=True)
def _one_registry() -> Iterator[None]:
    """torch.onnx reads the source of all its operators at each call, which takes longer than a small export."""
    with pytest.MonkeyPatch.context() as patch:
        read = _registration.ONNXRegistry.from_torchlib
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(functools.cache(read)))
        yield


def exported(folder: Path, model: Any, batch: Any, quantize: Mapping[str, Any], exporter: Any = EXPORTER) -> ExportTask:
    task = finished(folder, model, [batch], exporter, quantize, {"formats": ["onnx"]})
    exporter.write(task, task.output.uri)
    return task


def verified(task: ExportTask, exporter: Any = EXPORTER) -> Verified:
    (found,) = verify(task, [exporter])
    return found


def graph_of(task: ExportTask) -> Any:
    return onnx.load(f"{task.output.uri}/onnx/model.onnx").graph


def tensors_of(graph: Any) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in graph.initializer}


def nodes(graph: Any, kind: str) -> list[Any]:
    return [node for node in graph.node if node.op_type == kind]


def largest_difference(task: ExportTask, inputs: ModelInputs) -> float:
    """Of the outputs of ONNX Runtime and torch, over the largest output."""
    run = EXPORTER.load(task, task.output.uri).run
    assert run is not None
    pairs = list(zip(run(inputs), outputs_of(task.model(), inputs), strict=True))
    assert all(found.shape == expected.shape for found, expected in pairs)
    return max(float((found - expected).abs().max() / expected.abs().max()) for found, expected in pairs)


def optimized_kinds(task: ExportTask, folder: Path) -> list[str]:
    """Operators of the graph that ONNX Runtime makes of the file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(f"{task.output.uri}/onnx/model.onnx", options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node]


class Pictures(nn.Module):
    """Convolutions of all kinds, batch norms after them (negative factors, no factors, read twice), Gemm and MatMul."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.depthwise, self.plain = nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6, affine=False)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.up_again, self.up_norm = nn.ConvTranspose2d(4, 6, 2, bias=False), nn.BatchNorm2d(6)
        self.twice, self.kept = nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4)
        self.line, self.volume = nn.Conv1d(4, 4, 3, padding=1), nn.Conv3d(4, 4, (1, 1, 2))
        self.head, self.head_norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.tokens = nn.Linear(6, 6)
        generator = torch.Generator().manual_seed(3)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                if module.weight is not None:
                    nn.init.normal_(module.weight, generator=generator)
                    nn.init.normal_(module.bias, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = F.relu(self.up(self.plain(self.depthwise(x))))
        x = F.relu(self.up_norm(self.up_again(x)))
        y = self.twice(x)
        x = self.kept(y) + y
        x = self.volume(self.line(x.mean(dim=3))[:, :, None, None])[:, :, 0, 0]
        x = self.head_norm(self.head(x.mean(dim=2)))
        return self.tokens(torch.stack([x, 2 * x], dim=1))


def pictures() -> nn.Module:
    torch.manual_seed(0)
    model = Pictures()
    assert bool((model.norm.weight < 0).any())
    return model


MIXED = {
    "dtype": "int4",
    "qscheme": "per_group_affine",
    "group_size": 3,
    "overrides": [
        {"match": ["depthwise", "head"], "qscheme": "per_tensor_affine", "dtype": "uint3"},
        {"match": ["twice", "line", "volume", "up_again"], "group_size": 2},
    ],
}


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory, _one_registry: None) -> ExportTask:
    return exported(tmp_path_factory.mktemp("int8"), pictures(), torch.randn(3, 2, 8, 8), {"dtype": "int8"})


@pytest.mark.parametrize("quantize", [None, MIXED, pytest.param({"dtype": "fp8"}, marks=pytest.mark.slow)])
def test_every_kind_of_layer(tmp_path: Path, int8: ExportTask, quantize: dict[str, Any] | None) -> None:
    task = exported(tmp_path, pictures(), torch.randn(3, 2, 8, 8), quantize) if quantize else int8
    found = verified(task)
    assert found.ok, found
    # All floats but those of the norms that went into layers, and the biases that took them up.
    assert found.weights >= len(task.result.layers) == 9
    assert found.output_error is not None
    assert found.output_error < 1e-6
    graph = graph_of(task)
    assert len(nodes(graph, "DequantizeLinear")) == 9
    assert [node.input[1] for node in nodes(graph, "BatchNormalization")] == ["kept.weight"]
    assert not tensors_of(graph).keys() & task.result.layers.keys()
    assert not nodes(graph, "Shape") or len(nodes(graph, "Expand")) == 0, "a bias of zeros is computed"
    assert largest_difference(task, ModelInputs((torch.randn(5, 2, 12, 10),), {})) < 1e-6


def test_a_batch_norm_changes_scales_and_bias_and_no_code(int8: ExportTask) -> None:
    task, model, graph = int8, int8.model(), graph_of(int8)
    assert isinstance(model, nn.Module)
    tensors, record = tensors_of(graph), task.result.record("conv.weight")
    assert np.array_equal(numpy_helper.to_array(tensors["conv.weight.codes"]), record.codes.numpy())
    state = {name: tensor.double().numpy() for name, tensor in model.state_dict().items()}
    factor = state["norm.weight"] / np.sqrt(state["norm.running_var"] + 1e-5)
    scale = numpy_helper.to_array(tensors["conv.weight.scale"])
    np.testing.assert_allclose(scale, record.scale.numpy() * factor, rtol=1e-6)
    assert (scale < 0).any()
    bias = state["norm.bias"] - factor * state["norm.running_mean"]
    (conv,) = [node for node in nodes(graph, "Conv") if node.output[0] == nodes(graph, "Relu")[0].input[0]]
    np.testing.assert_allclose(numpy_helper.to_array(tensors[conv.input[2]]), bias, rtol=1e-5, atol=1e-6)
    # Outputs of a transposed convolution are on axis 1; of one with several conv groups no axis has them.
    up = tensors["up_again.weight.codes"]
    (dequantize,) = [node for node in nodes(graph, "DequantizeLinear") if node.input[0] == up.name]
    assert {each.name: each.i for each in dequantize.attribute} == {"axis": 1}


def test_a_changed_file_is_noticed(tmp_path: Path, int8: ExportTask) -> None:
    shutil.copytree(int8.output.uri, tmp_path / "out")
    task = replace(int8, output=int8.output.model_copy(update={"uri": str(tmp_path / "out")}))
    path = tmp_path / "out" / "onnx" / "model.onnx"
    good = path.read_bytes()

    def changed(name: str) -> Verified:
        model = onnx.load_from_string(good)
        (tensor,) = [each for each in model.graph.initializer if each.name == name]
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[0] += 1
        tensor.CopyFrom(numpy_helper.from_array(array, name))
        onnx.save(model, path)
        return verified(task)

    for name in ("conv.weight.codes", "conv.weight.scale", "tokens.weight.codes", "tokens.weight.scale", "up.bias"):
        assert changed(name).different == 1, name
    folded = changed("head.weight.folded_bias")
    assert folded.different == 0
    assert not folded.ok
    model = onnx.load_from_string(good)
    for node in nodes(model.graph, "DequantizeLinear"):
        del node.metadata_props[:]
    onnx.save(model, path)
    with pytest.raises(InputError, match=r"holds no codes of conv\.weight, .* run the job again"):
        verified(task)
    path.write_bytes(good[: len(good) // 2])
    with pytest.raises(InputError, match=r"onnx/model\.onnx cannot be read"):
        verified(task)


class Tokens(nn.Module):
    """Layers of inputs `(N, T, C)`, one used twice, and a table of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 64)
        self.first, self.second = nn.Linear(64, 32), nn.Linear(32, 32, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.second(F.relu(self.second(F.relu(self.first(self.table(ids))))))


@pytest.mark.parametrize(
    ("quantize", "kind"),
    [
        ({"dtype": "int2", "qscheme": "per_group_symmetric", "group_size": 16}, "INT2"),
        ({"dtype": "int3"}, "INT4"),
        ({"dtype": "uint4", "qscheme": "per_group_affine", "group_size": 32}, "UINT4"),
        ({"dtype": "int6", "qscheme": "per_channel_affine"}, "INT8"),
        ({"dtype": "mxfp8"}, "FLOAT8E4M3FN"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_layers_of_tokens_take_the_fast_form(tmp_path: Path, quantize: dict[str, Any], kind: str) -> None:
    torch.manual_seed(0)
    task = exported(tmp_path, Tokens(), torch.randint(0, 20, (2, 5)), {**quantize, "embeddings": True})
    found = verified(task)
    assert found.ok, found
    graph = graph_of(task)
    tensors = tensors_of(graph)
    codes = {name: tensor for name, tensor in tensors.items() if name.endswith(".codes")}
    assert {onnx.TensorProto.DataType.Name(tensor.data_type) for tensor in codes.values()} == {kind}
    assert {name: tuple(tensor.dims) for name, tensor in codes.items()} == {
        "table.weight.codes": (20, 64),
        "first.weight.codes": (64, 32),
        "second.weight.codes": (32, 32),
    }
    record = task.result.record("first.weight")
    as_float = numpy_helper.to_array(codes["first.weight.codes"]).astype(np.float32)
    assert np.array_equal(as_float.T, record.codes.float().numpy())
    assert not nodes(graph, "Transpose")
    assert len(nodes(graph, "DequantizeLinear")) == 3
    # ONNX Runtime has one operator for integers that only one layer reads; it dequantizes all others.
    assert optimized_kinds(task, tmp_path).count("MatMulNBits") == (0 if kind == "FLOAT8E4M3FN" else 1)
    assert largest_difference(task, ModelInputs((torch.randint(0, 20, (7, 3)),), {})) < 1e-6


def test_default_sessions_round_activations(tmp_path: Path) -> None:
    """Why `load` sets the accuracy level: if this fails, ONNX Runtime has changed, and what README says with it."""
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (2, 5))
    task = exported(tmp_path, Tokens(), ids, {"dtype": "int4"})
    session = onnxruntime.InferenceSession(f"{task.output.uri}/onnx/model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"ids": ids.numpy()})
    (expected,) = outputs_of(task.model(), ModelInputs((ids,), {}))
    assert 1e-4 < np.abs(output - expected.numpy()).max() / expected.abs().max() < 5e-2


def test_keywords_masks_and_tied_weights(tmp_path: Path) -> None:
    batch = {"input_ids": torch.randint(0, 20, (3, 5)), "attention_mask": torch.ones(3, 5, dtype=torch.int64)}
    task = exported(tmp_path, toy_models.attention(), batch, {"dtype": "int4"})
    found = verified(task)
    assert found.ok, found
    graph = graph_of(task)
    sizes = {each.name: [dim.dim_param for dim in each.type.tensor_type.shape.dim] for each in graph.input}
    assert sizes == {"input_ids": ["batch", "input_ids_1"], "attention_mask": ["batch", "input_ids_1"]}
    # The output layer and the embedding read one initializer.
    (tied,) = {"head.weight", "embed.weight"} & tensors_of(graph).keys()
    assert sorted(node.op_type for node in graph.node if tied in node.input) == ["Gather", "Transpose"]
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1] * 7])
    other = ModelInputs((), {"attention_mask": mask, "input_ids": torch.randint(0, 20, (2, 7))})
    assert largest_difference(task, other) < 1e-6


class Parts(nn.Module):
    """Projections of attentions, of two inputs each, packed in one parameter, and a weight stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.same, self.mixed = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.turned = nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + self.same(x, y, y, need_weights=False)[0]
        return self.mixed(x, y, -y, need_weights=False)[0] @ self.turned


@pytest.mark.slow
def test_parts_of_parameters(tmp_path: Path) -> None:
    torch.manual_seed(0)
    quantize = {
        "dtype": "int4",
        "fused": "ignore",
        "ignore": ["re:mixed.*\\[16:24\\]"],
        "overrides": [{"match": "re:mixed.*\\[0:8\\]", "dtype": "uint8", "qscheme": "per_channel_affine"}],
    }
    batch = {"x": torch.randn(3, 5, 8), "y": torch.randn(3, 7, 8)}
    task = exported(tmp_path, Parts(), batch, quantize)
    layers = {"same.in_proj_weight[0:8]", "same.in_proj_weight[8:24]", "mixed.in_proj_weight[8:16]", "turned"}
    assert layers <= task.result.layers.keys()
    found = verified(task)
    assert found.ok, found
    tensors = tensors_of(graph_of(task))
    # Parts of one format are one tensor again.
    assert tuple(tensors["same.in_proj_weight.codes"].dims) == (24, 8)
    assert tuple(tensors["mixed.in_proj_weight[16:24]"].dims) == (8, 8)
    assert tensors["mixed.in_proj_weight[0:8].codes"].data_type == onnx.TensorProto.UINT8
    assert tensors["mixed.in_proj_weight[8:16].codes"].data_type == onnx.TensorProto.INT4
    assert tuple(tensors["turned.codes"].dims) == (8, 4)
    assert np.array_equal(
        numpy_helper.to_array(tensors["turned.codes"]).astype(np.int8), task.result.record("turned").codes.T.numpy()
    )
    other = ModelInputs((), {"y": torch.randn(2, 3, 8), "x": torch.randn(2, 6, 8)})
    assert largest_difference(task, other) < 1e-6


def test_a_file_of_weights_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exporter = OnnxExporter(largest_inline=1000)
    torch.manual_seed(0)
    task = exported(tmp_path, Tokens(), torch.randint(0, 20, (2, 5)), {"dtype": "int4"}, exporter)
    folder = Path(task.output.uri, "onnx")
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data"]
    found = verified(task, exporter)
    assert found.ok, found
    assert found.weights == 4
    onnx.checker.check_model(str(folder / "model.onnx"), full_check=True)
    places = {
        entry.value
        for tensor in onnx.load(folder / "model.onnx", load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert places == {"model.onnx.data"}
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    exporter.write(task, task.output.uri)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    # Whoever is killed in between leaves nothing that a reader opens.
    def killed(*_: Any) -> None:
        raise OutputError("killed")

    monkeypatch.setattr(storage, "write_bytes", killed)
    with pytest.raises(OutputError, match="killed"):
        exporter.write(task, task.output.uri)
    assert [path.name for path in folder.iterdir()] == ["model.onnx.data"]
    monkeypatch.undo()
    EXPORTER.write(task, task.output.uri)
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


def test_the_bytes_depend_on_the_result_alone(tmp_path: Path, int8: ExportTask) -> None:
    EXPORTER.write(int8, str(tmp_path))
    data = (tmp_path / "onnx" / "model.onnx").read_bytes()
    assert data == Path(int8.output.uri, "onnx", "model.onnx").read_bytes()
    for text in (str(tmp_path), "Pictures", ".py", "stack_trace", torch.__version__, "aten"):
        assert text.encode() not in data, text


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(tmp_path: Path) -> None:
    support = Path(__file__).parents[1] / "support"
    code = f"""
import sys; sys.path.append({str(support)!r})
import pathlib, torch, warnings; warnings.simplefilter("ignore")
import toy_models
from export_tasks import finished
from distributed_adaround.export.onnx_model import OnnxExporter
folder = pathlib.Path(sys.argv[1])
batch = dict(input_ids=torch.ones(3, 5, dtype=torch.int64), attention_mask=torch.ones(3, 5, dtype=torch.int64))
exporter = OnnxExporter(largest_inline=500)
task = finished(folder, toy_models.attention(), [batch], exporter, dict(dtype="int4"), dict(formats=["onnx"]))
exporter.write(task, task.output.uri)
"""
    found = []
    for seed in ("1", "2"):
        folder = tmp_path / seed
        folder.mkdir()
        environment = {"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2]), "PATH": "/usr/bin"}
        subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment, capture_output=True)
        found.append({path.name: path.read_bytes() for path in (folder / "out" / "onnx").iterdir()})
    assert found[0].keys() == {"model.onnx", "model.onnx.data"}
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("model", "quantize", "rule"),
    [
        (toy_models.wide, {"dtype": "nvfp4"}, r"layer 'mxfp4' is nvfp4, .* use dtype int4 or fp8"),
        (toy_models.wide, {"dtype": "mxfp4"}, r"layer 'mxfp4' is mxfp4, .* use dtype int4 or fp8"),
        (toy_models.wide, {"dtype": "fp4"}, r"layer 'fp8' is float4_e2m1fn, .* use dtype int4 or fp8"),
        (lambda: toy_models.mlp().bfloat16(), {"dtype": "int4"}, r"layer 'first' is bfloat16, .* the model in float32"),
        (toy_models.mixture, {"dtype": "int4"}, r"layer 'experts\[0\]' is one of several weights .* remove onnx"),
    ],
    ids=["nvfp4", "mxfp4", "fp4", "bfloat16", "experts"],
)
def test_what_is_refused(tmp_path: Path, model: Any, quantize: dict[str, Any], rule: str) -> None:
    model = model()
    dtype = next(iter(model.parameters())).dtype
    ignore = [] if quantize["dtype"] not in ("nvfp4", "mxfp4") else ["fp8", "int4"]
    batches = [torch.randn(4, 8, dtype=dtype)]
    with pytest.raises(SpecError, match=rf"output\.formats: onnx: {rule}"):
        finished(tmp_path, model, batches, EXPORTER, {**quantize, "ignore": ignore}, {"formats": ["onnx"]})


def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = exported(tmp_path, toy_models.mlp(), torch.randn(3, 8), {"dtype": "int8"})
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(SpecError, match=r"onnx needs onnxscript: pip install 'distributed_adaround\[onnx\]'"):
        EXPORTER.check(task)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    EXPORTER.check(task)
    found = verified(task)
    assert (found.ok, found.output_error, found.weights) == (True, None, 5)
    assert found.note == "weights only; to run it: pip install 'distributed_adaround[onnx]'"


def test_other_formats_need_none_of_the_packages() -> None:
    for file in Path(export.__file__).parent.glob("onnx_*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imports = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not [each for each in imports if re.match(r"(import|from) (onnx|ml_dtypes)", each)], file


def test_a_layer_that_is_not_in_the_graph(tmp_path: Path) -> None:
    task = finished(tmp_path, toy_models.mlp(), [torch.randn(3, 8)], EXPORTER, {"dtype": "int8"}, {"formats": ["onnx"]})
    other = replace(task, model=lambda: nn.Sequential(nn.Linear(8, 8)).eval())
    with pytest.raises(InputError, match=r"layer first was not found in the graph .* quantize\.ignore, or remove onnx"):
        EXPORTER.write(other, task.output.uri)
    assert not list(Path(task.output.uri).glob("onnx/*"))


class OfThree(nn.Module):
    """Takes batches of three samples only."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x + torch.arange(3.0)[:, None])


def test_fixed_sizes_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        task = exported(tmp_path, OfThree(), torch.randn(3, 8), {"dtype": "int8"})
    assert "onnx: the model cannot be exported for other sizes of inputs; the batch is fixed too" in caplog.messages
    assert verified(task).ok


def test_a_program(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(toy_models.cnn().eval(), (torch.randn(3, 2, 8, 8),), dynamic_shapes=({0: batch},))
    for tensor in program.state_dict.values():
        tensor.requires_grad_(False)
    task = exported(tmp_path, OpenedModel(program), {"x": torch.randn(3, 2, 8, 8)}, {"dtype": "int8"})
    found = verified(task)
    assert found.ok, found
    assert not nodes(graph_of(task), "BatchNormalization")
    assert largest_difference(task, ModelInputs((), {"x": torch.randn(5, 2, 8, 8)})) < 1e-6


@pytest.mark.parametrize("scale_dtype", [None, "float32"])
def test_float16(tmp_path: Path, scale_dtype: str | None) -> None:
    torch.manual_seed(0)
    model, ids = Tokens().half(), torch.randint(0, 20, (2, 5))
    task = exported(tmp_path, model, ids, {"dtype": "int4", "scale_dtype": scale_dtype})
    found = verified(task)
    assert found.ok, found
    graph = graph_of(task)
    kind = onnx.TensorProto.FLOAT16 if scale_dtype is None else onnx.TensorProto.FLOAT
    assert tensors_of(graph)["first.weight.scale"].data_type == kind
    # Scales that float16 cannot hold: the weight is rounded after the product, as torch does.
    assert len(nodes(graph, "Cast")) == (0 if scale_dtype is None else 2), [node.name for node in graph.node]


@pytest.mark.gpu
def test_a_model_on_a_device_is_exported_from_the_host(tmp_path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        task = finished(
            tmp_path / device, toy_models.cnn(), [torch.ones(3, 2, 8, 8)], EXPORTER, {"dtype": "int8"},
            {"formats": ["onnx"]},
        )  # fmt: skip
        model = task.model()
        assert isinstance(model, nn.Module)
        EXPORTER.write(replace(task, model=lambda model=model, device=device: model.to(device)), task.output.uri)
        assert {tensor.device.type for tensor in model.state_dict().values()} == {device}
        found.append(Path(task.output.uri, "onnx", "model.onnx").read_bytes())
    assert found[0] == found[1]


_TINY = (
    "BERT",
    "Llama",
    "Qwen3",
    "T5",
    "Whisper",
    "ViT",
    "ResNet",
    "ConvNeXt",
    "GPT-2",
    "Phi-3",
    "Gemma 3",
    "Wav2Vec2",
)


@pytest.mark.slow
@pytest.mark.parametrize("name", _TINY)
def test_architectures(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    task = exported(tmp_path, architecture.build(), architecture.inputs(), {"dtype": "int8", "heads": True})
    found = verified(task)
    assert found.ok, found
    assert found.output_error is not None
    assert found.output_error < 2e-6
    assert len(nodes(graph_of(task), "DequantizeLinear")) == len(task.result.layers)
    other = architecture.inputs()
    for key, value in other.items():
        longer = value.repeat(2, *[1] * (value.dim() - 1))[:5]
        other[key] = longer.repeat(1, 2)[:, :9] if value.dtype == torch.int64 else longer
    assert largest_difference(task, ModelInputs((), dict(other))) < 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE"])
def test_experts_of_transformers_are_refused(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    batches = [architecture.inputs()]
    with pytest.raises(SpecError, match=r"is one of several weights in .*experts.* remove onnx"):
        finished(tmp_path, architecture.build(), batches, EXPORTER, {"dtype": "int8"}, {"formats": ["onnx"]})


def test_metadata_says_where_inputs_go(tmp_path: Path) -> None:
    task = exported(tmp_path, toy_models.mlp(), torch.randn(3, 8), {"dtype": "int8"})
    model = onnx.load(f"{task.output.uri}/onnx/model.onnx")
    places = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert places == {"distributed_adaround.inputs": {"x": "[0][0]"}}
    assert (model.ir_version, model.opset_import[0].version, model.producer_name) == (10, 21, "distributed_adaround")
