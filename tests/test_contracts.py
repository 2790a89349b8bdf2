"""What the tables make room for: one format, solver, exporter, source and encoder more, each in a temporary module and
a line of a table, and a job that uses all five. Nothing else is touched."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from distributed_adaround import quantize
from distributed_adaround.errors import SpecError
from distributed_adaround.export.codes import read_codes
from distributed_adaround.formats import FORMATS, FloatFormat, NumberFormat
from distributed_adaround.job import run_job
from distributed_adaround.spec.data import ENCODERS
from distributed_adaround.spec.job import EXPORTERS, JobSpec, json_schema
from distributed_adaround.spec.model import SOURCES
from distributed_adaround.spec.reference import markdown
from distributed_adaround.spec.rounding import SOLVERS

MODULE = '''
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from distributed_adaround.data.encoder import ArrayEncoder
from distributed_adaround.errors import SpecError
from distributed_adaround.export.exporter import Exporter, Loaded
from distributed_adaround.model.source import OpenedModel
from distributed_adaround.solve.problem import Solution


class Ceiling:
    """Every weight to the grid value above it; as many times as the job says, for show."""

    needs_moments = False

    def __init__(self, settings):
        self.num_steps = settings.solver_args["times"]

    def solve(self, problem, comm, monitor):
        for step in range(self.num_steps):
            monitor.step(step + 1, 0.0)
        _, above = problem.grid.neighbours(problem.weight)
        return Solution(codes=above)


class Names(Exporter):
    """The names of the quantized weights, one in each line."""

    files = ("names.txt",)
    published = files

    def check(self, plan):
        if any(layer.number.bits > 12 for layer in plan.layers):
            raise SpecError("output.formats: 'names' holds 12 bits at most; use int12")

    def write(self, task, uri):
        text = "".join(f"{name} {layer.number.name}\\n" for name, layer in task.result.layers.items())
        Path(uri, "names.txt").write_text(text)

    def load(self, task, uri):
        names = [line.split()[0] for line in Path(uri, "names.txt").read_text().splitlines()]
        return Loaded((name, task.result.tensor(name)) for name in names)


def stack(spec, folder, files):
    """Linear layers of one width, with weights from a seed."""
    torch.manual_seed(spec.source_args["seed"])
    layers = [nn.Linear(4, 4) for _ in range(spec.source_args["layers"])]
    return OpenedModel(nn.Sequential(*layers).eval().requires_grad_(False))


class Halves(ArrayEncoder):
    """Counts from 0 to 16 become numbers from 0 to 1, under the name of the model's input."""

    def encoded(self, fields):
        (field,) = fields
        return (replace(field, name="input", dtype="float32"),)

    def encode(self, record):
        (values,) = record.values()
        return {"input": values.float() / self.args["largest"]}
'''


@pytest.fixture
def spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    """A job that uses one more of everything."""
    (tmp_path / "one_more.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(SOLVERS, "ceiling", "one_more:Ceiling")
    monkeypatch.setitem(EXPORTERS, "names", "one_more:Names")
    monkeypatch.setitem(SOURCES, "stack", "one_more:stack")
    monkeypatch.setitem(ENCODERS, "halves", "one_more:Halves")
    monkeypatch.setitem(FORMATS, "int12", NumberFormat("int12", 12))
    np.save(tmp_path / "counts.npy", np.random.default_rng(0).integers(0, 17, (6, 4), dtype=np.uint8))
    return JobSpec(
        model={"source": "stack", "source_args": {"seed": 1, "layers": 2}},
        data={"uri": str(tmp_path / "counts.npy"), "encoder": "halves", "encoder_args": {"largest": 16}},
        quantize={"dtype": "int12"},
        rounding={"solver": "ceiling", "solver_args": {"times": 3}},
        output={"uri": str(tmp_path / "out"), "formats": ["names", "safetensors", "dequantized"]},
        runtime={"device": "cpu"},
    )


def test_a_job_with_one_more_of_everything(spec: JobSpec, tmp_path: Path) -> None:
    table = run_job(spec)
    assert [(row.name, row.format, row.solver) for row in table] == [
        (name, "int12 per_channel_symmetric", "ceiling") for name in ("0", "1")
    ]
    out = tmp_path / "out"
    assert (out / "names.txt").read_text() == "0.weight int12\n1.weight int12\n"
    stored = safetensors.torch.load_file(out / "quantized.safetensors")
    assert stored["0.weight.codes"].dtype == torch.int16
    # This solver is worse than nearest rounding, which was kept; with codes of 12 bits.
    assert [row.kept_nearest for row in table] == [True, True]
    assert stored["0.weight.codes"].abs().max() > 255
    plain = safetensors.torch.load_file(out / "dequantized.safetensors")
    assert torch.equal(read_codes(str(out))["1.weight"], plain["1.weight"])
    report = json.loads((out / "report.json").read_text())
    assert [(one["format"], one["weights"], one["ok"]) for one in report["exports"]] == [
        ("names", 2, True), ("safetensors", 4, True), ("dequantized", 4, True)
    ]  # fmt: skip
    assert report["output_error"] < 1e-5


def test_an_exporter_refuses_before_anything_is_solved(spec: JobSpec, tmp_path: Path) -> None:
    FORMATS["int14"] = NumberFormat("int14", 14)
    try:
        wide = spec.model_copy(update={"quantize": type(spec.quantize)(dtype="int14")})
        with pytest.raises(SpecError, match="12 bits at most"):
            run_job(wide)
    finally:
        del FORMATS["int14"]
    assert not (tmp_path / "out").exists()


def test_schema_messages_and_documentation_know_what_is_in_the_tables(spec: JobSpec) -> None:
    schema = json.dumps(json_schema())
    for name in ("ceiling", "names", "stack", "halves", "int12"):
        assert f'"{name}"' in schema
    assert "| `int12` | 12 | -2048 to 2047 | int16 |" in markdown()
    with pytest.raises(SpecError, match=r"dtype: 'int11' must be one of .*'int12'"):
        type(spec.quantize)(dtype="int11")


def test_a_name_that_is_in_no_table_is_refused() -> None:
    job: dict[str, Any] = {"model": {"factory": "a:b"}, "data": {"uri": "x"}, "output": {"uri": "y"}}
    for section, field in (("rounding", "solver"), ("data", "encoder"), ("model", "source")):
        with pytest.raises(SpecError, match=f"{section}.{field}: 'ceiling' must be one of"):
            JobSpec(**job | {section: {**job.get(section, {}), field: "ceiling"}})


def test_one_more_small_float(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp6: sign, 2 exponent bits, 3 mantissa bits, up to 7.5 (OCP Microscaling v1.0)."""
    e2m3 = FloatFormat("e2m3", mantissa_bits=3, bias=1, largest=0x1F, sign=0x20)
    assert e2m3.values[-3:] == (6.5, 7.0, 7.5)
    monkeypatch.setitem(FORMATS, "fp6", NumberFormat("fp6", 6, element=e2m3))
    model = torch.nn.Sequential(torch.nn.Linear(4, 3))
    settings = {"solver": "nearest", "observer": "minmax"}
    quantized, table = quantize(model, [torch.randn(8, 4)], dtype="fp6", progress=False, **settings)
    assert table[0].format == "fp6 per_channel_symmetric"
    scale = model[0].weight.abs().amax(dim=1, keepdim=True) / 7.5
    steps = (quantized[0].weight / scale).detach()[:, :, None]
    distance = (steps - torch.tensor(e2m3.values)).abs().amin(dim=2)
    assert float(distance.max()) < 1e-5
