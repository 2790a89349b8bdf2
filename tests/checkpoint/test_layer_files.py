import hashlib
import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest
import torch
from toy_records import record

from distributed_adaround.checkpoint.layer_files import Checkpoint
from distributed_adaround.errors import AdaRoundError, InputError, OutputError
from distributed_adaround.files import storage
from distributed_adaround.solve.record import LayerRecord

FINGERPRINT = {"model": "m1", "data": "d1", "spec": "s1"}


def same(a: LayerRecord, b: LayerRecord) -> bool:
    pairs = [(a.codes, b.codes), (a.scale, b.scale), (a.zero_point, b.zero_point)]
    if a.shift is not None and b.shift is not None:
        pairs.append((a.shift, b.shift))
    elif a.shift is not b.shift:
        return False
    tensors = all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
    return tensors and (a.name, a.format, a.figures) == (b.name, b.format, b.figures)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """An output folder with two commits."""
    point = Checkpoint.open(str(tmp_path / "out"), FINGERPRINT)
    point.commit(record("first", seed=1))
    point.commit(record("second", seed=2))
    return tmp_path / "out"


@pytest.fixture(params=["local", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "out")
        return
    yield "memory://checkpoint-test/out"
    fsspec.filesystem("memory").rm("/checkpoint-test", recursive=True)


def test_records_come_back_as_they_were(folder: str) -> None:
    records = [
        record("z.linear", (4, 6), ()),
        record("a.conv", (4, 3, 2, 2), (4,), signed=False),
        record("m.grouped", (4, 6), (4, 3)),
        record("b.transposed", (6, 2, 3, 3), (4, 3), groups=2, transposed=True),
        replace(record("s.shifted"), shift=torch.randn(4)),
        replace(record("t.shifted", (6, 2, 3, 3), (), groups=2, transposed=True), shift=torch.randn(8)[::2]),
    ]
    point = Checkpoint.open(folder, FINGERPRINT)
    assert point.committed == ()
    for item in records:
        point.commit(item)
    for reader in (point, Checkpoint.open(folder, FINGERPRINT)):
        assert reader.committed == tuple(item.name for item in records)
        assert all(same(reader.load(item.name), item) for item in records)


def test_a_reopened_checkpoint_goes_on(written: Path) -> None:
    Checkpoint.open(str(written), FINGERPRINT).commit(record("third", seed=3))
    point = Checkpoint.open(str(written), FINGERPRINT)
    assert point.committed == ("first", "second", "third")
    assert same(point.load("second"), record("second", seed=2))
    with pytest.raises(KeyError):
        point.load("fourth")
    with pytest.raises(AdaRoundError, match="committed before"):
        point.commit(record("first"))


def test_views_of_one_storage_are_committed(tmp_path: Path) -> None:
    plain = record()
    buffer = torch.empty(8, dtype=torch.int32)
    buffer[:4], buffer[4:] = plain.scale.view(torch.int32), plain.zero_point
    views = {
        "codes": plain.codes.T.contiguous().T,
        "scale": buffer[:4].view(torch.float32),
        "zero_point": buffer[4:],
    }
    shared = replace(plain, **views)
    point = Checkpoint.open(str(tmp_path), FINGERPRINT)
    point.commit(shared)
    assert same(point.load("layer"), plain)


def test_equal_results_are_equal_bytes_and_times_stay_out_of_layer_files(tmp_path: Path) -> None:
    trees = []
    for run, seconds in enumerate([1.0, 1.0, 2.0]):
        point = Checkpoint.open(str(tmp_path / str(run)), dict(reversed(FINGERPRINT.items())) if run else FINGERPRINT)
        point.commit(record("a", seed=1, seconds=seconds))
        point.commit(record("b", seed=2, seconds=seconds))
        trees.append(tree(tmp_path / str(run)))
    assert trees[0] == trees[1]
    assert trees[0] != trees[2]
    trees[2]["commits/manifest.json"] = trees[0]["commits/manifest.json"]
    assert trees[0] == trees[2]


@pytest.mark.parametrize("victim", ["manifest.json", "layers/00001-second.safetensors"])
def test_no_flipped_bit_goes_unnoticed(written: Path, victim: str) -> None:
    path = written / "commits" / victim
    good = path.read_bytes()
    for position in range(len(good)):
        bad = bytearray(good)
        bad[position] ^= 1 << position % 8
        path.write_bytes(bad)
        with pytest.raises(InputError, match=r"output\.overwrite=true"):
            Checkpoint.open(str(written), FINGERPRINT)
    path.write_bytes(good)
    assert same(Checkpoint.open(str(written), FINGERPRINT).load("second"), record("second", seed=2))


@pytest.mark.parametrize("victim", ["manifest.json", "layers/00000-first.safetensors"])
def test_a_shorter_or_longer_file_is_refused_by_name(written: Path, victim: str) -> None:
    path = written / "commits" / victim
    good = path.read_bytes()
    for bad in (b"", good[:1], good[: len(good) // 2], good[:-1], good + b"\n"):
        path.write_bytes(bad)
        with pytest.raises(InputError, match=path.name) as caught:
            Checkpoint.open(str(written), FINGERPRINT)
        assert "\n" not in str(caught.value)
        assert victim == "manifest.json" or f"it has {len(bad)} bytes, the manifest says {len(good)}" in str(
            caught.value
        )


def test_a_missing_layer_file_is_refused_by_name(written: Path) -> None:
    (written / "commits/layers/00000-first.safetensors").unlink()
    with pytest.raises(InputError, match=r"00000-first\.safetensors.*missing"):
        Checkpoint.open(str(written), FINGERPRINT)


def test_a_layer_file_changed_after_opening_is_not_loaded(written: Path) -> None:
    point = Checkpoint.open(str(written), FINGERPRINT)
    layers = written / "commits/layers"
    shutil.copy(layers / "00001-second.safetensors", layers / "00000-first.safetensors")
    with pytest.raises(InputError, match="SHA-256"):
        point.load("first")
    assert same(point.load("second"), record("second", seed=2))


def _sealed(body: dict[str, object]) -> bytes:
    """A manifest with a right checksum, as nobody but this program should write it."""
    body = {key: value for key, value in body.items() if key != "checksum"}
    compact = json.dumps(body, sort_keys=True, separators=(",", ":"))
    body["checksum"] = hashlib.sha256(compact.encode()).hexdigest()
    return (json.dumps(body, sort_keys=True, indent=1) + "\n").encode()


def test_a_manifest_is_refused_for_its_version_and_fields_even_when_its_checksum_is_right(written: Path) -> None:
    path = written / "commits/manifest.json"
    body = json.loads(path.read_bytes())
    path.write_bytes(_sealed(body))
    assert Checkpoint.open(str(written), FINGERPRINT).committed == ("first", "second")
    first, second = body["layers"]
    wrong = {
        "version is 3": body | {"version": 3},
        "version is missing": {"layers": [], "fingerprint": FINGERPRINT},
        "a field is missing": body | {"layers": [{"name": "first"}]},
        "a field is missing or": {"version": 2, "layers": []},
        "not known": body | {"layers": [first, second | {"host": "x"}]},
        "a name is not text": body | {"layers": [first | {"name": 3}]},
        "no commit writes": body | {"layers": [second, first]},
        "file ../../elsewhere": body | {"layers": [first | {"file": "../../elsewhere"}]},
    }
    for words, content in wrong.items():
        path.write_bytes(_sealed(content))
        with pytest.raises(InputError, match=words):
            Checkpoint.open(str(written), FINGERPRINT)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "m2"}, "another model weights than"),
        ({"data": "d2"}, "another calibration data than"),
        ({"spec": "s2", "data": "d2"}, "another calibration data, job file than"),
        ({"format": "f1"}, "another number format than"),
    ],
)
def test_another_job_is_refused_with_what_differs(written: Path, change: dict[str, str], words: str) -> None:
    before = tree(written)
    with pytest.raises(InputError, match=words) as caught:
        Checkpoint.open(str(written), FINGERPRINT | change)
    assert "output.uri" in str(caught.value)
    assert tree(written) == before


def test_overwrite_removes_what_does_not_fit_and_keeps_what_does(written: Path) -> None:
    assert Checkpoint.open(str(written), FINGERPRINT, overwrite=True).committed == ("first", "second")
    other = FINGERPRINT | {"model": "m2"}
    point = Checkpoint.open(str(written), other, overwrite=True)
    assert point.committed == ()
    assert tree(written) == {}
    point.commit(record("new"))
    assert Checkpoint.open(str(written), other, overwrite=True).committed == ("new",)


def test_overwrite_keeps_commits_that_cannot_be_read_right_now(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(uri: str) -> bytes:
        raise InputError(f"{uri}: cannot be read: connection refused")

    before = tree(written)
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", unreachable)
        with pytest.raises(InputError, match="connection refused"):
            Checkpoint.open(str(written), FINGERPRINT, overwrite=True)
    assert tree(written) == before


def test_a_crash_between_layer_and_manifest_leaves_the_last_commit(
    written: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point = Checkpoint.open(str(written), FINGERPRINT)
    write = storage.write_bytes

    def crash(uri: str, data: bytes) -> None:
        if uri.endswith("manifest.json"):
            raise OutputError("disk full")
        write(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_bytes", crash)
        with pytest.raises(OutputError):
            point.commit(record("third", seed=99))
    assert (written / "commits/layers/00002-third.safetensors").exists()
    for survivor in (point, Checkpoint.open(str(written), FINGERPRINT)):
        assert survivor.committed == ("first", "second")
    point.commit(record("third", seed=3))
    assert same(Checkpoint.open(str(written), FINGERPRINT).load("third"), record("third", seed=3))


def test_names_cannot_leave_the_folder_or_meet(tmp_path: Path) -> None:
    names = ["../../evil", "/etc/x", "a/b", "a_b", "..", "", "ä" * 300, "C:\\x", "a\nb"]
    point = Checkpoint.open(str(tmp_path / "deep/out"), FINGERPRINT)
    for seed, name in enumerate(names):
        point.commit(record(name, seed=seed))
    files = set(tree(tmp_path)) - {"deep/out/commits/manifest.json"}
    assert len(files) == len(names)
    assert all(Path(file).parent == Path("deep/out/commits/layers") for file in files)
    again = Checkpoint.open(str(tmp_path / "deep/out"), FINGERPRINT)
    assert again.committed == tuple(names)
    assert all(same(again.load(name), record(name, seed=seed)) for seed, name in enumerate(names))


def test_an_unwritable_target_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    point = Checkpoint.open(str(tmp_path / "file/out"), FINGERPRINT)
    with pytest.raises(OutputError):
        point.commit(record())
    assert point.committed == ()


def test_metrics_that_json_cannot_hold_do_not_stop_a_job(tmp_path: Path) -> None:
    item = record()
    assert item.figures is not None
    item = replace(item, figures=replace(item.figures, hard_error=0.0, soft_error=float("nan")))
    assert item.figures is not None
    assert item.figures.sqnr_db == float("inf")
    Checkpoint.open(str(tmp_path), FINGERPRINT).commit(item)
    loaded = Checkpoint.open(str(tmp_path), FINGERPRINT).load("layer").figures
    assert loaded is not None
    assert math.isnan(loaded.soft_error)
    assert replace(loaded, soft_error=0.0) == replace(item.figures, soft_error=0.0)
