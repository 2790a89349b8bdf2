"""README, CI, constraints and package metadata agree with one another."""

import os
import re
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from distributed_adaround import errors

ROOT = Path(__file__).parents[1]


def _commands() -> list[str]:
    """The README's one-line commands that begin with a virtual environment."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("(python3.11 -m venv")]


def test_ci_runs_the_second_command_of_the_readme() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    commands = [line for line in script.read_text(encoding="utf-8").splitlines() if "pip install" in line]
    assert commands == _commands()[1:]


def test_both_commands_use_the_constraints() -> None:
    first, second = _commands()
    assert "-c constraints.txt" in first
    assert first.endswith("-m distributed_adaround.examples.digits")
    assert "-c constraints.txt" in second


def test_constraints_pin_every_requirement_within_its_range() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines if line and line[0] != "#")
    pins = {canonicalize_name(name): Version(version) for name, version in pins.items()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for text in chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(text)
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_torch_is_pinned_for_cpu_and_cuda_builds() -> None:
    assert "\ntorch==2.13.0\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_every_exit_code_is_explained() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    classes = [errors.AdaRoundError, errors.SpecError, errors.InputError, errors.OutputError, errors.PeerError]
    for code in {cls.exit_code for cls in classes}:
        assert f"\n| {code} | " in readme
