"""`export` and `verify` on outputs of finished jobs, as commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import hf_directories
import pytest
import safetensors.torch
import transformers
from rank_pool import RankPool
from sample_jobs import write_job

from distributed_adaround.cli import main
from distributed_adaround.convert import export_output, verify_output
from distributed_adaround.errors import InputError, SpecError
from distributed_adaround.files.job_file import load_spec
from distributed_adaround.job import run_job
from distributed_adaround.spec.job import JobSpec

# What the libraries warn about is not ours.
pytestmark = pytest.mark.filterwarnings("ignore")

# Starts a command and kills it before the file of that number is renamed to its name.
KILLED = """
import os, signal, sys
replace, left = os.replace, [int(sys.argv[1])]
def counted(*names):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*names)
os.replace = counted
from distributed_adaround.cli import main
sys.exit(main(sys.argv[2:]))
"""


def job(folder: Path, out: Path, formats: Sequence[str] = ("safetensors",), **quantize: str) -> JobSpec:
    """On the model and the text in a folder."""
    return JobSpec(
        model={"hf": str(folder / "model")},
        data={"uri": str(folder / "words.txt"), "text": {"sequence_length": 16}, "microbatch_size": 8},
        quantize={"dtype": "int4", "qscheme": "per_group_symmetric", "group_size": 32, **quantize},
        rounding={"solver": "nearest"},
        output={"uri": str(out), "formats": list(formats)},
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished job on a tiny Llama in several shards: model, text and output."""
    folder = tmp_path_factory.mktemp("finished")
    hf_directories.llama(folder / "model", shard_size="20KB")
    hf_directories.text(folder / "words.txt", 400)
    table = run_job(job(folder, folder / "out", formats=["compressed_tensors", "huggingface"]))
    assert [(one.format, one.ok) for one in table.exports] == [("compressed_tensors", True), ("huggingface", True)]
    assert "compressed_tensors" in str(table)
    return folder


def run(spec: str) -> None:
    run_job(JobSpec.model_validate_json(spec))


def test_two_ranks_write_the_same_files(finished: Path, tmp_path: Path, pool: RankPool) -> None:
    """Rank 0 alone reads them again; compressed-tensors would wait for the other rank if it knew of it."""
    formats = ["compressed_tensors", "huggingface"]
    pool.run(run, 2, job(finished, tmp_path / "out", formats).model_dump_json())
    names = [path.name for path in (finished / "out").glob("quantized*")]
    assert len(names) == 2
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (finished / "out" / name).read_bytes(), name
    for name in formats:
        assert contents(tmp_path / "out" / name) == contents(finished / "out" / name)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """The output with nothing but the codes and the job file."""
    shutil.copytree(finished / "out", tmp_path / "out")
    for name in ("compressed_tensors", "huggingface"):
        shutil.rmtree(tmp_path / "out" / name)
    return tmp_path / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_job_gives_the_same_files_without_being_run_again(
    finished: Path, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    formats = [word for name in ("compressed_tensors", "huggingface") for word in ("--format", name)]
    assert main(["export", str(copied), *formats]) == 0
    assert "Results are in" in capsys.readouterr().out
    for name in ("compressed_tensors", "huggingface"):
        assert contents(copied / name) == contents(finished / "out" / name)
    # A second time, over what is there.
    assert main(["export", str(copied), "--format", "huggingface", "--verify"]) == 0
    assert contents(copied / "huggingface") == contents(finished / "out" / "huggingface")
    words = capsys.readouterr().out.split()
    assert words[: words.index("Results")].count("huggingface") == 1


def test_verify_reads_all_that_is_there_and_finds_what_differs(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    assert main(["verify", str(out)]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["format", "weights", "different", "outputs"]
    assert [row.split()[:3] for row in rows] == [
        ["safetensors", "12", "0"], ["huggingface", "12", "0"], ["compressed_tensors", "12", "0"]
    ]  # fmt: skip
    # One weight of one format: what it says is no longer what was solved.
    index = json.loads((out / "huggingface" / "model.safetensors.index.json").read_text())["weight_map"]
    path = out / "huggingface" / index["model.layers.0.mlp.up_proj.weight"]
    tensors = safetensors.torch.load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    assert main(["verify", str(out)]) == InputError.exit_code
    assert "huggingface cannot be trusted: read again, 1 of 12 weights differ" in capsys.readouterr().err


def test_an_output_in_an_object_store(finished: Path, copied: Path) -> None:
    store, uri = fsspec.filesystem("memory"), "memory://convert-test/out"
    try:
        store.put(str(copied) + "/", "/convert-test/out/", recursive=True)
        export_output(uri, ["compressed_tensors"])
        for name, data in contents(finished / "out" / "compressed_tensors").items():
            assert store.cat_file(f"/convert-test/out/compressed_tensors/{name}") == data, name
        assert all(one.ok for one in verify_output(uri))
    finally:
        store.rm("/convert-test", recursive=True)


def killed(number: int, out: Path, form: str, *overrides: str) -> int:
    command = [sys.executable, "-c", KILLED, str(number), "export", str(out), "--format", form]
    command += [f"--set={override}" for override in overrides]
    return subprocess.run(command, capture_output=True, check=False).returncode


def test_a_kill_leaves_nothing_half_published_and_a_restart_gives_the_same_bytes(finished: Path, copied: Path) -> None:
    # In the middle of the shards; each of them is followed by a note of the progress.
    assert killed(5, copied, "compressed_tensors") == -signal.SIGKILL
    folder = copied / "compressed_tensors"
    shards = {path.name: path.stat().st_mtime_ns for path in folder.glob("model-*.safetensors")}
    assert len(shards) >= 2
    assert not (folder / "config.json").exists()
    assert not (folder / "model.safetensors.index.json").exists()
    export_output(str(copied), ["compressed_tensors"])
    # Whole shards were taken as they were.
    whole = dict(sorted(shards.items())[:2])
    assert whole == {name: (folder / name).stat().st_mtime_ns for name in whole}
    assert contents(folder) == contents(finished / "out" / "compressed_tensors")


FORMS = ["compressed_tensors", "huggingface", "dequantized", "onnx", "gguf", "program", "torchao"]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_kills_at_every_file(form: str, finished: Path, copied: Path, tmp_path: Path) -> None:
    more = []
    if form == "gguf":
        # Scales of the job are float32, and GGUF has float16 ones.
        more = [f"output.base_gguf={tmp_path / 'base.gguf'}"]
        gguf_base = pytest.importorskip("gguf_base")
        model = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
        gguf_base.write_base(model, tmp_path / "base.gguf")
        run_job(job(finished, tmp_path / "halves", scale_dtype="float16"))
        shutil.rmtree(copied)
        shutil.move(tmp_path / "halves", copied)
    shutil.copytree(copied, tmp_path / "whole")
    export_output(str(tmp_path / "whole"), [form], more)
    expected = contents(tmp_path / "whole")
    number = 0
    while killed(number, copied, form, *more) == -signal.SIGKILL:
        # Whatever is there loads as what it is, or not at all.
        assert all(one.ok for one in verify_output(str(copied), more) if one.format == form)
        number += 1
    assert number
    assert contents(copied) == expected


def test_what_is_no_finished_job_is_told_in_one_line(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error(*arguments: str, code: int = InputError.exit_code) -> str:
        assert main([*arguments]) == code
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert "holds no job.yaml" in error("export", str(tmp_path), "--format", "dequantized")
    assert "holds no job.yaml" in error("verify", str(tmp_path / "nowhere"))
    line = error("export", str(copied), "--format", "gguf", code=SpecError.exit_code)
    assert "base_gguf" in line
    moved = f"--set=model.hf={tmp_path / 'moved'}"
    assert "no such folder" in error("export", str(copied), "--format", "huggingface", moved)
    (copied / "quantized.json").unlink()
    assert "run the job to its end first" in error("verify", str(copied))
    assert "run the job to its end first" in error("export", str(copied), "--format", "dequantized")


def test_another_model_is_refused(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = hf_directories.llama(tmp_path / "other", num_hidden_layers=2)
    assert main(["verify", str(copied), f"--set=model.hf={other}"]) == InputError.exit_code
    assert "the model is not the one that was quantized" in capsys.readouterr().err


REFUSED = [
    ("compressed_tensors", {"qscheme": "per_tensor_symmetric"}, "qscheme: per_channel_symmetric"),
    ("gguf", {"qscheme": "per_tensor_symmetric"}, "quantize.group_size to 32"),
    ("onnx", {"dtype": "fp4"}, "use dtype int4 or fp8"),
    ("torchao", {"dtype": "fp8"}, "set quantize.dtype to int2 to int8"),
]


@pytest.mark.parametrize(
    ("form", "changes", "words"),
    [pytest.param(*case, marks=[] if case[0] == "onnx" else pytest.mark.slow) for case in REFUSED],
)
def test_a_job_is_refused_before_its_first_layer(
    form: str, changes: dict[str, str], words: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gguf_base = pytest.importorskip("gguf_base")
    sections: dict[str, Any] = {
        "model": {"hf": str(finished / "model")},
        "data": {"uri": str(finished / "words.txt"), "text": {"sequence_length": 16}, "max_samples": 2},
        "quantize": changes,
        "output": {"uri": str(tmp_path / "out"), "formats": [form]},
    }
    if form == "gguf":
        model = transformers.AutoModelForCausalLM.from_pretrained(finished / "model")
        sections["output"]["base_gguf"] = str(gguf_base.write_base(model, tmp_path / "base.gguf"))
    (tmp_path / "job.json").write_text(json.dumps(sections))
    assert main(["run", str(tmp_path / "job.json")]) == SpecError.exit_code == 64
    *_, line = capsys.readouterr().err.splitlines()
    assert f"output.formats: {form}" in line or f"output.formats {form}" in line
    assert words in line
    assert not (tmp_path / "out" / "commits").exists()


@pytest.fixture
def factory_job(tmp_path: Path) -> Iterator[Path]:
    """A finished job on a module of a factory; what it names lies in the current folder."""
    before = Path.cwd()
    path = write_job(tmp_path, "cnn", rounding={"solver": "nearest"})
    run_job(load_spec(str(path)), tmp_path)
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def test_the_job_of_a_factory(factory_job: Path) -> None:
    before = (factory_job / "out" / "dequantized.safetensors").read_bytes()
    (factory_job / "out" / "dequantized.safetensors").unlink()
    export_output("out", ["dequantized"], check=True)
    assert (factory_job / "out" / "dequantized.safetensors").read_bytes() == before
    with pytest.raises(SpecError, match=r"writes a model\.hf directory again"):
        export_output("out", ["compressed_tensors"])
