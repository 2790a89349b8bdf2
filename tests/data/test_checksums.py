"""Lists of checksums: what they accept, and that data which differs stops a job before its first step."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from sample_data import build

from distributed_adaround.data.listing import Checksums
from distributed_adaround.data.manifest import Manifest
from distributed_adaround.errors import InputError

A, B = hashlib.sha256(b"a").hexdigest(), hashlib.sha256(b"b").hexdigest()


def listed(tmp_path: Path, text: str) -> Checksums:
    (tmp_path / "SUMS").write_text(text, encoding="utf-8")
    return Checksums.read(str(tmp_path / "SUMS"))


def test_both_modes_comments_and_blank_lines(tmp_path: Path) -> None:
    sums = listed(tmp_path, f"# made today\n{A}  ./one two.npy\n\n{B.upper()} *b.npy\n{A}  one two.npy\n")
    assert sums.by_name == {"one two.npy": A, "b.npy": B}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{A}  a\n{A} a\n", "line 2 is not"),
        (f"{A[1:]}  a\n", "line 1 is not"),
        (f"SHA256 (a) = {A}\n", "line 1 is not"),
        (f"{A}  \n", "line 1 is not"),
        (f"{A}  a\n{B}  ./a\n", "line 2: another checksum for 'a'"),
    ],
)
def test_lists_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"^{tmp_path}/SUMS: {message}"):
        listed(tmp_path, text)


def test_a_list_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "SUMS").write_bytes(b"abc\xff")
    with pytest.raises(InputError, match="byte 3 is not UTF-8"):
        Checksums.read(str(tmp_path / "SUMS"))


@pytest.mark.parametrize(
    "uri",
    [
        "a.npy",
        "./a.npy",
        "/data/a.npy",
        "s3://bucket/a.npy",
        "zip://in/a.npy::s3://bucket/x.zip",
        "simplecache::s3://b/a.npy",
    ],
)
def test_a_name_is_the_end_of_a_path(uri: str, tmp_path: Path) -> None:
    sums = listed(tmp_path, f"{A}  a.npy\n")
    sums.check(uri, A)
    assert sums.unused([uri]) == []
    assert sums.unused([]) == ["a.npy"]
    with pytest.raises(InputError, match="it is damaged or another file"):
        sums.check(uri, B)
    with pytest.raises(InputError, match="is not in the list"):
        sums.check(uri.replace("a.npy", "aa.npy"), A)


def test_the_longest_name_counts(tmp_path: Path) -> None:
    sums = listed(tmp_path, f"{A}  a.npy\n{B}  sub/a.npy\n")
    sums.check("/x/a.npy", A)
    sums.check("/x/sub/a.npy", B)
    with pytest.raises(InputError):
        sums.check("/x/sub/a.npy", A)


def manifest(folder: Path) -> Manifest:
    return build(str(folder / "data"), checksums=str(folder / "data" / "SHA256SUMS"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data with a list made by sha256sum itself."""
    data = tmp_path / "data"
    data.mkdir()
    for name in ("a", "b"):
        np.save(data / f"{name}.npy", np.full((3, 4), ord(name), np.float32))
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    text = subprocess.run("sha256sum *.npy", shell=True, cwd=data, capture_output=True, text=True, check=True).stdout
    (data / "SHA256SUMS").write_text(text, encoding="utf-8")
    return tmp_path


def test_good_data(folder: Path) -> None:
    found = manifest(folder)
    assert found.num_samples == 6
    assert found.skipped == ()  # the list is no file of samples that was left out


def _flip(folder: Path) -> None:
    content = bytearray((folder / "data/b.npy").read_bytes())
    content[-5] ^= 4
    (folder / "data/b.npy").write_bytes(content)


def _swap(folder: Path) -> None:
    shutil.copy(folder / "data/a.npy", folder / "data/b.npy")


def _nonsense(folder: Path) -> None:
    (folder / "data/b.npy").write_bytes(b"nonsense")


@pytest.mark.parametrize("change", [_flip, _swap, _nonsense])
def test_changed_data_is_found_before_it_is_read(
    change: Callable[[Path], None], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(folder)
    with pytest.raises(InputError, match=rf"^{folder}/data/b.npy: its SHA-256 is not that of {folder}/data/SHA256SUMS"):
        manifest(folder)


def test_listed_data_that_is_gone(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    manifest(folder)
    assert caplog.messages == []
    (folder / "data" / "b.npy").unlink()
    assert manifest(folder).num_samples == 3
    assert caplog.messages == ["data.checksums lists 1 files that data.uri does not name, the first is b.npy"]


def test_unlisted_data(folder: Path) -> None:
    np.save(folder / "data" / "c.npy", np.zeros((3, 4), np.float32))
    with pytest.raises(InputError, match=rf"^{folder}/data/c.npy: is not in the list"):
        manifest(folder)
