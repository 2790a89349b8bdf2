"""Every file type: what was written is what is read, and what is refused."""

from __future__ import annotations

import io
import json
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distributed_adaround.data import arrays
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.data.readers import SUFFIXES, SampleFile, open_samples
from distributed_adaround.errors import InputError
from distributed_adaround.files import integrity

IMAGES = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(3, 2, 4) / 7
LABELS = torch.tensor([5, -6, 7])


def opened(path: Path, fields: Mapping[str, str] | None = None, *, one_sample_per_file: bool = False) -> SampleFile:
    return open_samples(path, shown=f"shown/{path.name}", fields=fields, one_sample_per_file=one_sample_per_file)


def jsonl(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def parquet(path: Path, columns: Mapping[str, Any], row_group_size: int | None = None) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


def _npy(path: Path) -> None:
    np.save(path, IMAGES.numpy())


def _npz(path: Path) -> None:
    np.savez(path, x=IMAGES.numpy(), y=LABELS.numpy())


def _npz_compressed(path: Path) -> None:
    np.savez_compressed(path, x=IMAGES.numpy(), y=LABELS.numpy())


def _safetensors(path: Path) -> None:
    save_file({"x": IMAGES, "y": LABELS}, path)


def _pt(path: Path) -> None:
    torch.save({"x": IMAGES, "y": LABELS}, path)


def _pt_legacy(path: Path) -> None:
    torch.save({"x": IMAGES, "y": LABELS}, path, _use_new_zipfile_serialization=False)


def _pt_list(path: Path) -> None:
    torch.save([{"x": x, "y": y} for x, y in zip(IMAGES, LABELS, strict=True)], path)


def _jsonl(path: Path) -> None:
    jsonl(path, *({"x": x.tolist(), "y": y.item()} for x, y in zip(IMAGES, LABELS, strict=True)))


def _parquet(path: Path) -> None:
    parquet(path, {"x": IMAGES.tolist(), "y": LABELS.tolist()}, row_group_size=2)


TYPES: list[tuple[str, Callable[[Path], None]]] = [
    ("a.npz", _npz),
    ("a.npz", _npz_compressed),
    ("a.safetensors", _safetensors),
    ("a.pt", _pt),
    ("a.pth", _pt_legacy),
    ("a.pt", _pt_list),
    ("a.jsonl", _jsonl),
    ("a.parquet", _parquet),
]


@pytest.mark.parametrize(("name", "write"), TYPES, ids=[write.__name__ for _, write in TYPES])
def test_two_fields_of_every_type(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    expected = (FieldInfo("x", "float32", (2, 4)), FieldInfo("y", "int64", ()))
    file = opened(path)
    assert (file.num_samples, file.fields) == (3, expected)
    for row in (2, 0, 1, 0):  # any order, again and again
        sample = file.read(row)
        assert list(sample) == ["x", "y"]
        for name, values in (("x", IMAGES), ("y", LABELS)):
            assert sample[name].dtype == values.dtype
            assert torch.equal(sample[name], values[row])
    # A sample belongs to the caller.
    file.read(1)["x"].zero_()
    assert torch.equal(file.read(1)["x"], IMAGES[1])
    renamed = opened(path, {"labels": "y"})
    assert renamed.fields == (FieldInfo("labels", "int64", (), source="y"),)
    assert renamed.read(2)["labels"].item() == 7
    with pytest.raises(InputError, match=rf"^shown/{path.name}: has no field 'z'; it has x, y$"):
        opened(path, {"x": "z"})


def test_every_suffix_is_tested() -> None:
    assert {Path(name).suffix for name, _ in TYPES} | {".npy"} == set(SUFFIXES)


@pytest.mark.parametrize("name", ["a.npy", "a.pt"])
def test_a_bare_array_is_the_input(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "a.npy":
        np.save(path, IMAGES.numpy())
    else:
        torch.save(IMAGES, path)
    assert opened(path).fields == (FieldInfo("input", "float32", (2, 4)),)
    assert torch.equal(opened(path).read(2)["input"], IMAGES[2])
    whole = opened(path, one_sample_per_file=True)
    assert (whole.num_samples, whole.fields) == (1, (FieldInfo("input", "float32", (3, 2, 4)),))
    assert torch.equal(whole.read(0)["input"], IMAGES)


@pytest.mark.parametrize("write", [_npz, _safetensors, _pt])
def test_one_sample_per_file(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / {_npz: "a.npz", _safetensors: "a.safetensors", _pt: "a.pt"}[write]
    write(path)
    file = opened(path, one_sample_per_file=True)
    assert file.num_samples == 1
    assert file.fields == (FieldInfo("x", "float32", (3, 2, 4)), FieldInfo("y", "int64", (3,)))
    assert torch.equal(file.read(0)["x"], IMAGES)


def test_one_sample_per_file_may_be_a_single_number(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.float32(3))
    assert opened(tmp_path / "a.npy", one_sample_per_file=True).read(0)["input"].item() == 3
    with pytest.raises(InputError, match="'input' is a single number without a sample axis; set one_sample_per_file"):
        opened(tmp_path / "a.npy")


@pytest.mark.parametrize("write", [_pt_list, _jsonl, _parquet])
def test_lists_of_samples_are_not_one_sample(write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / {_pt_list: "a.pt", _jsonl: "a.jsonl", _parquet: "a.parquet"}[write]
    write(path)
    with pytest.raises(InputError, match="is a list of samples already; one_sample_per_file is for arrays"):
        opened(path, one_sample_per_file=True)


DTYPES = ["float16", "float64", "int8", "int16", "int32", "uint8", "uint16", "bool", "bfloat16", "float8_e4m3fn"]


@pytest.mark.parametrize("name", DTYPES)
def test_dtypes_are_kept(name: str, tmp_path: Path) -> None:
    values = torch.tensor([[0, 1], [1, 0]]).to(getattr(torch, name))
    save_file({"x": values}, tmp_path / "a.safetensors")
    torch.save({"x": values}, tmp_path / "a.pt")
    paths = [tmp_path / "a.safetensors", tmp_path / "a.pt"]
    if name not in ("bfloat16", "float8_e4m3fn"):
        np.savez(tmp_path / "a.npz", x=values.numpy())
        paths.append(tmp_path / "a.npz")
    for path in paths:
        file = opened(path)
        assert file.fields == (FieldInfo("x", name, (2,)),)
        sample = file.read(1)["x"]
        assert sample.dtype == values.dtype
        assert sample.float().tolist() == [1, 0]


def test_foreign_byte_order_and_fortran_order(tmp_path: Path) -> None:
    values = np.arange(6, dtype=">f4").reshape(2, 3)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "a.npz", input=np.asfortranarray(values))
    for name in ("a.npy", "a.npz"):
        assert opened(tmp_path / name).fields == (FieldInfo("input", "float32", (3,)),)
        assert opened(tmp_path / name).read(1)["input"].tolist() == [3, 4, 5]


def test_npz_arrays_of_other_lengths_and_strings_need_not_be_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", train_x=np.ones((4, 2)), test_x=np.ones((2, 2)), names=np.array(["a", "b"]))
    assert opened(tmp_path / "a.npz", {"x": "train_x"}).num_samples == 4
    with pytest.raises(InputError, match=r"its fields differ in the number of samples \(train_x: 4, test_x: 2\)"):
        opened(tmp_path / "a.npz")
    with pytest.raises(InputError, match="the field 'names' is not numeric; mend it, or choose others"):
        opened(tmp_path / "a.npz", {"x": "names"})
    np.savez(tmp_path / "b.npz", names=np.array(["a", "b"]))
    with pytest.raises(InputError, match="holds no numeric field"):
        opened(tmp_path / "b.npz")


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
def test_object_arrays_are_refused_and_never_unpickled(name: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    objects = np.array([Bomb(), Bomb()], object)
    if name == "a.npy":
        np.save(tmp_path / name, objects, allow_pickle=True)
    else:
        np.savez(tmp_path / name, allow_pickle=True, input=objects, good=np.ones((2, 2)))
        assert opened(tmp_path / name, {"x": "good"}).num_samples == 2
    with pytest.raises(
        InputError, match=rf"^shown/{name}: the field 'input' holds pickled Python objects, which are never"
    ):
        opened(tmp_path / name)
    torch.save([Bomb()], tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(pickle.dumps([Bomb()], protocol=2))
    for bad in ("b.pt", "c.pt"):
        with pytest.raises(
            InputError, match=f"^shown/{bad}: cannot be read, damaged or not of this type: Weights only"
        ):
            opened(tmp_path / bad)
    assert not (tmp_path / "exploded").exists()


def test_pt_lists_may_vary(tmp_path: Path) -> None:
    torch.save([torch.ones(2, n) for n in (3, 1, 3)], tmp_path / "a.pt")
    file = opened(tmp_path / "a.pt")
    assert file.fields == (FieldInfo("input", "float32", (2, None)),)
    assert [tuple(file.read(row)["input"].shape) for row in range(3)] == [(2, 3), (2, 1), (2, 3)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (3, "must hold a tensor, a dict of tensors, a list of tensors, or a list of dicts"),
        ([torch.ones(2), 3], "must hold a tensor"),
        ([{"x": torch.ones(2)}, {"y": torch.ones(2)}], "must hold a tensor"),
        ([torch.ones(2), torch.ones(2, 2)], "'input' mixes dtypes or numbers of dimensions"),
        ([torch.ones(2), torch.ones(2).long()], "'input' mixes dtypes"),
        ({"x": torch.ones(2), "epoch": 3}, "'epoch' is not a tensor; mend it, or choose others by data.fields"),
        ({"x": torch.zeros(1).expand(10**10)}, r"'x' claims more elements than the file holds \(an expanded"),
        ([torch.zeros(1).expand(10**10)], "'input' claims more elements"),
        (torch.ones(8).as_strided((7, 2), (1, 1)), "'input' claims more elements"),
        (torch.ones(3, 3).to_sparse(), "'input' is not a plain dense tensor"),
        (torch.ones(3, device="meta"), "'input' is not a plain dense tensor"),
        (torch.ones(0, 3), "is empty: no samples, or samples without elements"),
        (torch.ones(3, 0), "is empty: no samples, or samples without elements"),
        ([], "is empty"),
        ({}, "holds no numeric field"),
    ],
)
def test_pt_refusals(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(InputError, match=f"^shown/a.pt: .*{message}"):
        opened(tmp_path / "a.pt")


def test_a_storage_that_claims_too_much(tmp_path: Path) -> None:
    """The pickle of a .pt file says how large its storages are; the file knows better."""
    torch.save(torch.arange(4.0), tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "a.pt", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith("data.pkl"):
                assert content.count(b"K\x04") == 2
                content = content.replace(b"K\x04", b"J\x00\x00\x00\x40")
            bad.writestr(name, content)
    with pytest.raises(InputError, match=r"^shown/a.pt: cannot be read, damaged"):
        opened(tmp_path / "a.pt")


def test_an_npz_member_that_claims_too_much(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**13,)})
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", header.getvalue() + b"1234")
    with pytest.raises(InputError, match="the array 'x' claims more elements than the file holds"):
        opened(tmp_path / "a.npz")
    (tmp_path / "a.npy").write_bytes(header.getvalue() + b"1234")
    with pytest.raises(InputError, match=r"^shown/a.npy: has 39999999999996 bytes less than its header says"):
        opened(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("name", "write"), [*TYPES, ("a.npy", _npy)], ids=[write.__name__ for _, write in [*TYPES, ("", _npy)]]
)
def test_damaged_files(name: str, write: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / name
    write(path)
    content = path.read_bytes()
    for damaged in (b"", b"nonsense", content[: len(content) // 2], content[len(content) // 2 :]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=f"^shown/{name}: ") as caught:
            # Half a file of lines may still be whole lines, but then it is shorter.
            assert opened(path).num_samples == 3
        assert "\n" not in str(caught.value)


def test_an_npz_with_other_things_in_it(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("evil.sh", "rm")
    with pytest.raises(InputError, match=r"holds 'evil.sh', which is not a .npy array"):
        opened(tmp_path / "a.npz")


def test_what_a_file_says_is_shown_short_and_printable(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"x": 1}, {"y\x1b[2J" * 5000: 1})
    with pytest.raises(InputError, match=r"^shown/a.jsonl: sample 1 has other fields than the first: y ") as caught:
        opened(path)
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_a_parquet_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million equal numbers take a few hundred bytes."""
    path = parquet(tmp_path / "a.parquet", {"x": np.zeros(10**6, np.int64)})
    assert path.stat().st_size < 10_000
    assert opened(path).num_samples == 10**6  # small ones may be what they like
    monkeypatch.setattr(integrity, "_FREE_BYTES", 1 << 20)
    with pytest.raises(InputError, match=r"^shown/a.parquet: unpacks to 8000000 bytes"):
        opened(path)


def test_jsonl_token_ids(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [1, 2, 3], [4], [5, 6])
    file = opened(path)
    assert file.fields == (FieldInfo("input_ids", "int64", (None,)),)
    assert [file.read(row)["input_ids"].tolist() for row in (2, 0, 1)] == [[5, 6], [1, 2, 3], [4]]
    assert opened(path, {"ids": "input_ids"}).read(1)["ids"].tolist() == [4]


def test_jsonl_blank_lines_no_last_newline_and_multibyte_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes('{"t":"äöü€","x":[1]}\r\n\r\n \n{"t":"","x":[2]}'.encode())
    file = opened(path)
    assert file.num_samples == 2
    assert [file.read(row)["x"].item() for row in range(2)] == [1, 2]


def test_jsonl_numbers(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"i": 2**62, "f": [1, 2], "b": True, "e": [], "s": "text", "n": None, "o": {"k": 1}},
        {"i": -1, "f": [0.1, 3], "b": False, "e": [7], "s": "", "n": None, "o": {}},
    )
    file = opened(path)
    assert file.fields == (
        FieldInfo("i", "int64", ()),
        FieldInfo("f", "float32", (2,)),
        FieldInfo("b", "bool", ()),
        FieldInfo("e", "int64", (None,)),
    )
    assert file.read(0)["i"].item() == 2**62
    assert torch.equal(file.read(0)["f"], torch.tensor([1.0, 2.0]))
    assert torch.equal(file.read(1)["f"], torch.tensor([0.1, 3.0]))
    assert file.read(0)["e"].dtype == torch.int64
    with pytest.raises(InputError, match="the field 's' is not numeric"):
        opened(path, {"x": "s"})


def test_jsonl_does_not_depend_on_the_default_dtype(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [0.1], [0.2])
    torch.set_default_dtype(torch.float64)
    try:
        assert opened(path).fields == (FieldInfo("input_ids", "float32", (1,)),)
        assert opened(path).read(0)["input_ids"].dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"x": 1}, {"x": 1, "y": 2}], "sample 1 has other fields than the first: x, y"),
        ([[1], {"x": 1}], "sample 1 has other fields than the first: x"),
        ([{"x": 1}, {"x": None}], "'x' is not a number in sample 1"),
        ([{"x": "a"}, {"x": 1}], "'x' is not a number in sample 0"),
        ([{"x": [1]}, {"x": [[1, 2], [3]]}], "'x' is ragged, too large for int64 or holds other things .* in sample 1"),
        ([{"x": [1, "a"]}], "'x' is ragged, too large for int64 or holds other things .* in sample 0"),
        ([{"x": 2**70}], "'x' is ragged, too large for int64"),
        ([{"x": [1]}, {"x": 1}], "'x' mixes numbers of dimensions"),
        ([3], "sample 0 is neither an object nor a list"),
        ([{"text": "a"}], "holds no numeric field"),
        ([[]], "is empty"),
        ([], "holds no numeric field"),
    ],
)
def test_jsonl_refusals(lines: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^shown/a.jsonl: .*{message}"):
        opened(jsonl(tmp_path / "a.jsonl", *lines))


def test_jsonl_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": 1}\n{"x": \n')
    with pytest.raises(InputError, match="sample 1 is not JSON: Expecting value"):
        opened(tmp_path / "a.jsonl")


def test_parquet_types(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    columns = {
        "ids": pa.array([[1, 2, 3], [4], [5, 6], [7], [8, 9]], pa.list_(pa.int32())),
        "large": pa.array([[[i, i], [i, i]] for i in range(5)], pa.large_list(pa.list_(pa.float16()))),
        "fixed": pa.array([[i, 2 * i] for i in range(5)], pa.list_(pa.float64(), 2)),
        "flag": pa.array([True, False, True, False, True]),
        "byte": pa.array(range(5), pa.uint8()),
        "text": pa.array(["a"] * 5),
    }
    file = opened(parquet(tmp_path / "a.parquet", columns, row_group_size=2))
    assert file.num_samples == 5
    assert file.fields == (
        FieldInfo("ids", "int64", (None,)),
        FieldInfo("large", "float32", (2, 2)),
        FieldInfo("fixed", "float32", (2,)),
        FieldInfo("flag", "bool", ()),
        FieldInfo("byte", "int64", ()),
    )
    for row in (4, 0, 3, 1, 2):
        sample = file.read(row)
        assert sample["ids"].tolist() == columns["ids"][row].as_py()
        assert sample["large"].tolist() == [[row, row], [row, row]]
        assert sample["fixed"].tolist() == [row, 2 * row]
        assert sample["flag"].item() is (row % 2 == 0)
        assert sample["byte"].item() == row
        for info in file.fields:
            assert sample[info.name].dtype == getattr(torch, info.dtype)
    with pytest.raises(InputError, match="the field 'text' is not numeric"):
        opened(tmp_path / "a.parquet", {"x": "text"})


def test_parquet_rounds_doubles(tmp_path: Path) -> None:
    file = opened(parquet(tmp_path / "a.parquet", {"x": [[0.1], [1 / 3]]}))
    assert torch.equal(file.read(1)["x"], torch.tensor([1 / 3]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, None], "'x' holds nulls"),
        ([[1, None]], "'x' holds nulls"),
        ([[1], None], "'x' holds nulls"),
        ([[]], "is empty"),
    ],
)
def test_parquet_refusals(values: list[Any], message: str, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    kind = pa.list_(pa.int64()) if isinstance(values[0], list) else pa.int64()
    with pytest.raises(InputError, match=f"^shown/a.parquet: .*{message}"):
        opened(parquet(tmp_path / "a.parquet", {"x": pa.array(values, kind)}))


def test_parquet_ragged_samples_and_empty_tables(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    file = opened(parquet(tmp_path / "a.parquet", {"x": [[[1, 2], [3]], [[4, 5], [6, 7]]]}))
    assert file.fields == (FieldInfo("x", "int64", (2, None)),)
    assert file.read(1)["x"].tolist() == [[4, 5], [6, 7]]
    with pytest.raises(InputError, match=r"^shown/a.parquet, sample 0: the field 'x' is ragged$"):
        file.read(0)
    with pytest.raises(InputError, match="is empty"):
        opened(parquet(tmp_path / "b.parquet", {"x": pa.array([], pa.int64())}))


def test_parquet_row_groups_without_rows(tmp_path: Path) -> None:
    pa, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet").ParquetWriter
    schema = pa.schema({"x": pa.list_(pa.int64())})
    with writer(tmp_path / "a.parquet", schema) as file:
        for rows in ([], [[1, 2], [3, 4]], [], [[5, 6]]):
            file.write_table(pa.table({"x": pa.array(rows, schema.field("x").type)}))
    samples = opened(tmp_path / "a.parquet")
    assert samples.fields == (FieldInfo("x", "int64", (2,)),)
    assert [samples.read(row)["x"].tolist() for row in (2, 0, 1)] == [[5, 6], [1, 2], [3, 4]]


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"")
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'distributed_adaround\[parquet\]'$"):
        opened(tmp_path / "a.parquet")


def test_only_what_is_asked_for_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _npz(tmp_path / "a.npz")
    read: list[str] = []
    member = arrays._npz_member

    def spy(path: Path, name: str) -> Callable[[], Any]:
        load = member(path, name)
        return lambda: (read.append(name), load())[1]

    monkeypatch.setattr(arrays, "_npz_member", spy)
    file = opened(tmp_path / "a.npz", {"labels": "y"})
    assert read == []
    file.read(0)
    assert set(read) == {"y.npy"}


def test_arrays_are_mapped_not_read(tmp_path: Path) -> None:
    """A sparse file of 64 GiB: whoever reads it whole does not come back."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (2**14, 2**20)})
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        file.write(header.getvalue())
        try:
            file.truncate(len(header.getvalue()) + 4 * 2**34)
        except OSError as error:
            pytest.skip(f"no sparse files: {error}")
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(7).tobytes())
    samples = opened(path)
    assert samples.num_samples == 2**14
    last: Tensor = samples.read(2**14 - 1)["input"]
    assert (last[-1].item(), last[0].item()) == (7, 0)
