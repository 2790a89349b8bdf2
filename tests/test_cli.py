"""The command line: what it prints, and how each kind of bad input ends."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy_models
from sample_jobs import vectors, write_job

from distributed_adaround import cli
from distributed_adaround.errors import InputError, OutputError, PeerError, SpecError
from distributed_adaround.runtime.comm import agreed

RESULTS = {"quantized.safetensors", "quantized.json", "dequantized.safetensors", "report.json"}
PYTHON = [sys.executable, "-m", "distributed_adaround"]


def results_and_leftovers(folder: Path) -> set[str]:
    """Result files and temporary files anywhere below the folder."""
    return {p.name for p in folder.rglob("*") if p.name in RESULTS or p.suffix in (".tmp", ".spill")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """A job file without learning, run by the real program from another folder, with overrides."""
    folder = tmp_path_factory.mktemp("finished")
    path = write_job(folder, "mlp", output={"uri": "replaced"})
    command = [*PYTHON, str(path), "--set", "rounding.solver=nearest", "--set", f"output.uri={folder}/out"]
    return folder, subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)


def test_run_is_the_default_command(finished: tuple[Path, "subprocess.CompletedProcess[str]"]) -> None:
    folder, ended = finished
    assert ended.returncode == 0, ended.stderr
    assert {path.name for path in (folder / "out").iterdir()} == {
        *RESULTS,
        "status.json",
        "job.yaml",
        "commits",
        "events",
    }
    table, where = ended.stdout.rstrip().split("\n\n")
    coverage, title, *rows = table.splitlines()
    assert re.fullmatch(r"\d\d\.\d % of \d+ parameters are quantized, in 2 layers", coverage)
    assert title == "int3 per_channel_symmetric, solver nearest"
    assert [line.split()[0] for line in rows[2:4]] == ["first", "second"]
    assert "Error of the network's outputs: " in table
    assert where == f"Results are in {folder}/out"
    # Log lines only, one per layer; nothing of torch or others.
    assert all(" rank 0/1 INFO " in line for line in ended.stderr.splitlines()), ended.stderr
    assert ended.stderr.count(" of 2 ") == 2
    # Nobody waits in silence: coverage before anything is solved, and what goes on until then.
    told = [line.partition(" INFO ")[2] for line in ended.stderr.splitlines()]
    assert told[0] == "listing the calibration data"
    first = next(place for place, line in enumerate(told) if line.startswith("layer 1 of 2"))
    assert coverage in told[:first]
    assert re.fullmatch(r"first layer after \d+ s: first", told[first - 1])
    assert {
        "loading the model",
        "exporting the model as a graph",
        "checking the graph on each shape of the data: 2",
    } <= set(told)


def test_validate_and_schema_need_no_torch(tmp_path: Path) -> None:
    path = write_job(tmp_path)
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from distributed_adaround.cli import main\n"
        "codes = [main(['validate', sys.argv[1]]), main(['validate', sys.argv[1], '--set', 'quantize.dtype=int9'])]\n"
        "sys.exit(repr(codes) if codes != [0, 64] else main(['schema']))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    first, schema = ended.stdout.split("\n", 1)
    assert first == f"{path} is a valid job file"
    assert ended.stderr.startswith("error: quantize.dtype: 'int9'")
    assert_is_schema_of_jobs(json.loads(schema))


def assert_is_schema_of_jobs(schema: dict[str, Any]) -> None:
    assert schema["type"] == "object"
    assert set(schema["required"]) == {"model", "data", "output"}
    sections = {"preset", "quantize", "rounding", "runtime", "model", "data", "output", "evaluate"}
    assert set(schema["properties"]) == sections

    def check(node: Any) -> None:
        if isinstance(node, dict):
            reference = node.get("$ref")
            assert reference is None or reference.removeprefix("#/$defs/") in schema["$defs"], reference
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for value in node:
                check(value)

    check(schema)
    for section in [schema, *schema["$defs"].values()]:
        if "properties" in section:
            assert section["additionalProperties"] is False
            for name, field in section["properties"].items():
                target = schema["$defs"].get(field.get("$ref", "").removeprefix("#/$defs/"), {})
                assert "description" in field | target, name


def test_plan_shows_the_job_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_job(tmp_path, "cnn", quantize={"dtype": "int3", "observer": "minmax", "ignore": ["head"]})
    before = {p.name for p in tmp_path.iterdir()}
    assert cli.main(["plan", str(path), "--ranks", "3", "--set", "rounding.max_iter=50"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(" parameters are quantized, in 3 layers")
    lines = lines[[line.startswith("layer ") for line in lines].index(True) :]
    rows = {line.split()[0]: line.split() for line in lines[1:5]}
    assert list(rows) == ["conv", "depthwise", "up", "head"]
    # Outputs of 11 images: 6x6, 3x3 and 6x6 pixels, and one row each.
    assert rows["conv"][1:6] == ["Conv2d", "6x2x3x3", "int3", "per_channel_symmetric", "396"]
    assert rows["depthwise"][1:6] == ["Conv2d", "6x1x3x3", "int3", "per_channel_symmetric", "99"]
    assert rows["up"][1:6] == ["ConvTranspose2d", "6x4x2x2", "int3", "per_channel_symmetric", "396"]
    assert rows["head"][1:5] == ["Linear", "5x4", "float", "11"]
    text = "\n".join(lines)
    stays = {line.split()[0] for line in lines[lines.index("Parameters left in float:") + 1 :] if line[:2] == "  "}
    quantized = {"conv.weight", "depthwise.weight", "up.weight"}
    assert stays == {name for name, _ in toy_models.cnn().named_parameters()} - quantized
    assert "head.weight 5x4: ignored by quantize.ignore" in text
    assert "Samples per rank: 6, 3, 2" in text
    assert "50 steps" in text
    assert {p.name for p in tmp_path.iterdir() if p.name != "__pycache__"} == before


def _corrupt_data(folder: Path) -> None:
    (folder / "data.npz").write_bytes((folder / "data.npz").read_bytes()[:300])


def _nan_weights(folder: Path) -> None:
    state = toy_models.mlp().state_dict()
    state["first.weight"][0, 0] = math.nan
    torch.save(state, folder / "weights.pt")


def _nan_data(folder: Path) -> None:
    np.savez(folder / "data.npz", x=np.full((4, 8), np.inf, dtype=np.float32))


def _huge_weights(folder: Path) -> None:
    state = toy_models.mlp().state_dict()
    state["first.weight"][0, 0] = torch.finfo(torch.float32).max
    torch.save(state, folder / "weights.pt")


def _huge_data(folder: Path) -> None:
    x = np.zeros((4, 8), np.float32)
    x[3] = np.finfo(np.float32).max
    np.savez(folder / "data.npz", x=x)


def _weights(folder: Path) -> None:
    torch.save(toy_models.mlp().state_dict(), folder / "weights.pt")


def _flipped_weights(folder: Path) -> None:
    _weights(folder)
    weight = toy_models.mlp().state_dict()["first.weight"].numpy().tobytes()
    content = bytearray((folder / "weights.pt").read_bytes())
    content[content.index(weight)] ^= 1
    (folder / "weights.pt").write_bytes(content)


def _list_of_others(folder: Path) -> None:
    (folder / "SUMS").write_text(f"{'0' * 64}  data.npz\n", encoding="utf-8")


def _empty_list(folder: Path) -> None:
    (folder / "SUMS").write_text("", encoding="utf-8")


def _other_data(folder: Path) -> None:
    np.savez(folder / "data.npz", y=np.zeros((4, 8), np.float32), z=np.zeros((4, 8), np.float32))


def _output_is_a_file(folder: Path) -> None:
    (folder / "out").write_text("mine", encoding="utf-8")


def _finish_another_job(folder: Path) -> None:
    assert cli.main([str(folder / "job.yaml"), "--set", "runtime.seed=9"]) == 0
    for name in RESULTS:
        (folder / "out" / name).unlink()


def _nothing(folder: Path) -> None:
    pass


_CHECKED = f"{{factory: 'nets:mlp', weights: '{{}}/weights.pt', sha256: '{'0' * 64}'}}"

# (what is wrong, preparation of the folder, --set, exit code, beginning of the line, what else it says)
BAD = [
    ("unknown field", _nothing, "rounding.max_iters=5", 64, "rounding.max_iters: there is no such field", "max_iter"),
    (
        "negative iterations",
        _nothing,
        "rounding.max_iter=-3",
        64,
        "rounding.max_iter: -3 must be greater than 0",
        "use",
    ),
    ("no assignment", _nothing, "rounding.max_iter", 64, "--set 'rounding.max_iter'", "section.field=value"),
    ("group size", _nothing, "quantize={qscheme: per_group_symmetric, group_size: 3}", 64, "", "first"),
    ("no such device", _nothing, "runtime.device=cuda:99", 64, "runtime.device: cuda:99", "runtime.device=cpu"),
    ("no weights", _nothing, "model.weights=gone.pt", 65, "gone.pt", ""),
    ("no module", _nothing, "model.factory='gone:mlp'", 65, "module 'gone'", "Python's path"),
    ("no attribute", _nothing, "model.factory='nets:gone'", 65, "'nets:gone'", "no attribute"),
    ("failing factory", _nothing, "model.factory='nets:failing'", 65, "model.factory", "no weights for you"),
    ("no torch module", _nothing, "model.factory='nets:no_module'", 65, "model.factory", "torch.nn.Module"),
    ("no data", _nothing, "data.uri=gone/*.npz", 65, "gone/*.npz", "no file matches"),
    ("too few samples", _nothing, "data.num_samples=12", 65, "", "11"),
    ("damaged data", _corrupt_data, "", 65, "", "data.npz"),
    ("fields of no input", _other_data, "", 65, "", "data.fields"),
    ("weights not finite", _nan_weights, "model.weights={}/weights.pt", 65, "the model of", "not finite"),
    ("data not finite", _nan_data, "", 65, "", "data.npz, sample 0: the field 'x' is inf at (0,)"),
    ("scales not finite", _huge_weights, "model.weights={}/weights.pt", 65, "layer first: the scale of", "ignore"),
    ("activations not finite", _huge_data, "", 65, "layer first: its activations are", "sample 1 of microbatch 1"),
    ("other weights", _weights, f"model={_CHECKED}", 65, "", "weights.pt: its SHA-256 is not model.sha256"),
    ("other data", _list_of_others, "data.checksums={}/SUMS", 65, "", "data.npz: its SHA-256 is not that of"),
    ("unlisted data", _empty_list, "data.checksums={}/SUMS", 65, "", "data.npz: is not in the list"),
    ("no list", _nothing, "data.checksums={}/SUMS", 65, "", "SUMS: cannot be read: no such file"),
    ("a flipped bit in .pt", _flipped_weights, "model.weights={}/weights.pt", 65, "model.weights", "Bad CRC-32"),
    ("no checksum", _weights, "model.sha256=abc", 64, "model.sha256: 'abc' must be 64 hexadecimal digits", "sha256sum"),
    ("failing transform", _nothing, "data.transform='nets:halved'", 65, "data.transform", "KeyError"),
    ("nothing to quantize", _nothing, "quantize.ignore=[Linear]", 65, "none of the model's", "quantize.ignore"),
    ("output is a file", _output_is_a_file, "", 73, "", "out"),
    ("output on /proc", _nothing, "output.uri=/proc/adaround/out", 73, "", "/proc/adaround/out"),
    ("commits of another job", _finish_another_job, "", 65, "", "output.overwrite=true"),
]


@pytest.mark.parametrize(
    ("prepare", "assignment", "code", "start", "detail"), [case[1:] for case in BAD], ids=[case[0] for case in BAD]
)
def test_bad_input_ends_with_one_line_and_its_exit_code(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], None],
    assignment: str,
    code: int,
    start: str,
    detail: str,
) -> None:
    path = write_job(tmp_path, "mlp", rounding={"solver": "nearest"})
    prepare(tmp_path)
    capsys.readouterr()
    overrides = ["--set", assignment.replace("{}", str(tmp_path))] if assignment else []
    assert cli.main([str(path), *overrides]) == code
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if " INFO " not in line and " WARNING " not in line]
    assert len(errors) == 1, err
    assert errors[0].startswith(f"error: {start}")
    assert detail in errors[0]
    assert len(errors[0]) < 600
    assert out == ""
    assert results_and_leftovers(tmp_path) == set()
    if code == 64:
        assert not (tmp_path / "out").exists()
    if prepare is _output_is_a_file:
        assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("job", ["gone.yaml", "gone", "/", "s3x://bucket/job.yaml"])
@pytest.mark.parametrize("command", ["run", "plan", "validate"])
def test_a_job_file_that_cannot_be_read(capsys: pytest.CaptureFixture[str], command: str, job: str) -> None:
    assert cli.main([command, job]) == 64
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.skipif(sys.platform != "linux", reason="permissions of another system")
def test_an_output_without_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if _is_root():
        pytest.skip("root may write everywhere")
    path = write_job(tmp_path, "mlp", rounding={"solver": "nearest"}, output={"uri": str(tmp_path / "locked" / "out")})
    (tmp_path / "locked").mkdir(mode=0o500)
    assert cli.main([str(path)]) == 73
    assert "error: " in capsys.readouterr().err


def _is_root() -> bool:
    import os

    return os.geteuid() == 0


@pytest.mark.parametrize(
    "arguments", [[], ["run"], ["plan", "job.yaml", "--ranks", "0"], ["validate", "a.yaml", "b.yaml"]]
)
def test_wrong_use_shows_the_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("usage: ")


def _broken(*_: object) -> None:
    raise ZeroDivisionError("a bug\nof ours")


def test_a_bug_of_ours_is_one_line_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_job(tmp_path, "mlp", rounding={"solver": "nearest"})
    monkeypatch.setattr("distributed_adaround.job._export", _broken)
    assert cli.main([str(path)]) == 70
    err = capsys.readouterr().err
    line = "error: internal error, ZeroDivisionError: a bug of ours (run again with --debug and report this)"
    assert err.splitlines()[-1] == line
    assert "Traceback" not in err
    assert results_and_leftovers(tmp_path) == set()
    assert cli.main([str(path), "--debug"]) == 70
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "in _broken" in err


def test_debug_shows_where_bad_input_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--debug", str(tmp_path / "gone.yaml")]) == 64
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("error: the job file cannot be read")


def test_an_interrupt_ends_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("distributed_adaround.cli.load_spec", interrupted)
    assert cli.main(["validate", "job.yaml"]) == 130


def told(error: Exception, rank: int) -> Exception:
    error.reported_by = rank  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "rank", "line"),
    [
        (InputError("x"), 1, "error: rank 1: x"),
        (told(InputError("x"), 1), 1, "error: rank 1: x"),
        (told(InputError("x"), 0), 1, None),
        (agreed(InputError("x")), 0, "error: rank 0: x"),
        (agreed(InputError("x")), 1, None),
        (PeerError("rank 1 failed"), 0, None),
        (agreed(PeerError("lost")), 0, "error: rank 0: lost"),
        (agreed(PeerError("lost")), 1, None),
        # Before the ranks meet, each of them finds the same fault in the job file.
        (SpecError("x"), 0, "error: rank 0: x"),
        (SpecError("x"), 1, None),
        (told(SpecError("x"), 1), 1, "error: rank 1: x"),
        (OutputError("x"), 1, "error: rank 1: x"),
        (told(ValueError("x"), 0), 1, None),
        (ValueError("x"), 1, "error: rank 1: internal error, ValueError: x (run again with --debug and report this)"),
    ],
)
def test_one_rank_of_several_tells(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    error: Exception,
    rank: int,
    line: str | None,
) -> None:
    def fail(*_: object) -> None:
        raise error

    waits: list[float] = []
    monkeypatch.setattr("distributed_adaround.cli.load_spec", fail)
    monkeypatch.setattr("time.sleep", waits.append)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    assert cli.main(["validate", "job.yaml"]) == getattr(error, "exit_code", 70)
    err = capsys.readouterr().err
    if line is None:
        assert err == ""
        assert not (tmp_path / "error.json").exists()
    else:
        assert err == f"{line}\n"
        # torchrun reads this form, and shows the message where it would otherwise show a traceback.
        told_torchrun = json.loads((tmp_path / "error.json").read_text(encoding="utf-8"))["message"]
        assert told_torchrun["message"] == line.removeprefix("error: ")
        assert int(told_torchrun["extraInfo"]["timestamp"]) > 0
    # Who has nothing to tell leaves later than who has, since torchrun ends all ranks at the first that leaves.
    assert bool(waits) == (line is None or isinstance(error, PeerError))


def test_relative_paths_are_those_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only modules are searched beside the job file."""
    path = write_job(tmp_path / "jobs", "mlp", data={"uri": "here.npz"}, output={"uri": "out"})
    vectors(tmp_path / "here.npz")
    shutil.rmtree(tmp_path / "jobs" / "__pycache__", ignore_errors=True)
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(path), "--set", "rounding.solver=nearest"]) == 0
    assert (tmp_path / "out" / "report.json").exists()
    assert capsys.readouterr().out.rstrip().endswith("Results are in out")


@pytest.mark.parametrize(
    ("assignment", "path"),
    [
        ("data.uri=data.npz", "data.npz"),
        ("data.uri=[d*.npz]", "d*.npz"),
        ("data.checksums=SUMS", "SUMS"),
        ("model.weights=weights.pt", "weights.pt"),
    ],
)
def test_a_relative_path_that_leads_nowhere_is_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], assignment: str, path: str
) -> None:
    jobs, elsewhere = tmp_path / "jobs", tmp_path / "elsewhere"
    job = write_job(jobs, "mlp", rounding={"solver": "nearest"})
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    _empty_list(jobs)
    _weights(jobs)
    beside = f"it exists beside the job file in {jobs}: run the command there, or write the absolute path"
    for command in ("run", "plan"):
        assert cli.main([command, str(job), "--set", assignment]) == 65
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.endswith(f"; tried {elsewhere}/{path}; {beside}"), line
    for file in jobs.glob(path):
        file.unlink()
    assert cli.main([str(job), "--set", assignment]) == 65
    assert capsys.readouterr().err.splitlines()[-1].endswith(f"; tried {elsewhere}/{path}")


def test_a_job_file_that_is_not_there_is_named_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["validate", "gone.yaml"]) == 64
    assert capsys.readouterr().err.endswith(f"; tried {tmp_path}/gone.yaml\n")


def test_status_says_where_it_looked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = write_job(tmp_path / "jobs", "mlp", output={"uri": "out"}, rounding={"solver": "nearest"})
    monkeypatch.chdir(job.parent)
    assert cli.main(["status", str(job)]) == 75
    assert capsys.readouterr().out == f"not started: no status of this job in {job.parent}/out\n"
    assert cli.main([str(job)]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert cli.main(["status", str(job)]) == 75
    start = f"not started: no status of this job in {tmp_path}/out; it exists beside the job file in {job.parent}: "
    assert capsys.readouterr().out.startswith(start)
    assert cli.main(["status", str(job), "--set", "output.uri=memory://k:hunter2@b/out"]) == 75
    assert capsys.readouterr().out == "not started: no status of this job in memory://b/out\n"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"'{sys.executable}' -m distributed_adaround schema | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (ended.stdout.strip() in ("0", "141"), ended.stderr) == (True, ""), ended
