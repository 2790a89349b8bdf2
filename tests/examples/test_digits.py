"""The shipped example: its data, weights, job file and table are what the docstrings say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from distributed_adaround.examples.digits import __main__ as example
from distributed_adaround.examples.digits import data, train
from distributed_adaround.files.job_file import load_spec


def test_images_are_those_of_sklearn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = data.load()
    digits = datasets.load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert torch.equal(images[:, 0] * 16, torch.tensor(digits.images, dtype=torch.float32))
    assert torch.equal(labels, torch.tensor(digits.target))


def test_calibration_holds_training_images_only(tmp_path: Path) -> None:
    data.write_calibration(tmp_path / "calibration.npz")
    calibration = np.load(tmp_path / "calibration.npz")["images"]
    assert calibration.shape == (512, 1, 8, 8)
    assert calibration.dtype == np.float32
    assert np.array_equal(calibration, data.training()[0][:512].numpy())
    # No image occurs twice in the data set, so equal pixels would mean the same sample.
    held_out = {image.numpy().tobytes() for image in data.held_out()[0]}
    assert len(held_out) == 540
    assert not held_out & {image.tobytes() for image in calibration}


def test_weights_reach_the_accuracy_of_the_training_script() -> None:
    assert example.top1(train.WEIGHTS) == pytest.approx(528 / 540, abs=2 / 540)


def test_weights_are_those_that_training_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "NUM_EPOCHS", 1)
    torch.set_num_threads(1)
    for name in ("a", "b"):
        save_file(train.train().state_dict(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    written, shipped = load_file(tmp_path / "a"), load_file(train.WEIGHTS)
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in shipped.items()
    }


def test_prepare_writes_a_job_that_is_valid_and_whole(tmp_path: Path) -> None:
    assert example.main(["prepare", "--folder", str(tmp_path / "job")]) == 0
    spec = load_spec(str(tmp_path / "job" / "job.yaml"))
    assert spec.quantize.dtype == "int3"
    assert spec.model.weights is not None
    assert isinstance(spec.data.uri, str)
    assert (tmp_path / "job" / spec.model.weights).read_bytes() == train.WEIGHTS.read_bytes()
    assert (tmp_path / "job" / spec.data.uri).exists()
    assert spec.output.uri in example.JOBS
    for name, options in example.JOBS.items():
        job = load_spec(str(tmp_path / "job" / "job.yaml"), [option for option in options if option != "--set"])
        assert job.output.uri == name


def test_prepare_gives_the_same_bytes_again(tmp_path: Path) -> None:
    for name in ("a", "b"):
        example.prepare(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_evaluate_prints_one_row_per_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example.prepare(tmp_path)
    state = load_file(train.WEIGHTS)
    for name in example.JOBS:
        example.checkpoint(tmp_path, name).parent.mkdir()
        save_file(state, example.checkpoint(tmp_path, name))
    # A network that always says 0 names the zeros correctly, and nothing else.
    state["head.weight"] = torch.zeros_like(state["head.weight"])
    state["head.bias"] = torch.eye(10)[0]
    save_file(state, example.checkpoint(tmp_path, "nearest"))
    share_of_zeros = 100 * (data.held_out()[1] == 0).float().mean().item()

    assert example.main(["evaluate", "--folder", str(tmp_path)]) == 0
    title, *rows = capsys.readouterr().out.splitlines()
    assert "540" in title
    top1 = {name: float(value) for name, value, _ in (row.split() for row in rows)}
    assert list(top1) == ["float", "nearest", "AdaRound"]
    assert top1["nearest"] == pytest.approx(share_of_zeros, abs=0.006)
    assert top1["float"] == top1["AdaRound"] > 95


def test_evaluate_without_results_says_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert example.main(["evaluate", "--folder", str(tmp_path)]) == 65
    assert "run the jobs first" in capsys.readouterr().err
