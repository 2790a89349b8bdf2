"""Saved states of solvers: what comes back is what was saved, by the same job, or nothing."""

import logging
from pathlib import Path

import pytest
import torch

from distributed_adaround.checkpoint.layer_files import SolverStates
from distributed_adaround.errors import OutputError

JOB = {"model": "a", "data": "b", "spec": "c"}
STATE = {"alpha": torch.arange(6, dtype=torch.float32).view(2, 3), "step": torch.tensor(200)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An output with one state; returns its file."""
    SolverStates(str(tmp_path), JOB).save("block.0/../conv", "minibatch", STATE)
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    return path


def load(folder: Path, job: dict[str, str] = JOB, layer: str = "block.0/../conv", key: str = "minibatch") -> object:
    return SolverStates(str(folder), job).load(layer, key)


def test_a_state_comes_back_bit_by_bit(saved: Path, tmp_path: Path) -> None:
    found = load(tmp_path)
    assert isinstance(found, dict)
    assert found.keys() == STATE.keys()
    for name, tensor in found.items():
        assert tensor.dtype == STATE[name].dtype
        assert torch.equal(tensor, STATE[name])


def test_a_layer_whose_name_holds_a_path_stays_in_the_folder(saved: Path, tmp_path: Path) -> None:
    assert saved.parent.parent == tmp_path / "commits" / "state"


@pytest.mark.parametrize("name", ["other", "block.0/.._conv", "block.0_.._conv", "x" * 400])
def test_another_layer_has_none(saved: Path, tmp_path: Path, name: str) -> None:
    assert load(tmp_path, layer=name) is None
    SolverStates(str(tmp_path), JOB).save(name, "minibatch", {"alpha": torch.ones(1)})
    assert load(tmp_path, layer=name) is not None
    found = load(tmp_path)
    assert isinstance(found, dict)
    assert torch.equal(found["alpha"], STATE["alpha"])


def test_another_key_has_none(saved: Path, tmp_path: Path) -> None:
    assert load(tmp_path, key="gram-0") is None


def test_a_state_of_another_job_is_left_out(saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "distributed_adaround"):
        assert load(tmp_path, JOB | {"spec": "d"}) is None
    assert "starts anew" in caplog.text


def test_a_state_of_another_place_is_left_out(saved: Path, tmp_path: Path) -> None:
    SolverStates(str(tmp_path), JOB).save("other", "minibatch", STATE)
    (other,) = [path for path in tmp_path.rglob("*") if path.is_file() and path != saved]
    other.write_bytes(saved.read_bytes())
    assert load(tmp_path, layer="other") is None


def test_no_changed_byte_goes_unnoticed(saved: Path, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        saved.write_bytes(changed)
        assert load(tmp_path) is None
    for length in range(0, len(data), 7):
        saved.write_bytes(data[:length])
        assert load(tmp_path) is None


def test_states_saved_in_this_run_are_not_asked_for(tmp_path: Path) -> None:
    """Only a restart reads them: asking a store for every block of every layer would take its time."""
    states = SolverStates(str(tmp_path), JOB)
    states.save("conv", "gram-0", STATE)
    assert states.load("conv", "gram-0") is None
    assert load(tmp_path, layer="conv", key="gram-0") is not None


def test_clear_removes_all_states_and_may_be_repeated(saved: Path, tmp_path: Path) -> None:
    states = SolverStates(str(tmp_path), JOB)
    states.clear()
    states.clear()
    assert not (tmp_path / "commits" / "state").exists()


def test_an_output_that_cannot_be_written(tmp_path: Path) -> None:
    states = SolverStates(str(tmp_path / "out"), JOB)
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError):
        states.save("conv", "minibatch", STATE)
