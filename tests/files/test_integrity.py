"""Zips and safetensors from elsewhere: what is damaged or hostile is refused before a library reads it."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from distributed_adaround.errors import InputError
from distributed_adaround.files import integrity
from distributed_adaround.files.integrity import check_safetensors, check_zip, is_zip

Members = list[tuple[str, bytes]]


def written(path: Path, members: Members, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def problem(path: Path, compressed: bool = True) -> str:
    with pytest.raises(InputError) as caught:
        check_zip(path, compressed=compressed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_of_torch_and_numpy_pass(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(100, 30), "b": torch.arange(5), "empty": torch.zeros(0)}
    torch.save(tensors, tmp_path / "a.pt")
    check_zip(tmp_path / "a.pt", compressed=False)
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2), (torch.ones(1, 3),)), tmp_path / "a.pt2")
    check_zip(tmp_path / "a.pt2", compressed=False)
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    np.savez(tmp_path / "a.npz", **arrays)
    np.savez_compressed(tmp_path / "b.npz", **arrays)
    for name in ("a.npz", "b.npz"):
        check_zip(tmp_path / name, compressed=True)
        assert is_zip(tmp_path / name)
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert not is_zip(tmp_path / "old.pt")
    save_file(tensors, tmp_path / "a.safetensors")
    check_safetensors(tmp_path / "a.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    check_safetensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_flipped_bit_of_the_content_is_found(compression: int, tmp_path: Path) -> None:
    path = written(tmp_path / "a.zip", [("x", bytes(range(200))), ("y", b"abc" * 9)], compression)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: (archive.read(member), member) for member in archive.infolist()}
    found = 0
    for name, (expected, member) in members.items():
        start = member.header_offset + 30 + len(name)
        for position in range(start, start + member.compress_size):
            flipped = bytearray(content)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            try:
                check_zip(path, compressed=True)
            except InputError:
                found += 1
            else:
                # Deflate fills its last byte with bits that mean nothing.
                assert compression == zipfile.ZIP_DEFLATED
                with zipfile.ZipFile(path) as archive:
                    assert archive.read(name) == expected
    assert found > 200


def test_every_truncation_is_found(tmp_path: Path) -> None:
    path = written(tmp_path / "a.zip", [("x", bytes(60)), ("y", b"abc")])
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert "is damaged: " in problem(path)


def test_torch_reads_a_flipped_bit_in_silence(tmp_path: Path) -> None:
    """Why all this is done. When torch compares checksums by itself one day, this test says so."""
    torch.save(torch.zeros(1000), tmp_path / "a.pt")
    content = bytearray((tmp_path / "a.pt").read_bytes())
    content[content.index(bytes(2000)) + 1000] = 1
    (tmp_path / "a.pt").write_bytes(content)
    assert torch.load(tmp_path / "a.pt", weights_only=True).any()
    assert "Bad CRC-32" in problem(tmp_path / "a.pt", compressed=False)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "..\\x", "a\\..\\..\\x"])
def test_names_that_leave_their_folder(name: str, tmp_path: Path) -> None:
    assert "leaves its folder" in problem(written(tmp_path / "a.zip", [(name, b"")]))


def test_a_name_cut_by_a_nul(tmp_path: Path) -> None:
    path = written(tmp_path / "a.zip", [("x.npy__evil", b"1")])
    path.write_bytes(path.read_bytes().replace(b"__evil", b"\0_evil"))
    assert "leaves its folder" in problem(path)


def test_a_name_that_is_there_twice(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        path = written(tmp_path / "a.zip", [("x", b"1"), ("x", b"2")])
    assert "holds 'x' twice" in problem(path)


def test_encrypted_members(tmp_path: Path) -> None:
    path = written(tmp_path / "a.zip", [("x", b"1")])
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    path.write_bytes(content)
    assert "encrypted" in problem(path)


def test_other_compressions(tmp_path: Path) -> None:
    path = written(tmp_path / "a.zip", [("x", bytes(50))], zipfile.ZIP_DEFLATED)
    check_zip(path, compressed=True)
    assert "compressed by a method" in problem(path, compressed=False)
    path = written(tmp_path / "b.zip", [("x", bytes(50))], zipfile.ZIP_BZIP2)
    assert "compressed by a method" in problem(path)


def test_a_zip_bomb_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.zip", [("x", bytes(1 << 20))], zipfile.ZIP_DEFLATED)
    check_zip(path, compressed=True)  # small ones may be what they like
    monkeypatch.setattr(integrity, "_FREE_BYTES", 1 << 19)
    monkeypatch.setattr(integrity, "_read_through", None)
    assert f"unpacks to {1 << 20} bytes" in problem(path)


def test_a_member_larger_than_it_says(tmp_path: Path) -> None:
    """Sizes in the directory are what bounds are checked against, so they must hold."""
    path = written(tmp_path / "a.zip", [("x", bytes(5000))], zipfile.ZIP_DEFLATED)
    content = path.read_bytes()
    for claimed in (10, 4999, 5001, 2**31):
        path.write_bytes(content.replace(struct.pack("<I", 5000), struct.pack("<I", claimed)))
        assert "is damaged: " in problem(path) or "unpacks to" in problem(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "shorter than its header says"),
        (b"\0" * 7, "shorter than its header says"),
        (struct.pack("<Q", 100) + b"{}", "shorter than its header says"),
        (struct.pack("<Q", 2**63) + b"{}", "shorter than its header says"),
    ],
)
def test_safetensors_headers(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=message):
        check_safetensors(tmp_path / "a.safetensors")


def test_a_safetensors_header_of_gigabytes(tmp_path: Path) -> None:
    with (tmp_path / "a.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", integrity.MAX_SAFETENSORS_HEADER + 1))
        file.truncate(integrity.MAX_SAFETENSORS_HEADER + 100)  # a hole, no disk
    with pytest.raises(InputError, match="has a header of"):
        check_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("call", [lambda path: check_zip(path, compressed=True), check_safetensors, is_zip])
def test_a_missing_file_is_not_a_damaged_one(call: Callable[[Path], object], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        call(tmp_path / "none")


def test_the_checksum_is_that_of_the_zip_format() -> None:
    """An independent look at what zipfile wrote."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", b"content")
    assert struct.pack("<I", zlib.crc32(b"content")) in buffer.getvalue()
