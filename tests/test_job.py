"""Whole jobs on one process: from a job file to files that other programs load."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import toy_models
from packed_codes import read_by_hand
from rank_pool import RankPool
from sample_jobs import images, job, vectors, write_job
from torch import Tensor, nn

from distributed_adaround.errors import InputError, PeerError
from distributed_adaround.export.codes import read_codes
from distributed_adaround.files.job_file import load_spec
from distributed_adaround.job import run_job
from distributed_adaround.report.table import LayerTable

RESULTS = ("quantized.safetensors", "quantized.json", "dequantized.safetensors", "report.json")


def run(path: Path, *overrides: str) -> LayerTable:
    return run_job(load_spec(str(path), overrides), path.parent)


def tensors(folder: Path, name: str) -> dict[str, Tensor]:
    return safetensors.torch.load_file(folder / "out" / f"{name}.safetensors")


def read_json(folder: Path, name: str) -> Any:
    return json.loads((folder / "out" / name).read_text(encoding="utf-8"))


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def digests(folder: Path, names: tuple[str, ...] = RESULTS[:3]) -> dict[str, str]:
    return {name: hashlib.sha256((folder / "out" / name).read_bytes()).hexdigest() for name in names}


def squared_errors(float_model: nn.Module, folder: Path, inputs: dict[str, Tensor], rows: Tensor | None) -> float:
    """Squared error of a job's result over the squared outputs, computed from its files alone."""
    before = {name: tensor.clone() for name, tensor in float_model.state_dict().items()}
    with torch.no_grad():
        expected = float_model.eval()(**inputs).double()
        float_model.load_state_dict(tensors(folder, "dequantized"), strict=True)
        found = float_model(**inputs).double()
    float_model.load_state_dict(before)
    if rows is not None:
        expected, found = expected[rows], found[rows]
    return float((found - expected).square().sum() / expected.square().sum())


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, LayerTable]:
    """A finished job with dict samples, a mask, a weight tied to an embedding and a layer that runs twice."""
    folder = tmp_path_factory.mktemp("attention")
    return folder, run(write_job(folder, "attention"))


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished job with two layers that share a weight. Tests that change it work on copies."""
    folder = tmp_path_factory.mktemp("mlp")
    run(write_job(folder, "mlp"))
    return folder


@pytest.fixture
def finished(mlp: Path, tmp_path: Path) -> Path:
    """A copy of the finished job, in another place; returns its job file."""
    folder = tmp_path / "moved"
    shutil.copytree(mlp, folder)
    (folder / "job.yaml").write_text(json.dumps(job(folder, "mlp")), encoding="utf-8")
    return folder / "job.yaml"


def test_a_job_writes_its_results_commits_and_events_and_nothing_else(attention: tuple[Path, LayerTable]) -> None:
    folder, table = attention
    layers = {f"commits/layers/{index:05d}-{row.name}.safetensors" for index, row in enumerate(table)}
    assert files(folder / "out") == {
        *RESULTS,
        "status.json",
        "job.yaml",
        "events/rank-0.jsonl",
        "commits/manifest.json",
        *layers,
    }
    assert len(layers) == 4


def test_codes_lie_on_the_grid_and_mean_the_dequantized_weights(attention: tuple[Path, LayerTable]) -> None:
    folder, _ = attention
    codes, weights, formats = (
        read_by_hand(folder / "out"),
        tensors(folder, "dequantized"),
        read_json(folder, RESULTS[1]),
    )
    assert set(formats["layers"]) == {"query.weight", "key.weight", "value.weight", "mix.weight"}
    for name in formats["layers"]:
        assert codes[name].dtype == torch.int8
        assert -4 <= codes[name].min() < codes[name].max() <= 3
        assert codes[f"{name}_scale"].shape == (12,)
        weight = (codes[name].float() - codes[f"{name}_zero_point"].float()[:, None]) * codes[f"{name}_scale"][:, None]
        assert torch.equal(weight, weights[name])
    reread = read_codes(str(folder / "out"))
    assert reread.keys() == weights.keys()
    assert all(torch.equal(reread[name], weights[name]) for name in weights)


def test_weights_load_into_the_model_and_err_as_reported(attention: tuple[Path, LayerTable]) -> None:
    folder, table = attention
    data = np.load(folder / "data.npz")
    inputs = {name: torch.from_numpy(data[name]) for name in data.files}
    report = read_json(folder, "report.json")
    error = squared_errors(toy_models.attention(), folder, inputs, inputs["attention_mask"] != 0)
    assert error == pytest.approx(report["output_error"], rel=1e-4)
    assert 1e-4 < error < 1
    assert all(row.hard_error <= row.nearest_error for row in table)
    assert any(row.hard_error < row.nearest_error for row in table)


def test_what_stays_in_float_is_unchanged_and_listed_with_its_reason(attention: tuple[Path, LayerTable]) -> None:
    folder, _ = attention
    model, weights = toy_models.attention(), tensors(folder, "dequantized")
    listed = {item["name"]: item["reason"] for item in read_json(folder, "report.json")["float_parameters"]}
    quantized = set(read_json(folder, RESULTS[1])["layers"])
    parameters = dict(model.named_parameters())
    assert set(listed) | quantized == set(parameters)
    assert not set(listed) & quantized
    assert "shared with embedding" in listed["embed.weight"]
    for name in listed:
        assert torch.equal(weights[name], parameters[name]), name
    assert torch.equal(weights["head.weight"], weights["embed.weight"])
    for name in quantized:
        assert not torch.equal(weights[name], parameters[name]), name


def test_the_report_holds_the_table_and_the_settings(attention: tuple[Path, LayerTable]) -> None:
    folder, table = attention
    report = read_json(folder, "report.json")
    assert report["layers"] == table.to_dicts()
    assert report["totals"] == table.totals.to_dict()
    assert report["world_size"] == 1
    assert report["spec"]["rounding"]["max_iter"] == 30
    assert report["spec"]["quantize"]["dtype"] == "int3"
    mix = next(row for row in table if row.name == "mix")
    assert mix.note == "runs 2 times"
    assert not any(row.resumed for row in table)


def test_events_tell_the_job_in_order(attention: tuple[Path, LayerTable]) -> None:
    folder, table = attention
    lines = (folder / "out" / "events" / "rank-0.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    assert [event["event"] for event in events] == ["start", "first_layer", *["layer"] * 4, "done"]
    first = events.pop(1)
    assert (first["name"], first["seconds"] > 0) == (table[0].name, True)
    assert [event["name"] for event in events[1:-1]] == [row.name for row in table]
    assert [(event["index"], event["of"]) for event in events[1:-1]] == [(index, 4) for index in range(1, 5)]
    assert events[0]["owned"] == list(range(6))
    assert (events[0]["world_size"], events[0]["finished"], events[0]["device"]) == (1, 0, "cpu")
    assert all(event["rank"] == 0 and event["time"].endswith("+00:00") for event in events)


def test_nearest_override_and_ignore(tmp_path: Path) -> None:
    """One job without learning; every weight is compared with rounding written out here."""
    override = {"match": "depthwise", "dtype": "uint4", "qscheme": "per_tensor_affine"}
    quantize = {"dtype": "int4", "observer": "minmax", "ignore": ["head"], "overrides": [override]}
    table = run(write_job(tmp_path, "cnn", quantize=quantize, rounding={"solver": "nearest"}))
    model = dict(toy_models.cnn().named_parameters())
    codes, formats = read_by_hand(tmp_path / "out"), read_json(tmp_path, RESULTS[1])
    assert [row.name for row in table] == ["conv", "depthwise", "up"]
    assert formats["layers"]["depthwise.weight"]["dtype"] == "uint4"
    assert formats["layers"]["conv.weight"]["dtype"] == "int4"
    assert torch.equal(codes["head.weight"], model["head.weight"])
    assert {p["name"]: p["reason"] for p in formats["float_parameters"]}["head.weight"] == "ignored by quantize.ignore"

    scale, zero_point = codes["depthwise.weight_scale"], codes["depthwise.weight_zero_point"]
    assert (codes["depthwise.weight"].dtype, scale.shape, zero_point.shape) == (torch.uint8, (), ())
    nearest = (model["depthwise.weight"] / scale).round() + zero_point
    assert torch.equal(codes["depthwise.weight"].float(), nearest.clamp(0, 15))
    for name, axis in (("conv.weight", 0), ("up.weight", 1)):
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        nearest = (model[name] / codes[f"{name}_scale"].view(shape)).round().clamp(-8, 7)
        assert torch.equal(codes[name].float(), nearest), name
    assert all(row.flipped == 0 and row.hard_error == row.nearest_error for row in table)


def test_weights_shared_by_two_layers_stay_shared(mlp: Path) -> None:
    formats, weights = read_json(mlp, RESULTS[1]), tensors(mlp, "dequantized")
    assert set(formats["layers"]) == {"first.weight", "second.weight"}
    assert formats["tied"] == {"third.weight": "second.weight"}
    assert torch.equal(weights["third.weight"], weights["second.weight"])
    report = read_json(mlp, "report.json")
    inputs = {"x": torch.from_numpy(np.load(mlp / "data.npz")["x"])}
    error = squared_errors(toy_models.mlp(), mlp, inputs, None)
    assert error == pytest.approx(report["output_error"], rel=1e-4)


def export_program(path: Path, dynamic: bool) -> None:
    shapes = {"x": {0: torch.export.Dim("n")}} if dynamic else None
    torch.export.save(torch.export.export(toy_models.mlp(), (torch.randn(2, 8),), dynamic_shapes=shapes), path)


def test_an_exported_program_gives_what_its_factory_gives(mlp: Path, tmp_path: Path) -> None:
    export_program(tmp_path / "mlp.pt2", dynamic=True)
    program = {"factory": None, "program": str(tmp_path / "mlp.pt2")}
    run(write_job(tmp_path, "mlp", model=program))
    ours, theirs = tensors(tmp_path, "dequantized"), tensors(mlp, "dequantized")
    toy_models.mlp().load_state_dict(ours, strict=True)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    expected = read_json(mlp, "report.json")["output_error"]
    assert read_json(tmp_path, "report.json")["output_error"] == pytest.approx(expected, rel=1e-6)


def test_a_program_of_one_batch_size_needs_data_cut_that_way(tmp_path: Path) -> None:
    export_program(tmp_path / "mlp.pt2", dynamic=False)
    path = write_job(tmp_path, "mlp", model={"factory": None, "program": str(tmp_path / "mlp.pt2")})
    with pytest.raises(InputError, match="batches of exactly 2 samples") as caught:
        run(path)
    assert "data.microbatch_size=2 and data.num_samples to a multiple" in str(caught.value)
    assert not (tmp_path / "out").exists()
    run(path, "data.num_samples=10")
    assert files(tmp_path / "out") >= set(RESULTS)


def test_a_transform_stands_between_the_data_and_the_model(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, size=(11, 2, 6, 6), dtype=np.uint8)
    path = write_job(tmp_path, "cnn", data={"transform": "nets:halved"}, rounding={"solver": "nearest"})
    np.savez(tmp_path / "data.npz", pixels=pixels)
    run(path)
    error = squared_errors(toy_models.cnn(), tmp_path, {"x": torch.from_numpy(pixels).float() / 255}, None)
    assert error == pytest.approx(read_json(tmp_path, "report.json")["output_error"], rel=1e-4)


def test_weights_come_from_a_file(mlp: Path, tmp_path: Path) -> None:
    """The factory's own weights (another seed) do not matter."""
    path = write_job(tmp_path, "mlp", model={"factory_args": {"seed": 7}, "weights": str(tmp_path / "w.pt")})
    torch.save(toy_models.mlp().state_dict(), tmp_path / "w.pt")
    run(path)
    assert digests(tmp_path) == digests(mlp)


def run_on_rank(path: str) -> tuple[str, str, int | None]:
    try:
        run(Path(path))
    except (InputError, PeerError) as error:
        return type(error).__name__, str(error), error.reported_by
    return "", "", None


def test_ranks_that_build_different_weights_are_found(pool: RankPool, tmp_path: Path) -> None:
    vectors(tmp_path / "data.npz")
    path = write_job(tmp_path, "unseeded")
    message = (
        "the model on ranks [1] has other weights than on rank 0; load the same weights on all ranks, with "
        "model.weights in a job file, or seed the factory"
    )
    assert pool.run(run_on_rank, 2, str(path)) == [("InputError", message, 0)] * 2
    assert not (tmp_path / "out").exists()


def test_ranks_write_events_each_and_results_once(pool: RankPool, mlp: Path, tmp_path: Path) -> None:
    path = write_job(tmp_path, "mlp", rounding={"solver": "nearest"})
    assert pool.run(run_on_rank, 2, str(path)) == [("", "", None)] * 2
    assert {f"events/rank-{rank}.jsonl" for rank in range(2)} <= files(tmp_path / "out")
    assert files(tmp_path / "out") - files(mlp / "out") == {"events/rank-1.jsonl"}
    assert read_json(tmp_path, "report.json")["world_size"] == 2


def test_an_output_that_cannot_be_written_is_reported_by_one_rank(pool: RankPool, tmp_path: Path) -> None:
    path = write_job(tmp_path, "mlp")
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    results = pool.run(output_failure, 2, str(path))
    assert results[0] == results[1]
    assert results[0][0] == "OutputError"
    assert results[0][1] == 0


def output_failure(path: str) -> tuple[str, int | None]:
    try:
        run(Path(path))
    except OSError as error:
        return type(error).__name__, getattr(error, "reported_by", None)
    return "", None


def test_a_finished_job_run_again_takes_its_commits_and_writes_the_same_bytes(finished: Path) -> None:
    before = digests(finished.parent)
    for name in RESULTS:
        (finished.parent / "out" / name).unlink()
    table = run(finished)
    assert all(row.resumed for row in table)
    assert digests(finished.parent) == before
    events = (finished.parent / "out" / "events" / "rank-0.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["event"] for line in events] == ["start", "first_layer", "layer", "layer", "done"] * 2
    assert json.loads(events[5])["finished"] == 2


def test_a_job_that_stopped_between_layers_gives_the_same_bytes(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = digests(finished.parent)
    shutil.rmtree(finished.parent / "out")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("distributed_adaround.checkpoint.commits.JobCommits.commit", _second_time(stop))
        with pytest.raises(KeyboardInterrupt):
            run(finished)
    assert not any((finished.parent / "out" / name).exists() for name in RESULTS)
    table = run(finished)
    assert [row.resumed for row in table] == [True, False]
    assert digests(finished.parent) == before


def _second_time(stop: Any) -> Any:
    from distributed_adaround.checkpoint.commits import JobCommits

    commit, calls = JobCommits.commit, []

    def wrapped(commits: JobCommits, record: Any) -> None:
        calls.append(record.name)
        if len(calls) == 2:
            stop()
        commit(commits, record)

    return wrapped


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        (["rounding.max_iter=31"], "another job file"),
        (["quantize.dtype=int4"], "another job file"),
        (["runtime.seed=1"], "another job file"),
        (["model.factory_args={seed: 1}"], "another model weights"),
        (["data.num_samples=10"], "another calibration data"),
    ],
)
def test_a_job_that_changed_does_not_take_the_commits(finished: Path, overrides: list[str], part: str) -> None:
    before = {name: (finished.parent / "out" / name).read_bytes() for name in files(finished.parent / "out")}
    with pytest.raises(InputError, match="commits there were made with") as caught:
        run(finished, *overrides)
    # num_samples is both a field of the job file and another set of samples.
    assert part.removeprefix("another ") in str(caught.value)
    assert "output.overwrite=true" in str(caught.value)
    assert before == {name: (finished.parent / "out" / name).read_bytes() for name in files(finished.parent / "out")}


def test_other_data_and_a_damaged_commit_are_refused(finished: Path) -> None:
    layer = next((finished.parent / "out" / "commits" / "layers").iterdir())
    content = layer.read_bytes()
    layer.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{layer.name} is damaged: its SHA-256 differs"):
        run(finished)
    layer.write_bytes(content)
    vectors(finished.parent / "data.npz", seed=1)
    with pytest.raises(InputError, match="made with another calibration data than this job has"):
        run(finished)


def test_overwrite_replaces_the_results_of_another_job(finished: Path, tmp_path: Path) -> None:
    before = digests(finished.parent)
    run(finished, "output.overwrite=true", "quantize.dtype=int4")
    assert digests(finished.parent).keys() == before.keys()
    assert not digests(finished.parent).items() & before.items()
    fresh = write_job(tmp_path / "fresh", "mlp", quantize={"dtype": "int4"})
    run(fresh)
    assert digests(fresh.parent) == digests(finished.parent)
    # With the commits of this very job overwrite goes on from them.
    assert all(row.resumed for row in run(finished, "output.overwrite=true", "quantize.dtype=int4"))


def test_results_without_commits_are_not_replaced_unasked(finished: Path) -> None:
    out = finished.parent / "out"
    shutil.rmtree(out / "commits")
    before = digests(finished.parent)
    (out / "quantized.safetensors").write_bytes(b"somebody else's")
    with pytest.raises(InputError, match=r"quantized.safetensors is there already.*output.overwrite=true"):
        run(finished)
    assert (out / "quantized.safetensors").read_bytes() == b"somebody else's"
    run(finished, "output.overwrite=true")
    assert digests(finished.parent) == before


def test_settings_of_the_machine_do_not_change_the_result(finished: Path, tmp_path: Path) -> None:
    """Spilling, prefetching and the place of the files; the commits fit as well."""
    run(finished, "runtime.activation_memory=1", f"runtime.spill_dir={tmp_path}", f"output.uri={tmp_path}/out")
    assert digests(tmp_path) == digests(finished.parent)
    assert all(row.resumed for row in run(finished, "runtime.activation_memory=1GiB", "data.prefetch=0"))


def test_codes_and_the_formats_asked_for_are_written(tmp_path: Path) -> None:
    images(tmp_path / "data.npz", num_samples=3)
    run(write_job(tmp_path, "mlp", output={"formats": ["safetensors"]}, rounding={"solver": "nearest"}))
    assert (tmp_path / "out" / "quantized.safetensors").exists()
    assert not (tmp_path / "out" / "dequantized.safetensors").exists()
    # All else is made of the codes: they are there in any case.
    run(write_job(tmp_path, "mlp", output={"formats": ["dequantized"]}, rounding={"solver": "nearest"}))
    assert (tmp_path / "out" / "quantized.safetensors").exists()
    assert (tmp_path / "out" / "dequantized.safetensors").exists()


def test_threads_are_those_of_the_job_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr("distributed_adaround.job.verify", lambda *_: seen.append(torch.get_num_threads()) or [])
    run(write_job(tmp_path, "mlp", rounding={"solver": "nearest"}, runtime={"threads": before + 2}))
    assert seen == [before + 2]
    assert torch.get_num_threads() == before
