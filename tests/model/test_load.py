"""Loading models from real files, and every way in which that can fail for a user: one line each."""

from __future__ import annotations

import logging
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from distributed_adaround.data.microbatches import bind_inputs, call_transform
from distributed_adaround.errors import InputError
from distributed_adaround.model.source import OpenedModel, load_factory
from distributed_adaround.model.weights import model_digest
from distributed_adaround.runtime.imports import load_callable

FACTORIES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, 2)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))

    @classmethod
    def wide(cls):
        return cls(width=8)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight

class Unsaved(nn.Linear):
    def __init__(self):
        super().__init__(4, 2)
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)

def fails():
    raise RuntimeError("no network here\\nsecond line")

def number():
    return 7

def with_nan():
    net = Net()
    net.first.weight.data[0, 0] = float("nan")
    return net

def masked():
    net = Net()
    net.register_buffer("mask", torch.full((2,), float("-inf")))
    return net

def lazy():
    return nn.LazyLinear(3)

not_callable = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "some_models.py").write_text(FACTORIES)
    (tmp_path / "broken_models.py").write_text("import package_that_is_not_there\n")
    return tmp_path


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def load(folder: Path, factory: str, weights: Path | None = None, **kwargs: object) -> nn.Module:
    return load_factory(factory, kwargs, weights, folder)


def test_factory_beside_the_job_file(folder: Path) -> None:
    path = list(sys.path)
    module = load(folder, "some_models:Net", width=5)
    assert module.first.out_features == 5
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert sys.path == path
    assert load(folder, "some_models:Net.wide").first.out_features == 8


def test_two_jobs_whose_modules_have_the_same_name(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    load(folder, "some_models:Net")
    other = tmp_path_factory.mktemp("other")
    (other / "some_models.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(2, 2)\n")
    assert isinstance(load(other, "some_models:build"), nn.Linear)
    assert load(folder, "some_models:Net").first.in_features == 4


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("some_models", "not of the form 'module:callable'"),
        ("no_such_module:build", "is not found in"),
        ("some_models.sub:build", "module 'some_models.sub' of 'some_models.sub:build' is not found"),
        ("broken_models:build", "No module named 'package_that_is_not_there'"),
        ("some_models:absent", "'some_models' has no attribute 'absent'"),
        ("some_models:Net.absent", "'Net' has no attribute 'absent'"),
        ("some_models:not_callable", "is a int; it must be callable"),
        ("some_models:fails", "failed: RuntimeError: no network here"),
        ("some_models:number", "returned a int; it must return a torch.nn.Module"),
        ("some_models:with_nan", "values that are not finite: in first.weight"),
    ],
)
def test_factory_errors(folder: Path, factory: str, words: str) -> None:
    assert words in error_of(lambda: load(folder, factory))


def test_a_module_that_is_not_found_says_where_was_searched(folder: Path) -> None:
    assert str(folder) in error_of(lambda: load(folder, "no_such_module:build"))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_model_without_values_is_refused(folder: Path) -> None:
    assert "has no shape yet for 'weight'" in error_of(lambda: load(folder, "some_models:lazy"))


def test_infinite_buffers_are_allowed(folder: Path) -> None:
    assert load(folder, "some_models:masked").mask.isinf().all()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", "nested.pt"])
def test_weights_are_loaded(folder: Path, suffix: str) -> None:
    torch.manual_seed(0)
    source = load(folder, "some_models:Net")
    source.norm.running_mean.normal_()
    path = folder / f"weights{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(source.state_dict(), path)
    else:
        state: dict[str, Any] = source.state_dict()
        torch.save({"state_dict": state, "epoch": 3} if suffix == "nested.pt" else state, path)
    torch.manual_seed(1)
    loaded = load(folder, "some_models:Net", path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in source.state_dict().items())


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_files_that_training_scripts_write(
    folder: Path, key: str, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrapped in a dict and by DataParallel or torch.compile, without counters, with buffers of another version."""
    source = load(folder, "some_models:Net").state_dict()
    state = {prefix + name: value for name, value in source.items() if not name.endswith("num_batches_tracked")}
    path = folder / "checkpoint.pt"
    torch.save({key: {**state, f"{prefix}positions": torch.arange(4)}, "epoch": 3, "optimizer": {"lr": 1.0}}, path)
    with caplog.at_level(logging.INFO, "distributed_adaround"):
        loaded = load(folder, "some_models:Net", path).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in source.items())
    (line,) = caplog.messages
    assert "left out the buffers positions" in line
    assert "kept the model's own norm.num_batches_tracked" in line
    assert ("off all names" in line) == bool(prefix)


def test_a_buffer_that_the_model_does_not_save_may_be_in_the_file(folder: Path) -> None:
    path = folder / "saved.pt"
    torch.save({**load(folder, "some_models:Unsaved").state_dict(), "scale": torch.full((1,), 7.0)}, path)
    assert load(folder, "some_models:Unsaved", path).scale == 2


def test_a_tied_weight_may_be_missing_but_not_differ(folder: Path) -> None:
    path = folder / "tied.safetensors"
    values = torch.randn(5, 3)
    safetensors.torch.save_file({"embed.weight": values}, path)
    module = load(folder, "some_models:Tied", path)
    assert torch.equal(module.head.weight, values)
    assert module.head.weight is module.embed.weight
    safetensors.torch.save_file({"embed.weight": values, "head.weight": values + 1}, path)
    assert "are tied in the model but differ" in error_of(lambda: load(folder, "some_models:Tied", path))


def changed(state: dict[str, Tensor], **changes: Tensor | None) -> dict[str, Tensor]:
    merged: dict[str, Tensor | None] = {**state, **changes}
    return {name: value for name, value in merged.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"first.weight": None, "last.weight": None}, "missing first.weight, last.weight"),
        ({f"extra{i}": torch.ones(1) for i in range(5)}, "unexpected extra0, extra1, extra2 and 2 more (5 in all)"),
        ({"last.bias": torch.ones(9)}, "other shape last.bias (9,) in the file, (2,) in the model"),
        ({"last.bias": torch.tensor([1.0, float("inf")])}, "values that are not finite: in last.bias"),
        ({"norm.running_var": torch.full((3,), float("nan"))}, "values that are not finite: in norm.running_var"),
        ({"last.bias": torch.ones(1).expand(2)}, "fewer bytes in the file than elements"),
        ({"last.bias": torch.ones(1).expand(1 << 50)}, "fewer bytes in the file than elements"),
        ({"last.bias": torch.ones(2).to_sparse()}, "is a sparse tensor"),
        ({"last.bias": 5}, "'last.bias' is a int, not a tensor"),
    ],
)
def test_weights_that_do_not_fit(folder: Path, changes: dict[str, Any], words: str) -> None:
    path = folder / "weights.pt"
    torch.save(changed(load(folder, "some_models:Net").state_dict(), **changes), path)
    assert words in error_of(lambda: load(folder, "some_models:Net", path))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.pt", None, "cannot be read: No such file"),
        ("absent.safetensors", None, "cannot be read: No such file"),
        ("weights.bin", b"x", "use .safetensors, .pt or .pth"),
        ("weights.safetensors", b"\x00" * 20, "damaged or not a file of weights"),
        ("weights.pt", b"not a zip", "damaged or not a file of weights"),
        ("empty.pt", b"", "damaged or not a file of weights"),
    ],
)
def test_unreadable_weights(folder: Path, name: str, content: bytes | None, words: str) -> None:
    if content is not None:
        (folder / name).write_bytes(content)
    message = error_of(lambda: load(folder, "some_models:Net", folder / name))
    assert words in message
    assert name in message


def test_a_list_of_tensors_is_no_state_dict(folder: Path) -> None:
    torch.save([torch.ones(1)], folder / "list.pt")
    assert "holds a list" in error_of(lambda: load(folder, "some_models:Net", folder / "list.pt"))


class Bomb:
    """Creates a folder when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.trace),)


def test_a_pickle_bomb_in_the_weights_does_not_go_off(folder: Path) -> None:
    trace = folder / "exploded"
    torch.save({"first.weight": Bomb(trace)}, folder / "zip.pt")
    torch.save({"first.weight": Bomb(trace)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "raw.pt").write_bytes(pickle.dumps({"first.weight": Bomb(trace)}, protocol=2))
    (folder / "newer.pt").write_bytes(pickle.dumps({"first.weight": Bomb(trace)}, protocol=5))
    for name in ("zip.pt", "old.pt", "raw.pt", "newer.pt"):
        message = error_of(lambda name=name: load(folder, "some_models:Net", folder / name))
        assert "holds other things than tensors" in message
        assert "weights_only" not in message
    assert not trace.exists()


def test_model_digest() -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.tensor(True)}
    digest = model_digest(tensors.items())
    assert len(digest) == 64
    assert model_digest(reversed(tensors.items())) == digest
    assert model_digest({**tensors, "a": tensors["a"].t().contiguous().t()}.items()) == digest
    for other in (
        {**tensors, "a": tensors["a"].reshape(3, 2)},
        {**tensors, "a": tensors["a"].double()},
        {**tensors, "b": torch.ones(3, dtype=torch.float16)},
        {**tensors, "b": torch.tensor([1, 1, 1.0078125], dtype=torch.bfloat16)},
        {**tensors, "d": torch.empty(0)},
        {name.upper(): tensor for name, tensor in tensors.items()},
    ):
        assert model_digest(other.items()) != digest


class Forward:
    def plain(self, x: Tensor) -> None: ...

    def text(self, input_ids: Tensor, /, attention_mask: Tensor, *, labels: Tensor) -> None: ...

    def anything(self, x: Tensor, **kwargs: Tensor) -> None: ...

    def many(self, *inputs: Tensor) -> None: ...


@pytest.mark.parametrize(
    ("method", "expected"), [("plain", ["x"]), ("text", ["attention_mask", "labels"]), ("anything", None), ("many", [])]
)
def test_forward_parameters(method: str, expected: list[str] | None) -> None:
    module = nn.Identity()
    module.forward = getattr(Forward(), method)
    assert OpenedModel(module).parameters == expected


IDS, MASK, BLOCKS = torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 1, 3, 3)


@pytest.mark.parametrize(
    ("fields", "parameters", "args", "kwargs", "has_mask"),
    [
        ({"image": IDS}, ["x"], ["image"], [], False),
        ({"x": IDS}, ["x", "y"], [], ["x"], False),
        ({"ids": IDS, "mask": MASK}, ["ids", "mask"], [], ["ids", "mask"], True),
        ({"ids": IDS, "mask": MASK}, ["x"], ["ids"], [], True),
        ({"ids": IDS, "mask": BLOCKS}, ["ids", "mask"], [], ["ids", "mask"], False),
        ({"ids": IDS, "mask": MASK, "types": IDS}, None, [], ["ids", "types", "mask"], True),
    ],
)
def test_bind_inputs(
    fields: dict[str, Tensor], parameters: list[str] | None, args: list[str], kwargs: list[str], has_mask: bool
) -> None:
    bound = bind_inputs(fields, parameters, "mask")
    assert [id(value) for value in bound.args] == [id(fields[name]) for name in args]
    assert bound.kwargs.keys() == set(kwargs)
    assert all(bound.kwargs[name] is fields[name] for name in kwargs)
    assert bound.mask is (fields["mask"] if has_mask else None)


@pytest.mark.parametrize(
    ("fields", "parameters"),
    [
        ({"ids": IDS, "typos": IDS}, ["ids", "types"]),
        ({"mask": MASK}, ["x", "mask"]),
        ({}, ["x"]),
    ],
)
def test_fields_that_forward_does_not_take(fields: dict[str, Tensor], parameters: list[str]) -> None:
    message = error_of(lambda: bind_inputs(fields, parameters, "mask"))
    assert all(name in message for name in (*fields, *parameters))


def test_a_mask_that_nothing_can_use_is_an_error() -> None:
    assert "(2, 1, 3, 3)" in error_of(lambda: bind_inputs({"ids": IDS, "mask": BLOCKS}, ["ids"], "mask"))


def test_call_transform() -> None:
    batch = {"x": torch.ones(2)}
    assert torch.equal(call_transform(lambda b: {"y": b["x"] * 2}, "t", batch)["y"], torch.full((2,), 2.0))
    assert "failed: KeyError: 'z'" in error_of(lambda: call_transform(lambda b: {"y": b["z"]}, "t", batch))
    assert "returned a Tensor" in error_of(lambda: call_transform(lambda b: b["x"], "t", batch))
    assert "returned 'y': int" in error_of(lambda: call_transform(lambda b: {"y": 1}, "t", batch))


def test_load_callable_finds_installed_functions() -> None:
    assert load_callable("torch.nn:functional.relu", None) is torch.nn.functional.relu
