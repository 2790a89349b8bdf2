"""Linters of shell scripts and Dockerfiles find nothing, and find something where there is something."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from distributed_adaround import __version__

TOOLS = Path(sys.executable).parent
ROOT = Path(__file__).parents[2]
SCRIPTS = [
    "launch/torchrun.sh",
    "docker/entrypoint.sh",
    "launch/slurm/digits.sbatch",
    "launch/slurm/digits-container.sbatch",
]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shellcheck_finds_nothing(script: str) -> None:
    ended = subprocess.run([TOOLS / "shellcheck", ROOT / script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout


def test_hadolint_finds_nothing() -> None:
    ended = subprocess.run(
        [TOOLS / "hadolint", ROOT / "docker" / "Dockerfile"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout


def test_linters_find_faults(tmp_path: Path) -> None:
    (tmp_path / "a.sh").write_text("#!/bin/bash\nrm $1\n", encoding="utf-8")
    (tmp_path / "Dockerfile").write_text("FROM debian:latest\nRUN cd /tmp\n", encoding="utf-8")
    for command in ([TOOLS / "shellcheck", tmp_path / "a.sh"], [TOOLS / "hadolint", tmp_path / "Dockerfile"]):
        assert subprocess.run(command, capture_output=True, check=False).returncode == 1


def test_the_build_context_holds_what_the_dockerfile_copies_and_no_more() -> None:
    """.dockerignore shuts everything out, then lets these in."""
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    copied = set()
    for words in re.findall(r"^COPY (?!--from)(.*)$", dockerfile, re.M):
        copied |= {word for word in words.split()[:-1] if not word.startswith("--")}
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert next(line for line in lines if line and line[0] != "#") == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_image_names_the_version_of_the_package() -> None:
    assert f"\nARG VERSION={__version__}\n" in (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def test_the_image_runs_as_nobody_special() -> None:
    last = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8").rpartition("\nFROM ")[2]
    assert "\nUSER 10001:10001\n" in last
    assert '\nENTRYPOINT ["adaround"]\n' in last
