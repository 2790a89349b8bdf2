"""Exporter `torchao`: tensors of torchao that hold the job's own codes, read by torchao."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_models
from export_tasks import finished
from torch import Tensor, nn

from distributed_adaround.data.microbatches import CallerBatch
from distributed_adaround.errors import SpecError
from distributed_adaround.export.exporter import ExportTask
from distributed_adaround.export.torchao_file import TorchaoExporter
from distributed_adaround.export.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore")

IMAGES, ROWS = torch.randn(3, 2, 8, 8), torch.randn(3, 8)
TOKENS = {"input_ids": torch.arange(15).reshape(3, 5), "attention_mask": torch.ones(3, 5, dtype=torch.long)}


def written(folder: Path, model: nn.Module, batch: CallerBatch, **quantize: Any) -> ExportTask:
    task = finished(folder, model, [batch], TorchaoExporter(), quantize, {"formats": ["torchao"]})
    TorchaoExporter().write(task, task.output.uri)
    return task


class Embedded(nn.Module):
    """A quantized embedding, and a parameter of the model itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = nn.Embedding(12, 8), nn.Linear(8, 4)
        self.token = nn.Parameter(torch.randn(8))

    def forward(self, ids: Tensor) -> Tensor:
        return self.linear(self.embed(ids) + self.token)


class Plain(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[0] if isinstance(y, tuple) else y


def cnn() -> nn.Module:
    model = toy_models.Cnn()
    model.up = nn.Conv2d(6, 4, 1)
    return model


CASES: dict[str, tuple[Any, CallerBatch, dict[str, Any]]] = {
    "convolutions": (cnn, IMAGES, {"dtype": "int3"}),
    "convolutions in groups": (
        cnn,
        IMAGES,
        {"dtype": "uint5", "qscheme": "per_group_symmetric", "group_size": 9,
         "overrides": [{"match": ["up", "head"], "group_size": 2}]},
    ),
    "one affine scale": (cnn, IMAGES, {"dtype": "uint8", "qscheme": "per_tensor_affine"}),
    "affine groups in bfloat16": (
        lambda: toy_models.attention().bfloat16(),
        TOKENS,
        {"dtype": "uint4", "qscheme": "per_group_affine", "group_size": 4},
    ),
    "shared weights": (toy_models.mlp, ROWS, {"dtype": "int2"}),
    "an embedding": (Embedded, torch.arange(12).reshape(3, 4), {"dtype": "int8", "embeddings": True}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_torchao_reads_the_same_weights_and_computes_the_same(name: str, tmp_path: Path) -> None:
    build, batch, quantize = CASES[name]
    task = written(tmp_path, build(), batch, **quantize)
    (found,) = verify(task, [TorchaoExporter()])
    assert found.weights == len(task.result.names) + len(task.result.tied)
    assert (found.different, found.output_error) == (0, 0.0)


def test_codes_and_zero_points_are_as_torchao_stores_them(tmp_path: Path) -> None:
    """Against the numbers of the format, written out."""
    from safetensors.torch import load_file

    task = written(
        tmp_path, toy_models.mlp(), ROWS, dtype="uint4", qscheme="per_group_affine", group_size=4, scale_dtype="float16"
    )
    stored = load_file(Path(task.output.uri, "torchao", "model.safetensors"))
    record = task.result.record("first.weight")
    codes, scale, zero_point = (stored[f"first._weight_{part}"] for part in ("qdata", "scale", "zero_point"))
    assert (codes.dtype, scale.dtype, zero_point.dtype) == (torch.int8, torch.float16, torch.int8)
    assert torch.equal(codes.int(), record.codes.int() - 8)
    assert torch.equal(zero_point.int(), record.zero_point - 8)
    levels = codes.float().reshape(8, 2, 4) - zero_point.float()[..., None]
    model = task.model()
    assert isinstance(model, nn.Module)
    assert torch.equal((levels * scale.float()[..., None]).reshape(8, 8), model.get_parameter("first.weight"))


def test_shards_with_an_index_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    task = written(tmp_path, toy_models.mlp(), ROWS, dtype="int4")
    task.result.shard_bytes = 100
    TorchaoExporter().write(task, task.output.uri)
    folder = Path(task.output.uri, "torchao")
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(places.values())) > 1
    assert {"first._weight_qdata", "first._weight_scale", "first._weight_zero_point", "first.bias"} <= places.keys()
    (found,) = verify(task, [TorchaoExporter()])
    assert found.ok
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "model.safetensors"}
    # The library orders metadata by a random hash.
    for turn in range(3):
        TorchaoExporter().write(task, str(tmp_path / str(turn)))
        for name, data in before.items():
            assert (tmp_path / str(turn) / "torchao" / name).read_bytes() == data, name


@pytest.mark.slow
def test_the_same_bytes_in_another_process_without_a_word(tmp_path: Path) -> None:
    task = written(tmp_path, toy_models.mlp(), ROWS, dtype="int4")
    before = {path.name: path.read_bytes() for path in Path(task.output.uri, "torchao").iterdir()}
    code = """
import sys
from pathlib import Path
sys.path.append(sys.argv[1])
import torch
from test_torchao import TorchaoExporter, replace
from distributed_adaround.export.stored import StoredResult
from distributed_adaround.files.local_files import LocalFiles
class Task: pass
task = Task()
task.result = StoredResult.open(sys.argv[2], LocalFiles(Path(sys.argv[3], "files")))
TorchaoExporter().write(task, sys.argv[3])
"""
    arguments = [sys.executable, "-c", code, str(Path(__file__).parent), task.output.uri, str(tmp_path / "again")]
    run = subprocess.run(arguments, env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    # torchao says nothing on the way.
    assert run.stderr == ""
    for name, data in before.items():
        assert (tmp_path / "again" / "torchao" / name).read_bytes() == data, name


REFUSED: dict[str, tuple[Any, CallerBatch, dict[str, Any], str]] = {
    "floats": (toy_models.mlp, ROWS, {"dtype": "fp8"}, "'first' .float8_e4m3fn.*set quantize.dtype to int2 to int8"),
    "a transposed convolution": (toy_models.cnn, IMAGES, {}, "'up'.*add 'up' to quantize.ignore"),
    "experts": (toy_models.mixture, ROWS, {}, r"part of experts; add 'experts\[0\]' to quantize.ignore"),
    "a recurrent layer": (
        lambda: Plain(nn.LSTM(8, 8, batch_first=True)), torch.randn(3, 4, 8), {}, "recurrent layer takes plain weights"
    ),
    "a sequence": (lambda: Plain(nn.Conv1d(2, 4, 3)), torch.randn(3, 2, 8), {}, "'layer'.*linear, conv2d and emb"),
    "groups across kernels": (
        lambda: Plain(nn.Conv2d(4, 4, 3)),
        torch.randn(3, 4, 8, 8),
        {"qscheme": "per_group_symmetric", "group_size": 4},
        "groups of 4 are no box of the kernel; set quantize.group_size to a multiple of 9",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_torchao_cannot_hold_is_refused_before_anything_is_solved(name: str, tmp_path: Path) -> None:
    build, batch, quantize, message = REFUSED[name]
    with pytest.raises(SpecError, match=message):
        written(tmp_path, build(), batch, **quantize)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    task = written(tmp_path, toy_models.mlp(), ROWS)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(SpecError, match=r"pip install 'distributed_adaround\[torchao\]'"):
        TorchaoExporter().check(replace(task, layers=()))
