import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from packed_codes import read_by_hand
from torch import Tensor, nn

from distributed_adaround.errors import AdaRoundError, InputError, OutputError
from distributed_adaround.export.codes import SolvedModel, read_codes
from distributed_adaround.export.codes import write_codes as write
from distributed_adaround.export.dequantized import CodesExporter, DequantizedExporter
from distributed_adaround.export.exporter import ExportTask
from distributed_adaround.export.stored import QuantizedLayer, StoredResult
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.numerics.weight_view import WeightView
from distributed_adaround.solve.record import LayerRecord

Named = Sequence[tuple[str, LayerRecord]]


def layer_of(name: str, record: LayerRecord, weights: Mapping[str, Tensor]) -> QuantizedLayer:
    owner, view = PARTS.get(name, (name, None))
    dtype = str(weights[owner].dtype).removeprefix("torch.") if owner in weights else "float32"
    dtype = dtype if view is None or view.dtype is None else view.dtype
    shape = tuple(record.codes.shape)
    return QuantizedLayer(record.name, name, owner, view, "Linear", shape, dtype, record.format)


def write_codes(uri: str, weights: Mapping[str, Tensor], records: Named, left: Any = (), shard_bytes: int = 0) -> None:
    layers = [(layer_of(name, record, weights), record) for name, record in records]
    write(SolvedModel(weights, layers, torch.float32, left, {}, shard_bytes), uri, "source")


def write_dequantized(uri: str, weights: Mapping[str, Tensor], records: Named = (), shard_bytes: int = 0) -> None:
    """By way of the files of codes."""
    write_codes(uri, weights, records, shard_bytes=shard_bytes)
    with LocalFiles.temporary() as files:
        DequantizedExporter().write(task(uri, files), uri)


def task(uri: str, files: LocalFiles) -> ExportTask:
    result = StoredResult.open(uri, files)
    nothing: Any = None
    return ExportTask([*result.layers.values()], nothing, nothing, result.dtype, None, files, result, nothing, nothing)


class Net(nn.Module):
    """Every kind of layer, a tied weight, a tied float parameter, a buffer of another dtype, an odd view."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 2, 3, groups=2)
        self.linear = nn.Linear(6, 4)
        self.low = nn.Linear(6, 4).bfloat16()
        self.embedding = nn.Embedding(4, 6)
        self.embedding.weight = self.linear.weight
        self.norm = nn.BatchNorm1d(4)
        self.norm_again = nn.LayerNorm(4)
        self.norm_again.weight = self.norm.weight
        self.register_buffer("table", torch.arange(12.0).reshape(3, 4).T)


def _record(name: str, weight: Tensor, strategy: str, groups: int = 1, transposed: bool = False) -> LayerRecord:
    generator = torch.Generator().manual_seed(len(name))
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    shape = {"tensor": (), "channel": (outputs,), "group": (outputs, 3)}[strategy]
    return LayerRecord(
        name=name,
        codes=torch.randint(0, 16, weight.shape, generator=generator, dtype=torch.uint8),
        scale=torch.rand(shape, generator=generator) + 0.01,
        zero_point=torch.randint(0, 16, shape, generator=generator, dtype=torch.int32),
        format={
            "dtype": "uint4",
            "qscheme": f"per_{strategy}_affine",
            "group_size": weight.numel() // outputs // 3 if strategy == "group" else None,
            "quant_min": 0,
            "quant_max": 15,
            "element_format": None,
            "scale_format": "float32",
            "tensor_scale": None,
            "groups": groups,
            "transposed": transposed,
        },
    )


def _quantized(strategy: str) -> tuple[Net, list[tuple[str, LayerRecord]]]:
    """A model whose weights already are the dequantized ones, as after a job, and the records they came from."""
    torch.manual_seed(0)
    net = Net()
    records = [
        ("up.weight", _record("up", net.up.weight, strategy, groups=2, transposed=True)),
        ("conv.weight", _record("conv", net.conv.weight, strategy, groups=2)),
        ("low.weight", _record("low", net.low.weight, strategy)),
        ("linear.weight", _record("linear", net.linear.weight, strategy)),
    ]
    with torch.no_grad():
        for name, record in records:
            weight = net.get_parameter(name)
            weight.copy_(record.dequantize(weight.dtype))
    return net, records


def _assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group"])
def test_codes_and_dequantized_file_give_the_same_weights(tmp_path: Path, strategy: str) -> None:
    net, records = _quantized(strategy)
    write_dequantized(str(tmp_path), net.state_dict(), records)
    plain = safetensors.torch.load_file(tmp_path / "dequantized.safetensors")
    _assert_equal(plain, net.state_dict())
    _assert_equal(read_codes(str(tmp_path)), plain)
    fresh = Net()
    fresh.load_state_dict(plain, strict=True)
    x = torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(1))
    assert torch.equal(fresh.up(fresh.conv(x)), net.up(net.conv(x)))


def test_the_file_of_codes_holds_codes_and_all_other_tensors(tmp_path: Path) -> None:
    net, records = _quantized("channel")
    write_codes(str(tmp_path), net.state_dict(), records)
    expected = dict(net.state_dict())
    # The embedding is the linear layer's weight, and two norms share theirs: kept once.
    del expected["embedding.weight"], expected["norm_again.weight"]
    for name, record in records:
        expected |= {name: record.codes, f"{name}_scale": record.scale, f"{name}_zero_point": record.zero_point}
    _assert_equal(read_by_hand(tmp_path), expected)
    # Nothing that takes tensors by their names finds codes under that of a weight.
    with safetensors.safe_open(tmp_path / "quantized.safetensors", framework="pt") as file:
        assert not {name for name, _ in records} & {*file.keys()}


def test_the_description_stands_beside_the_file(tmp_path: Path) -> None:
    net, records = _quantized("group")
    left = [{"name": "norm.weight", "shape": (4,), "reason": "not the weight of a layer"}]
    write_codes(str(tmp_path), net.state_dict(), records, left)
    text = json.loads((tmp_path / "quantized.json").read_text())
    assert text["float_parameters"] == [{"name": "norm.weight", "shape": [4], "reason": "not the weight of a layer"}]
    assert text["tied"] == {"embedding.weight": "linear.weight", "norm_again.weight": "norm.weight"}
    assert (text["format"], text["format_version"]) == ("distributed_adaround", 4)
    (entry,) = text["files"].values()
    data = (tmp_path / "quantized.safetensors").read_bytes()
    assert (entry["size"], entry["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert text["layers"]["up.weight"] == {
        "layer": "up",
        "dtype": "uint4",
        "qscheme": "per_group_affine",
        "group_size": 9,
        "quant_min": 0,
        "quant_max": 15,
        "element_format": None,
        "scale_format": "float32",
        "tensor_scale": None,
        "groups": 2,
        "transposed": True,
        "kind": "Linear",
        "shape": [6, 1, 3, 3],
        "packed": 4,
        "zero_point": None,
        "output_axis": 1,
        "weight_dtype": "float32",
        "part_of": None,
    }
    assert text["layers"]["conv.weight"]["output_axis"] == 0
    assert text["layers"]["low.weight"]["weight_dtype"] == "bfloat16"


def test_bytes_depend_on_names_and_values_only(tmp_path: Path) -> None:
    net, records = _quantized("channel")
    state = net.state_dict()
    for folder, order, items in (("a", list(state), records), ("b", list(reversed(state)), records[::-1])):
        shuffled = {name: state[name] for name in order}
        write_dequantized(str(tmp_path / folder), shuffled, items)
    # Copies on other memory, none tied: the same dequantized file.
    write_dequantized(str(tmp_path / "c"), {name: tensor.clone() for name, tensor in state.items()}, records)
    for name in ("quantized.safetensors", "quantized.json", "dequantized.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    name = "dequantized.safetensors"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()


def test_both_files_go_through_any_store() -> None:
    net, records = _quantized("channel")
    folder = "memory://export-test/out"
    try:
        write_dequantized(folder, net.state_dict(), records)
        _assert_equal(read_codes(folder), net.state_dict())
        names = fsspec.filesystem("memory").ls("/export-test/out", detail=False)
    finally:
        fsspec.filesystem("memory").rm("/export-test", recursive=True)
    assert sorted(names) == [
        f"/export-test/out/{name}" for name in ("dequantized.safetensors", "quantized.json", "quantized.safetensors")
    ]


def test_files_are_as_readable_as_any_file_of_the_user(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        write_dequantized(str(tmp_path), {"a": torch.zeros(1)})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "dequantized.safetensors").stat().st_mode) == 0o644


def test_an_unwritable_target_is_an_output_error(tmp_path: Path) -> None:
    net, records = _quantized("channel")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        write_codes(str(tmp_path / "file"), net.state_dict(), records)
    with pytest.raises(OutputError):
        write_dequantized(str(tmp_path / "file/deeper"), net.state_dict())


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_codes(str(tmp_path), {"a": torch.zeros(3)}, [])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def half(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        path.write_bytes(b"half")
        raise safetensors.SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", half)
        with LocalFiles.temporary() as files, pytest.raises(OutputError, match="dequantized"):
            DequantizedExporter().write(task(str(tmp_path), files), str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("value", [torch.eye(2).to_sparse(), {"extra": 1}, torch.zeros(2, dtype=torch.complex128)])
def test_what_safetensors_cannot_hold_is_an_input_error(tmp_path: Path, value: object) -> None:
    with pytest.raises(InputError, match=r"odd|complex128"):
        write_codes(str(tmp_path), {"odd": value}, [])  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


def test_a_model_tensor_under_the_name_of_a_scale_is_not_overwritten(tmp_path: Path) -> None:
    net, records = _quantized("channel")
    state = {**net.state_dict(), "conv.weight.scale": torch.zeros(6)}
    with pytest.raises(InputError, match=r"conv\.weight\.scale"):
        write_codes(str(tmp_path), state, records)


def test_a_record_that_fits_no_weight_is_our_defect(tmp_path: Path) -> None:
    net, records = _quantized("channel")
    for wrong in ([("conv", records[1][1])], [("up.weight", records[1][1])], [records[0], records[0]]):
        with pytest.raises(AdaRoundError, match="fits no weight"):
            write_codes(str(tmp_path), net.state_dict(), wrong)
    assert list(tmp_path.iterdir()) == []


class Parts(nn.Module):
    """A weight that is stored transposed and run in bfloat16, one that is two, and one of which half is left in float;
    two names of the packed one."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed, self.packed, self.left = (nn.Parameter(torch.randn(6, 4)) for _ in range(3))
        self.alias = self.packed


PARTS: dict[str, tuple[str, WeightView]] = {
    "transposed": ("transposed", WeightView((4, 6), (1, 4), 0, "bfloat16")),
    "packed[0:2]": ("packed", WeightView((2, 4), (4, 1), 0)),
    "packed[2:6]": ("packed", WeightView((4, 4), (4, 1), 8)),
    "left[:,2:4]": ("left", WeightView((2, 6), (1, 4), 2)),
}


def test_weights_that_are_parts_of_tensors_come_back_in_their_places(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Parts()
    # Where each weight lies, written out.
    places = {
        "transposed": (net.transposed.data.T, torch.bfloat16),
        "packed[0:2]": (net.packed.data[:2], torch.float32),
        "packed[2:6]": (net.packed.data[2:], torch.float32),
        "left[:,2:4]": (net.left.data[:, 2:].T, torch.float32),
    }
    records = [(name, _record(name, place, "channel")) for name, (place, _) in places.items()]
    for name, record in records:
        place, dtype = places[name]
        place.copy_(record.dequantize(dtype))
    write_codes(str(tmp_path), net.state_dict(), records)
    stored = read_by_hand(tmp_path)
    expected = {"left": net.left.data}
    for name, record in records:
        expected |= {name: record.codes, f"{name}_scale": record.scale, f"{name}_zero_point": record.zero_point}
    _assert_equal(stored, expected)
    _assert_equal(read_codes(str(tmp_path)), net.state_dict())
    text = json.loads((tmp_path / "quantized.json").read_text())
    assert text["layers"]["packed[2:6]"]["part_of"] == {
        "name": "packed", "strides": [4, 1], "offset": 8
    }  # fmt: skip
    assert text["layers"]["transposed"]["weight_dtype"] == "bfloat16"
    assert text["tied"] == {"alias": "packed"}


def test_a_part_that_lies_outside_its_tensor_is_refused(tmp_path: Path) -> None:
    net = Parts()
    name = "packed[2:6]"
    record = _record(name, net.packed.data[2:], "channel")
    write_codes(str(tmp_path), net.state_dict(), [(name, record)])
    path = tmp_path / "quantized.json"
    path.write_bytes(path.read_bytes().replace(b'"offset": 8', b'"offset": 9'))
    with pytest.raises(InputError, match="is damaged"):
        read_codes(str(tmp_path))


def test_other_and_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    path, description = tmp_path / "quantized.safetensors", tmp_path / "quantized.json"
    with pytest.raises(InputError, match=r"holds no quantized\.json"):
        read_codes(str(tmp_path))
    net, records = _quantized("channel")
    write_codes(str(tmp_path), net.state_dict(), records)
    good, text = path.read_bytes(), description.read_bytes()
    for bad in (b"", good[:20], good[:-1], good.replace(b"up.weight.scale", b"up.weight.scalf")):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"quantized\.safetensors.* is damaged"):
            read_codes(str(tmp_path))
    path.write_bytes(good)
    for bad in (b"", text[:-20], text.replace(b'"tied"', b'"died"'), b"[]"):
        description.write_bytes(bad)
        with pytest.raises(InputError, match=r"quantized\.json"):
            read_codes(str(tmp_path))
    description.write_bytes(text.replace(b'"format_version": 4', b'"format_version": 3'))
    with pytest.raises(InputError, match="format version 3, this program reads 4; run the job again"):
        read_codes(str(tmp_path))


def test_a_changed_bit_is_found_when_files_are_verified(tmp_path: Path) -> None:
    net, records = _quantized("channel")
    write_codes(str(tmp_path), net.state_dict(), records)
    path = tmp_path / "quantized.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with LocalFiles.temporary() as files, pytest.raises(InputError, match="SHA-256"):
        CodesExporter().load(task(str(tmp_path), files), str(tmp_path))


def test_a_model_that_came_in_files_of_a_size_leaves_in_such_files(tmp_path: Path) -> None:
    net, records = _quantized("channel")
    write_dequantized(str(tmp_path / "one"), net.state_dict(), records)
    write_dequantized(str(tmp_path / "many"), net.state_dict(), records, shard_bytes=100)
    names = sorted(path.name for path in (tmp_path / "many").iterdir())
    codes, plain = ([name for name in names if name.startswith(stem) and "-of-" in name] for stem in ("quan", "dequ"))
    assert len(codes) > 2
    assert len(plain) > 2
    assert names == sorted([*codes, *plain, "quantized.json", "dequantized.safetensors.index.json"])
    assert codes[0] == f"quantized-00001-of-{len(codes):05d}.safetensors"
    _assert_equal(read_by_hand(tmp_path / "many"), read_by_hand(tmp_path / "one"))
    index = json.loads((tmp_path / "many" / "dequantized.safetensors.index.json").read_text())["weight_map"]
    whole = safetensors.torch.load_file(tmp_path / "one" / "dequantized.safetensors")
    parts = {file: safetensors.torch.load_file(tmp_path / "many" / file) for file in plain}
    _assert_equal({name: parts[file][name] for name, file in index.items()}, whole)
    sizes = [sum(tensor.nbytes for tensor in part.values()) for part in parts.values() if len(part) > 1]
    assert max(sizes) <= 100


def test_a_writer_that_was_killed_goes_on_after_the_last_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, records = _quantized("channel")
    write_codes(str(tmp_path / "whole"), net.state_dict(), records, shard_bytes=100)
    save, written = safetensors.torch.save_file, []

    def killed(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        save(tensors, path, metadata)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            write_codes(str(tmp_path / "cut"), net.state_dict(), records, shard_bytes=100)
    # Nothing that a reader takes for a result.
    assert not (tmp_path / "cut" / "quantized.json").exists()
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("quantized-*")}
    assert len(times) == 2
    write_codes(str(tmp_path / "cut"), net.state_dict(), records, shard_bytes=100)
    for name, time in times.items():
        assert (tmp_path / "cut" / name).stat().st_mtime_ns == time
    left, right = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("whole", "cut"))
    assert left == right
