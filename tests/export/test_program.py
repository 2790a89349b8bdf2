"""Exporter `program`: codes in a program of torch.export, for every layer and number format, loaded by torch alone."""

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_models
from architectures import ARCHITECTURES
from export_tasks import finished
from torch import Tensor, nn
from torch.export import Dim
from transformers.modeling_outputs import BaseModelOutput

from distributed_adaround.capture.exported import straight_line
from distributed_adaround.data.microbatches import CallerBatch
from distributed_adaround.errors import InputError, SpecError
from distributed_adaround.export.exporter import ExportTask
from distributed_adaround.export.program import ProgramExporter
from distributed_adaround.export.verify import verify
from distributed_adaround.model.archive import unsafe_content
from distributed_adaround.model.source import OpenedModel, load_program

pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = {"input_ids": torch.arange(15).reshape(3, 5), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
FLOATS = [{"match": name, "dtype": name} for name in ("fp8", "mxfp4", "mxfp8", "nvfp4", "fp4")]


def written(folder: Path, model: Any, batch: CallerBatch, **quantize: Any) -> tuple[ExportTask, Path]:
    task = finished(folder, model, [batch], ProgramExporter(), quantize, {"formats": ["program"]})
    ProgramExporter().write(task, task.output.uri)
    return task, Path(task.output.uri, "program", "model.pt2")


def state_of(path: Path) -> Mapping[str, Tensor]:
    return load_program(path).state_dict


class Recurrent(nn.Module):
    """An LSTM keeps its weights in a list besides; only a part of the packed projections is quantized."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.packed = nn.Parameter(torch.randn(12, 8) / 3)
        self.low = nn.Linear(4, 4, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.lstm(x)
        first = nn.functional.linear(x, self.packed[:4])
        return self.low(first.bfloat16()) + (self.packed[4:] * x.sum(dim=1, keepdim=True)).mean()


def chain() -> nn.Module:
    """Its input is named `input`, as Python's own function."""
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


CASES: dict[str, tuple[Any, CallerBatch, dict[str, Any]]] = {
    "convolutions, a zero point for each channel": (
        toy_models.cnn,
        torch.randn(3, 2, 8, 8),
        {"dtype": "uint8", "qscheme": "per_channel_affine"},
    ),
    "a tied head, groups": (
        toy_models.attention,
        TOKENS,
        {"dtype": "int3", "qscheme": "per_group_affine", "group_size": 4, "embeddings": True},
    ),
    "one scale, shared weights": (toy_models.mlp, torch.randn(3, 8), {"qscheme": "per_tensor_symmetric"}),
    "small floats": (toy_models.wide, torch.randn(3, 8), {"overrides": FLOATS}),
    "experts, and stored transposed": (toy_models.mixture, torch.randn(3, 8), {"dtype": "uint4"}),
    "an input of an odd name": (chain, torch.randn(3, 8), {"dtype": "int8"}),
    "parts of a tensor": (Recurrent, torch.randn(3, 5, 8), {"dtype": "int4"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_program_computes_what_the_quantized_model_computes(name: str, tmp_path: Path) -> None:
    build, batch, quantize = CASES[name]
    task, path = written(tmp_path, build(), batch, **quantize)
    (found,) = verify(task, [ProgramExporter()])
    assert found.weights == len({layer.owner for layer in task.layers})
    assert (found.different, found.output_error) == (0, 0.0)
    assert unsafe_content(path) is None
    state = state_of(path)
    for layer in task.layers:
        record = task.result.record(layer.stored_name)
        if layer.view is None:
            assert torch.equal(state[f"{layer.owner}_codes"].view(torch.uint8), record.codes.view(torch.uint8))
            assert layer.owner not in state
    for alias, owner in task.result.tied.items():
        assert (alias in state) == (owner in state)


def test_a_tampered_code_is_found(tmp_path: Path) -> None:
    task, _ = written(tmp_path, toy_models.mlp(), torch.randn(3, 8))
    model = task.model()
    assert isinstance(model, nn.Module)
    with torch.no_grad():
        model.get_parameter("first.weight")[0, 0] += 0.5
    ProgramExporter().write(task, task.output.uri)
    (found,) = verify(task, [ProgramExporter()])
    # What is written comes from the codes, not from the weights in memory.
    assert found.different == 1
    assert not found.ok


def test_other_batches_and_lengths_in_a_process_that_imports_torch_only(tmp_path: Path) -> None:
    task, path = written(tmp_path, toy_models.attention(), TOKENS, dtype="int4")
    ids, mask = torch.arange(14).reshape(2, 7), torch.ones(2, 7, dtype=torch.long)
    torch.save((ids, mask), tmp_path / "inputs.pt")
    code = f"""
import sys, torch
ids, mask = torch.load({str(tmp_path / "inputs.pt")!r}, weights_only=True)
module = torch.export.load({str(path)!r}).module()
torch.save(module(input_ids=ids, attention_mask=mask), {str(tmp_path / "outputs.pt")!r})
assert not {{"distributed_adaround", "transformers", "torchao"}} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    model = task.model()
    assert isinstance(model, nn.Module)
    expected = model(ids, mask)
    assert torch.equal(torch.load(tmp_path / "outputs.pt", weights_only=True), expected)


def test_a_program_goes_in_and_comes_out(tmp_path: Path) -> None:
    model = toy_models.cnn().eval().requires_grad_(False)
    program = torch.export.export(model, (torch.randn(3, 2, 8, 8),), dynamic_shapes=({0: Dim.DYNAMIC},))
    task, path = written(tmp_path, OpenedModel(program), torch.randn(3, 2, 8, 8), dtype="int4")
    (found,) = verify(task, [ProgramExporter()])
    assert (found.different, found.output_error) == (0, 0.0)
    # The program that went in is as it was, and the one that came out can be captured again.
    assert "conv.weight" in program.state_dict
    again = load_program(path)
    graph = straight_line(again)
    x = torch.randn(5, 2, 8, 8)
    assert torch.equal(graph(x), again.module()(x))


def test_the_same_bytes_each_time_without_paths_and_data(tmp_path: Path) -> None:
    _, path = written(tmp_path / "one", toy_models.mlp(), torch.randn(3, 8), dtype="int4")
    _, other = written(tmp_path / "another", toy_models.mlp(), torch.randn(3, 8), dtype="int4")
    data = path.read_bytes()
    assert data == other.read_bytes()
    assert str(tmp_path).encode() not in data
    assert str(Path(__file__).parents[2]).encode() not in data
    example = torch.export.load(path).example_inputs
    assert example is not None
    assert not any(tensor.any() for tensor in example[0])


@pytest.mark.slow
def test_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    code = """
import sys, torch, toy_models
from pathlib import Path
from export_tasks import finished
from distributed_adaround.export.program import ProgramExporter
tokens = {"input_ids": torch.arange(15).reshape(3, 5), "attention_mask": torch.ones(3, 5, dtype=torch.long)}
exporter, output = ProgramExporter(), {"formats": ["program"]}
task = finished(Path(sys.argv[1]), toy_models.attention(), [tokens], exporter, {"dtype": "int4"}, output)
exporter.write(task, task.output.uri)
"""
    _, path = written(tmp_path / "one", toy_models.attention(), TOKENS, dtype="int4")
    arguments = [sys.executable, "-c", code, str(tmp_path / "another")]
    subprocess.run(arguments, env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "1"}, check=True)
    assert path.read_bytes() == (tmp_path / "another" / "out" / "program" / "model.pt2").read_bytes()


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return y * 2 if y.sum() > 0 else y


def test_a_model_that_torch_cannot_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"program needs a model that torch.export can capture.*remove program"):
        written(tmp_path, Untraceable(), torch.randn(3, 8))


@torch.library.custom_op("adaround_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Foreign(nn.Module):
    """Gives back an object of transformers; with an operator that torch alone does not have."""

    def __init__(self, operator: bool) -> None:
        super().__init__()
        self.linear, self.operator = nn.Linear(8, 8), operator

    def forward(self, x: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=twice(self.linear(x)) if self.operator else self.linear(x))


def test_operators_of_other_libraries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the model runs adaround_test.twice.default, which torch alone does not"):
        written(tmp_path, Foreign(operator=True), torch.randn(3, 8))


def test_outputs_of_other_libraries_become_a_dict(tmp_path: Path) -> None:
    task, path = written(tmp_path, Foreign(operator=False), torch.randn(3, 8))
    (found,) = verify(task, [ProgramExporter()])
    assert found.ok
    assert set(load_program(path).module()(torch.randn(2, 8))) == {"last_hidden_state"}
    assert b"transformers" not in path.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Mixtral", "gpt-oss"])
def test_models_of_transformers_load_without_transformers(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    task, path = written(tmp_path, architecture.build(), architecture.inputs(), dtype="int4")
    (found,) = verify(task, [ProgramExporter()])
    assert found.different == 0
    assert found.output_error is not None
    # Experts are computed in another order of sums.
    assert found.output_error <= (0.0 if name == "Llama" else 1e-6)
    code = f"import torch; torch.export.load({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True)
