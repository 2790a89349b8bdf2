"""Whole jobs with gram: the same bytes on 1 and 3 ranks and after a restart, outputs without mean error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import toy_models
from packed_codes import read_by_hand
from rank_pool import RankPool
from sample_jobs import write_job
from torch import Tensor, nn

from distributed_adaround.checkpoint.commits import JobCommits
from distributed_adaround.export.codes import read_codes
from distributed_adaround.files.job_file import load_spec
from distributed_adaround.job import run_job
from distributed_adaround.solve import by_channel
from distributed_adaround.solve import layer as layer_file
from distributed_adaround.solve import measure as measure_file

RESULTS = ("quantized.safetensors", "quantized.json", "dequantized.safetensors")
# 6 microbatches in 4 shards for the images, 2 for the texts: uneven, and the third rank has none of the texts.
JOBS: dict[str, dict[str, Mapping[str, Any]]] = {
    "cnn": {"rounding": {"solver": "gram", "sweeps": 12}},
    "attention": {
        "data": {"microbatch_size": 8},
        "quantize": {"dtype": "int3", "observer": "output_mse", "qscheme": "per_group_symmetric", "group_size": 4},
        "rounding": {"solver": "gram", "sweeps": 12},
    },
}


def run(path: str, stop_after: int | None = None) -> list[bool]:
    """One rank of a job with blocks of 2 channels, so that several ranks have some. Which layers were resumed.

    stop_after: commits after which the job stops, as if it were killed.
    """
    channels, commit, done = by_channel._BLOCK_CHANNELS, JobCommits.commit, []

    def counted(commits: JobCommits, record: Any) -> None:
        if len(done) == stop_after:
            raise KeyboardInterrupt
        done.append(record.name)
        commit(commits, record)

    by_channel._BLOCK_CHANNELS, JobCommits.commit = {"cpu": 2}, counted  # type: ignore[method-assign]
    try:
        return [row.resumed for row in run_job(load_spec(path), Path(path).parent)]
    except KeyboardInterrupt:
        return []
    finally:
        by_channel._BLOCK_CHANNELS, JobCommits.commit = channels, commit  # type: ignore[method-assign]


def contents(folder: Path) -> dict[str, bytes]:
    """Results and committed layers; the manifest holds times."""
    layers = sorted((folder / "out/commits/layers").iterdir())
    return {path.name: path.read_bytes() for path in (*(folder / "out" / name for name in RESULTS), *layers)}


# Texts on any number of ranks are in test_world_size.py too.
@pytest.fixture(scope="module", params=["cnn", pytest.param("attention", marks=pytest.mark.slow)])
def jobs(request: pytest.FixtureRequest, pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folder of the finished job by number of ranks."""
    folder = tmp_path_factory.mktemp(request.param)
    found = {}
    for size in (1, 3):
        path = write_job(folder / str(size), request.param, **JOBS[request.param])
        assert pool.run(run, size, str(path)) == [[False] * 4] * size
        found[size] = path.parent
    return found


def test_files_are_the_same_on_any_number_of_ranks(jobs: dict[int, Path]) -> None:
    alone = contents(jobs[1])
    assert len(alone) == 3 + 4
    assert contents(jobs[3]) == alone
    report = json.loads((jobs[1] / "out/report.json").read_text())
    assert [layer["solver"] for layer in report["layers"]] == ["gram"] * 4
    # It learned, and found other scales and biases than nearest rounding has.
    assert all(layer["hard_error"] < layer["nearest_error"] for layer in report["layers"])
    assert any("shift" in safetensors.torch.load(data) for name, data in alone.items() if name[0] == "0")


def test_a_restart_on_another_number_of_ranks_gives_the_same_bytes(
    jobs: dict[int, Path], pool: RankPool, tmp_path: Path
) -> None:
    """Stopped on two ranks, finished on three: the layers behind the commits see what they saw before."""
    expected = contents(jobs[1])
    shutil.copytree(jobs[1], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out")
    job = json.loads((tmp_path / "job.yaml").read_text())
    job["data"]["uri"], job["output"]["uri"] = str(tmp_path / "data.npz"), str(tmp_path / "out")
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    assert pool.run(run, 2, str(tmp_path / "job.yaml"), 2) == [[]] * 2
    assert not (tmp_path / "out" / RESULTS[0]).exists()
    assert pool.run(run, 3, str(tmp_path / "job.yaml")) == [[True, True, False, False]] * 3
    assert contents(tmp_path) == expected


def tensors(folder: Path, name: str = "dequantized") -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "out" / f"{name}.safetensors")


def outputs(model: nn.Module, layers: list[str], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of some modules (of their first call), and of the whole under ""."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, y: Tensor) -> None:
            found.setdefault(name, y.double())

        return hook

    for name in ("", *layers):
        model.get_submodule(name).register_forward_hook(keep(name))
    with torch.no_grad():
        model.eval()(**inputs)
    return found


def both_models(build: Callable[[], nn.Module], folder: Path, layers: list[str]) -> list[dict[str, Tensor]]:
    """What the float model and the result of the job give on the calibration data."""
    data = np.load(folder / "data.npz")
    inputs = {name: torch.from_numpy(data[name]) for name in data.files}
    before, after = build(), build()
    after.load_state_dict(tensors(folder), strict=True)
    return [outputs(model, layers, inputs) for model in (before, after)]


def test_layers_of_a_network_keep_mean_and_spread(tmp_path: Path) -> None:
    """Through scales and biases, and through the mean of the batch norm behind the layer without one; from the files
    alone."""
    path = write_job(tmp_path, "cnn", rounding={"solver": "gram", "sweeps": 20})
    assert not any(row.kept_nearest for row in run_job(load_spec(str(path)), tmp_path))
    layers = {"norm": (0, 2, 3), "depthwise": (0, 2, 3), "up": (0, 2, 3), "": (0,)}
    before, after = both_models(toy_models.cnn, tmp_path, [name for name in layers if name])
    for name, rows in layers.items():
        error = after[name] - before[name]
        assert (error.mean(dim=rows).abs() < 1e-3 * error.square().mean().sqrt()).all(), name
        # The spread is that which other data are expected to show; on the calibration data it may differ a little.
        torch.testing.assert_close(after[name].std(dim=rows), before[name].std(dim=rows), rtol=0.06, atol=1e-4)
    original, found = toy_models.cnn().state_dict(), tensors(tmp_path)
    changed = {name for name in original if not torch.equal(original[name], found[name])}
    assert changed == {
        "conv.weight", "norm.running_mean", "depthwise.weight", "depthwise.bias", "up.weight", "up.bias",
        "head.weight", "head.bias",
    }  # fmt: skip
    # Both checkpoints hold the same model.
    again = read_codes(str(tmp_path / "out"))
    assert all(torch.equal(again[name], found[name]) for name in found)


def test_tokens_that_count_have_no_mean_error_and_a_layer_that_runs_twice_shifts_its_bias(tmp_path: Path) -> None:
    path = write_job(tmp_path, "attention", rounding={"solver": "gram", "sweeps": 20})
    run_job(load_spec(str(path)), tmp_path)
    before, after = both_models(toy_models.attention, tmp_path, ["query", "key", "value"])
    keep = torch.from_numpy(np.load(tmp_path / "data.npz")["attention_mask"]) != 0
    for name in ("query", "key", "value"):
        error = (after[name] - before[name])[keep]
        assert (error.mean(dim=0).abs() < 1e-3 * error.square().mean().sqrt()).all(), name
    original, found = toy_models.attention().state_dict(), tensors(tmp_path)
    changed = {name for name in original if not torch.equal(original[name], found[name])}
    assert changed == {
        *(f"{name}.{kind}" for name in ("query", "key", "value") for kind in ("weight", "bias")),
        "mix.weight", "mix.bias",
    }  # fmt: skip


def test_a_model_that_is_replayed_has_no_mean_error_either(tmp_path: Path) -> None:
    rounding = {"solver": "gram", "sweeps": 20}
    quantize = {"dtype": "int2"}
    path = write_job(tmp_path, "mlp", model={"factory": "branching:build"}, rounding=rounding, quantize=quantize)
    (tmp_path / "branching.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Branching(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.first, self.twice, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)\n"
        "    def forward(self, x):\n"
        "        x = self.first(x if x.sum() > -1e9 else -x).relu()\n"
        "        return self.last(self.twice(self.twice(x)))\n"
        "def build():\n"
        "    torch.manual_seed(0)\n"
        "    return Branching().eval()\n"
    )
    table = run_job(load_spec(str(path)), tmp_path)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["notes"][0].startswith("could not be exported")
    assert not any(row.kept_nearest for row in table)
    space: dict[str, Any] = {}
    exec((tmp_path / "branching.py").read_text(), space)
    before, after = both_models(space["build"], tmp_path, ["first"])
    for name in ("first", ""):
        error = after[name] - before[name]
        assert (error.mean(dim=0).abs() < 1e-3 * error.square().mean().sqrt()).all(), name
    original, found = space["build"]().state_dict(), tensors(tmp_path)
    assert torch.equal(original["twice.bias"], found["twice.bias"])
    assert not torch.equal(original["last.bias"], found["last.bias"])


@pytest.mark.parametrize(
    ("rounding", "solvers", "polished"),
    [
        ({"solver": "gram"}, ["gram"] * 4, ["conv", "depthwise", "up", "head"]),
        ({"solver": "gram", "activation_in_loss": True}, ["minibatch"] * 3 + ["gram"], ["head"]),
        ({"solver": "gram", "polish": False}, ["gram"] * 4, []),
        ({"solver": "minibatch", "polish": True}, ["minibatch"] * 4, ["head"]),
        ({"polish": True, "activation_in_loss": False}, ["minibatch"] * 4, ["conv", "depthwise", "up", "head"]),
        ({"solver": "minibatch"}, ["minibatch"] * 4, ["head"]),
        ({"solver": "gptq", "polish": True}, ["gptq"] * 4, ["conv", "depthwise", "up", "head"]),
        ({"solver": "gptq"}, ["gptq"] * 4, []),
        ({"solver": "nearest", "polish": True}, ["nearest"] * 4, ["conv", "depthwise", "up", "head"]),
    ],
)
def test_layers_with_an_activation_in_the_loss_are_left_to_minibatch_and_not_polished(
    rounding: dict[str, Any], solvers: list[str], polished: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the network's layers, all but the head have a ReLU behind them."""
    seen: dict[str, list[str]] = {"polish": [], "measure": []}

    def watch(file: Any, name: str) -> None:
        original = getattr(file, name)

        def watched(problem: Any, *others: Any) -> Any:
            seen[name].append(problem.name)
            return original(problem, *others)

        monkeypatch.setattr(file, name, watched)

    watch(layer_file, "polish")
    watch(measure_file, "measure")
    path = write_job(tmp_path, "cnn", rounding={"max_iter": 5, "sweeps": 5} | rounding)
    table = run_job(load_spec(str(path)), tmp_path)
    layers = json.loads((tmp_path / "out/report.json").read_text())["layers"]
    assert [layer["name"] for layer in layers] == ["conv", "depthwise", "up", "head"]
    assert [layer["solver"] for layer in layers] == solvers == [row.solver for row in table]
    # Once in its trial, where there is one, and once in whole.
    assert list(dict.fromkeys(seen["polish"])) == polished
    # Nobody takes moments where nobody asks for them.
    asks = rounding.get("polish", rounding.get("solver", "minibatch") in ("gram", "minibatch"))
    with_moments = [asks or solver in ("gram", "gptq") for solver in solvers]
    assert seen["measure"] == [row.name for row, taken in zip(table, with_moments, strict=True) if taken]


def test_formats_of_floats_keep_their_scales_in_files(tmp_path: Path) -> None:
    """Refitted scales are still of their format, or no reader would take the files."""
    names = ["fp8", "mxfp4", "mxfp8", "nvfp4", "fp4"]
    quantize = {"dtype": "int4", "observer": "mse", "overrides": [{"match": name, "dtype": name} for name in names]}
    path = write_job(tmp_path, "wide", quantize=quantize, rounding={"solver": "gram", "sweeps": 5})
    table = run_job(load_spec(str(path)), tmp_path)
    assert all(row.hard_error <= row.nearest_error for row in table)
    again, found = read_codes(str(tmp_path / "out")), tensors(tmp_path)
    assert all(torch.equal(again[name], found[name]) for name in found)
    stored = read_by_hand(tmp_path / "out")
    for name in ("mxfp4", "mxfp8"):
        scale = stored[f"{name}.weight_scale"]
        assert torch.equal(scale.to(torch.float8_e8m0fnu).float(), scale)
