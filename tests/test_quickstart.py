"""From a model directory to a job in one command: `quantize`, on one rank and on two, and `init`."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hf_directories import WORDS, llama, text
from rank_pool import RankPool

from distributed_adaround import cli
from distributed_adaround.errors import InputError, SpecError
from distributed_adaround.quickstart import Directory, Request, job_of
from distributed_adaround.spec.job import JobSpec
from distributed_adaround.spec.load import parse_job

pytestmark = pytest.mark.filterwarnings("ignore")
LENGTH = 16
FEW = ["--set", "rounding.sweeps=3", "--set", "rounding.starts=1", "--set", "runtime.threads=1"]
WEIGHTS = "quantized.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model, a text, and another one."""
    made = tmp_path_factory.mktemp("quickstart")
    llama(made / "tiny")
    text(made / "words.txt", 40 * LENGTH + 5)
    text(made / "other.txt", 10 * LENGTH, seed=1)
    return made


def command(folder: Path, out: str, *more: str) -> list[str]:
    data = ["--data", str(folder / "words.txt"), "--sequence-length", str(LENGTH), "--samples", "24"]
    return ["quantize", str(folder / "tiny"), *data, "--out", str(folder / out), *FEW, *more]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def done(folder: Path) -> Path:
    """The output of the command in this process."""
    more = ["--dtype", "int4", "--group-size", "16", "--evaluate", str(folder / "other.txt")]
    assert cli.main(command(folder, "out", *more)) == 0
    return folder / "out"


def test_a_directory_that_loads_and_a_report_with_its_perplexity(folder: Path, done: Path) -> None:
    report = json.loads((done / "report.json").read_text(encoding="utf-8"))
    assert len(report["layers"]) == 7
    assert {layer["format"] for layer in report["layers"]} == {"int4 per_group_symmetric 16"}
    left = {each["name"]: each["reason"] for each in report["float_parameters"]}
    assert "head of a language model" in left["lm_head.weight"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(done / "huggingface").eval()
    # Against transformers' own loss, over the windows of the other text.
    ids = torch.tensor([WORDS.index(word) for word in (folder / "other.txt").read_text().split()]).view(-1, LENGTH)
    original = transformers.AutoModelForCausalLM.from_pretrained(folder / "tiny").eval()
    with torch.no_grad():
        expected = [float(model(input_ids=ids, labels=ids).loss.exp()) for model in (original, loaded)]
    (metric,) = report["metrics"]
    assert [metric["float_value"], metric["quantized_value"]] == pytest.approx(expected, rel=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(done / "huggingface")
    assert tokenizer("the of")["input_ids"] == [WORDS.index("the"), WORDS.index("of")]


def test_the_job_file_in_the_output_is_what_ran(folder: Path, done: Path) -> None:
    again = ["run", str(done / "job.yaml"), "--set", f"output.uri={folder / 'again'}"]
    assert cli.main(again) == 0
    assert digest(folder / "again" / WEIGHTS) == digest(done / WEIGHTS)


def run_on_rank(arguments: list[str]) -> int:
    return cli.main(arguments)


def test_two_ranks_write_the_same_bytes(pool: RankPool, folder: Path, done: Path) -> None:
    more = ["--dtype", "int4", "--group-size", "16", "--evaluate", str(folder / "other.txt")]
    assert pool.run(run_on_rank, 2, command(folder, "two", *more)) == [0, 0]
    assert digest(folder / "two" / WEIGHTS) == digest(done / WEIGHTS)
    first, second = ((place / "job.yaml").read_text() for place in (done, folder / "two"))
    assert second == first.replace(str(done), str(folder / "two"))


def test_the_figures_of_a_factory_on_the_same_samples(folder: Path, done: Path, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        f"from transformers import AutoModelForCausalLM\n"
        f"def build():\n    return AutoModelForCausalLM.from_pretrained({str(folder / 'tiny')!r})\n"
    )
    ids = [WORDS.index(word) for word in (folder / "words.txt").read_text().split()]
    windows = np.array(ids[: 40 * LENGTH]).reshape(-1, LENGTH)
    np.savez(tmp_path / "data.npz", input_ids=windows[[i * 40 // 24 for i in range(24)]])
    job = {
        "model": {"factory": "own:build"},
        "data": {"uri": str(tmp_path / "data.npz"), "microbatch_size": 4},
        "quantize": {"dtype": "int4", "qscheme": "per_group_symmetric", "group_size": 16},
        "rounding": {"solver": "gram", "sweeps": 3, "starts": 1},
        "output": {"uri": str(tmp_path / "out")},
        "runtime": {"threads": 1},
    }
    (tmp_path / "job.json").write_text(json.dumps(job))
    assert cli.main([str(tmp_path / "job.json")]) == 0
    assert digest(tmp_path / "out" / WEIGHTS) == digest(done / WEIGHTS)


def test_init_prints_a_job_that_can_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", str(folder / "words.txt"), "--sequence-length", str(LENGTH), "--samples", "24"]
    few = ["--set", "rounding.sweeps=3", "--set", "rounding.starts=1"]
    assert cli.main(["init", str(folder / "tiny"), *options, *few]) == 0
    printed = capsys.readouterr().out
    spec = JobSpec(**parse_job("job.yaml", printed.encode()))
    assert spec.model.hf == str(folder / "tiny")
    assert (spec.quantize.dtype, spec.quantize.group_size) == ("int4", 32)
    assert spec.data.text is not None
    assert spec.output.uri == "tiny-int4"
    assert (spec.rounding.sweeps, spec.rounding.starts) == (3, 1)
    comments = [line for line in printed.splitlines() if line.startswith("#")]
    assert all(len(line) <= 120 for line in printed.splitlines())
    said = " ".join(comments)
    for words in ("LlamaForCausalLM", "parameters are quantized, in 7 layers", "lm_head.weight", "MiB of activations"):
        assert words in said, words


def test_init_without_data_makes_some_up(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--set", "rounding.sweeps=3", "--set", "rounding.starts=1"]
    assert cli.main(["init", str(folder / "tiny"), "--dtype", "int8", "--sequence-length", str(LENGTH), *few]) == 0
    printed = capsys.readouterr().out
    spec = JobSpec(**parse_job("job.yaml", printed.encode()))
    assert spec.data.uri == "calibration.txt"
    assert spec.data.text is not None
    assert "on data that were made up" in printed


def directory(tmp_path: Path, architecture: str, processor: dict[str, Any] | None = None) -> str:
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    if processor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("architecture", "processor", "names", "kind", "metric"),
    [
        ("LlamaForCausalLM", None, ["a.txt"], "text", "perplexity"),
        ("LlamaForCausalLM", None, ["a.jsonl"], "text", "perplexity"),
        ("LlamaForCausalLM", None, ["a.npz"], None, "perplexity"),
        ("BertModel", None, ["a.parquet"], "text", "similarity"),
        ("ViTForImageClassification", {"image_processor_type": "x"}, ["a/b.jpg", "a/c.PNG"], "images", "accuracy"),
        ("ViTModel", {"image_processor_type": "x"}, ["a.tar"], "images", "similarity"),
        ("ViTModel", {"image_processor_type": "x"}, ["a.parquet"], None, "similarity"),
        ("WhisperForConditionalGeneration", {"feature_extractor_type": "x"}, ["a.tar"], "audio", "perplexity"),
        ("Wav2Vec2Model", {"feature_extractor_type": "x"}, ["a.wav"], "audio", "similarity"),
    ],
)
def test_what_is_chosen_for_a_model_and_its_data(
    architecture: str, processor: Any, names: list[str], kind: str | None, metric: str, tmp_path: Path
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    given = [str(tmp_path / name) for name in names]
    request = Request(directory(tmp_path / "model", architecture, processor), given, evaluate=given)
    spec = job_of(request)
    sections = {name for name in ("text", "images", "audio") if getattr(spec.data, name) is not None}
    assert sections == ({kind} if kind else set())
    assert spec.evaluate is not None
    assert spec.evaluate.metric == metric
    assert spec.output.uri == "model-int4"
    assert Directory.read(request.directory).architecture == architecture


def test_what_does_not_fit_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(SpecError, match=r"--sequence-length: 8 is for texts, and the data are arrays; remove it"):
        job_of(Request(str(folder / "tiny"), [str(tmp_path / "x.npy")], sequence_length=8))
    assert cli.main(command(folder, "bad", "--group-size", "24")) == 64
    assert "quantize.group_size: 24 must divide the 32 inputs" in capsys.readouterr().err
    assert not (folder / "bad").exists()
    with pytest.raises(InputError, match=r"none.txt: no file matches"):
        job_of(Request(str(folder / "tiny"), [str(tmp_path / "none.txt")]))
    without = Path(shutil.copytree(folder / "tiny", tmp_path / "without"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (without / name).unlink()
    assert cli.main(["quantize", str(without), "--data", str(folder / "words.txt"), "--out", str(tmp_path / "o")]) == 65
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "tokenizer" in error
    assert not (tmp_path / "o").exists()
