"""Exported programs: ordinary ones load, and whatever could run code is refused before it does."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from distributed_adaround.errors import InputError
from distributed_adaround.model.source import load_program


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


class Bomb:
    """Creates a folder when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.trace),)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.ones(3, 1), persistent=False)

    def forward(self, x: Tensor, options: dict[str, Tensor]) -> Tensor:
        y = self.norm(self.conv(x)) * self.table + torch.tensor([0.5])
        return y.reshape(x.shape[0], -1)[:, : x.shape[2] // 2] * x.shape[0] + options["shift"]


def small() -> nn.Module:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "small.pt2"
    example = (torch.randn(3, 2, 8), {"shift": torch.ones(1)})
    shapes = ({0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC}, {"shift": None})
    torch.export.save(torch.export.export(small(), example, dynamic_shapes=shapes), path)
    return path


def rewrite(
    source: Path, target: Path, edit: Callable[[str, bytes], bytes], add: dict[str, bytes] | None = None
) -> Path:
    """A copy of a .pt2 with its records edited, in the layout that torch's reader needs (stored, not compressed)."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            new.writestr(name, edit(name.removeprefix(f"{root}/"), old.read(name)))
        for name, data in (add or {}).items():
            new.writestr(f"{root}/{name}", data)
    return target


def edit_graph(old: str, new: str) -> Callable[[str, bytes], bytes]:
    def edit(name: str, data: bytes) -> bytes:
        if name != "models/model.json":
            return data
        text = data.decode()
        assert old in text
        return text.replace(old, new).encode()

    return edit


def test_a_program_is_loaded(program: Path, tmp_path: Path) -> None:
    loaded = load_program(program)
    x = torch.randn(5, 2, 10)
    expected = small()(x, {"shift": torch.ones(1)})
    torch.testing.assert_close(loaded.module()(x, {"shift": torch.ones(1)}), expected)
    copied = rewrite(program, tmp_path / "copy.pt2", lambda _, data: data)  # the editing below breaks nothing itself
    torch.testing.assert_close(load_program(copied).module()(x, {"shift": torch.ones(1)}), expected)


SYMBOL = "Symbol('s77', positive=True, integer=True)"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("torch.ops.aten.conv1d.default", "torch.os.mkdir"),
        ("torch.ops.aten.conv1d.default", "torch.ops.load_library"),
        ("torch.ops.aten.conv1d.default", "torch.ops.aten.from_file.default"),
        ("torch.ops.aten.conv1d.default", "torch.ops.aten.conv1d.default.__class__"),
        ("torch.ops.aten.conv1d.default", "#extension:conv1d"),
        ("_operator.floordiv", "_operator.methodcaller"),
        (SYMBOL, "__import__('os').mkdir('TRACE')"),
        (SYMBOL, 'Max(\'__import__(\\"os\\").mkdir(\\"TRACE\\")\')'),
        (SYMBOL, "Symbol('s77').__class__"),
        ('"name": "p_conv_weight"', '"name": "p_conv_weight=__import__(1)"'),
        ('\\"builtins.dict\\"', '\\"__enum__\\"'),
    ],
)
def test_a_program_that_could_run_code_is_refused(program: Path, tmp_path: Path, old: str, new: str) -> None:
    trace = tmp_path / "exploded"
    edit = edit_graph(old, new.replace("TRACE", str(trace)))
    bad = rewrite(program, tmp_path / "bad.pt2", edit)
    assert "is refused: its graph contains" in error_of(lambda: load_program(bad))
    assert not trace.exists()


def test_pickles_in_a_program_are_refused(program: Path, tmp_path: Path) -> None:
    trace = tmp_path / "exploded"
    buffer = io.BytesIO()
    torch.save((Bomb(trace),), buffer)
    bomb = buffer.getvalue()

    def in_inputs(name: str, data: bytes) -> bytes:
        return bomb if name == "data/sample_inputs/model.pt" else data

    def in_weights(name: str, data: bytes) -> bytes:
        if name != "data/weights/model_weights_config.json":
            return bomb if name == "data/weights/weight_0" else data
        config = json.loads(data)
        for payload in config["config"].values():
            payload["use_pickle"] |= payload["path_name"] == "weight_0"
        return json.dumps(config).encode()

    def unchanged(_: str, data: bytes) -> bytes:
        return data

    def message(edit: Callable[[str, bytes], bytes], add: dict[str, bytes] | None = None) -> str:
        return error_of(lambda: load_program(rewrite(program, tmp_path / "bad.pt2", edit, add)))

    assert "example inputs hold more than tensors" in message(in_inputs)
    assert "is stored as a pickle" in message(in_weights)
    assert "data/weights/model.pt" in message(unchanged, {"data/weights/model.pt": bomb})
    assert "custom_obj_0" in message(unchanged, {"data/constants/custom_obj_0": bomb})
    assert "aotinductor" in message(unchanged, {"data/aotinductor/model/a.so": b""})
    old_format = tmp_path / "old.pt2"
    with zipfile.ZipFile(old_format, "w") as archive:
        archive.writestr("version", "8.0")
        archive.writestr("serialized_state_dict.pt", bomb)
    assert "torch 2.7 and older" in error_of(lambda: load_program(old_format))
    assert not trace.exists()


def test_guard_code_of_a_program_never_runs(program: Path, tmp_path: Path) -> None:
    trace = tmp_path / "exploded"

    def edit(name: str, data: bytes) -> bytes:
        if name != "models/model.json":
            return data
        model = json.loads(data)
        model["guards_code"] = [f"__import__('os').mkdir('{trace}') is None"]
        return json.dumps(model).encode()

    module = load_program(rewrite(program, tmp_path / "guard.pt2", edit)).module()
    module(torch.randn(5, 2, 10), {"shift": torch.ones(1)})
    assert not trace.exists()


def test_unreadable_programs(program: Path, tmp_path: Path) -> None:
    assert "cannot be read: No such file" in error_of(lambda: load_program(tmp_path / "absent.pt2"))
    (tmp_path / "text.pt2").write_text("hello")
    assert "is not a program of torch.export.save" in error_of(lambda: load_program(tmp_path / "text.pt2"))
    (tmp_path / "half.pt2").write_bytes(program.read_bytes()[:2000])
    assert "is damaged: File is not a zip file" in error_of(lambda: load_program(tmp_path / "half.pt2"))
    torch.save(Small().state_dict(), tmp_path / "weights.pt2")
    assert "is refused" in error_of(lambda: load_program(tmp_path / "weights.pt2"))


def test_a_program_with_weights_that_are_not_finite(tmp_path: Path) -> None:
    layer = nn.Linear(2, 2)
    layer.weight.data[0, 0] = float("inf")
    torch.export.save(torch.export.export(layer, (torch.ones(2, 2),)), tmp_path / "inf.pt2")
    assert "not finite: in weight" in error_of(lambda: load_program(tmp_path / "inf.pt2"))
