"""Files that jobs read, written once, changed again and again, and read by the program each time.

A reader may refuse a changed file (InputError, one line) or take it. Where the file carries checksums it must not take
other values from it than were written.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from distributed_adaround.checkpoint.layer_files import Checkpoint, SolverStates
from distributed_adaround.data.readers import open_samples
from distributed_adaround.errors import InputError
from distributed_adaround.files import storage
from distributed_adaround.model.source import load_factory, load_program
from distributed_adaround.report.status import Status, read_status, write_status
from distributed_adaround.solve.record import LayerRecord
from tests.faults.byte_changes import Change, changed
from tests.support.sample_data import build, loader

IMAGES = torch.arange(5 * 3 * 4, dtype=torch.float32).reshape(5, 3, 4) / 7
LABELS = torch.tensor([5, -6, 7, 0, 2**40])
Check = Callable[[list[Change]], None]


@dataclass(frozen=True)
class Kind:
    """A file type. checked: it carries checksums, so that no change may pass unnoticed."""

    name: str
    write: Callable[[Path], object]
    read: Callable[[Path], Any]
    checked: bool


def check_of(kind: Kind, folder: Path) -> Check:
    """What a trial calls with the changes to be made to a good file. The file of the last call stays in the folder."""
    path = folder / kind.name
    kind.write(path)
    good = path.read_bytes()
    expected = kind.read(path)

    def check(changes: list[Change]) -> None:
        content = changed(good, changes)
        path.write_bytes(content)
        try:
            found = kind.read(path)
        except InputError as error:
            _check_message(str(error))
            return
        if content == good or kind.checked:
            assert same(found, expected), "other values were read without a word"

    return check


def forged_check_of(kind: Kind, folder: Path) -> Callable[[tuple[int, list[Change]]], None]:
    """Like `check_of` for a member of a zip, whose checksum is made anew, as one who means harm would do.

    Nothing can tell such a file from a good one; it must be refused or read, without a crash.
    """
    path = folder / kind.name
    kind.write(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}

    def check(case: tuple[int, list[Change]]) -> None:
        number, changes = case
        chosen = sorted(members)[number % len(members)]
        # Stored and aligned, as torch's writer does: its reader maps them.
        with torch_zip_writer(path) as write:
            for name, content in members.items():
                write(name, changed(content, changes) if name == chosen else content)
        try:
            kind.read(path)
        except InputError as error:
            _check_message(str(error))

    return check


@contextmanager
def torch_zip_writer(path: Path) -> Iterator[Callable[[str, bytes], None]]:
    """A zip with every member's content at a multiple of 64 bytes."""
    with zipfile.ZipFile(path, "w") as archive:

        def write(name: str, content: bytes) -> None:
            info = zipfile.ZipInfo(name)
            assert archive.fp is not None
            start = archive.fp.tell() + 30 + len(name)
            padding = -(start + 4) % 64
            info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
            archive.writestr(info, content)

        yield write


def _check_message(text: str) -> None:
    assert text, "an empty message"
    assert "\n" not in text, text
    assert len(text) < 2000, text


def same(a: Any, b: Any) -> bool:
    """Equal structures with equal tensors, to the last bit."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and _bytes(a) == _bytes(b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _read_samples(path: Path) -> list[dict[str, Tensor]]:
    file = open_samples(path, shown=path.name, fields=None, one_sample_per_file=False)
    # A damaged header may claim any number of rows that take no room.
    return [file.read(row) for row in range(min(file.num_samples, 50))]


def _write_jsonl(path: Path) -> None:
    rows = (f'{{"x": {x.tolist()}, "y": {y.item()}}}\n' for x, y in zip(IMAGES, LABELS, strict=True))
    path.write_text("".join(rows), encoding="utf-8")


def _write_parquet(path: Path, **options: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"x": IMAGES.tolist(), "y": LABELS.tolist()})
    parquet.write_table(table, path, row_group_size=2, **options)


SAMPLES = {"x": IMAGES, "y": LABELS}
ARRAYS = {name: tensor.numpy() for name, tensor in SAMPLES.items()}
READERS = {
    "npy": Kind("a.npy", lambda path: np.save(path, IMAGES.numpy()), _read_samples, checked=False),
    "npz": Kind("a.npz", lambda path: np.savez(path, **ARRAYS), _read_samples, checked=True),
    "npz, compressed": Kind("a.npz", lambda path: np.savez_compressed(path, **ARRAYS), _read_samples, checked=True),
    "safetensors": Kind("a.safetensors", lambda path: save_file(SAMPLES, path), _read_samples, checked=False),
    "pt": Kind("a.pt", lambda path: torch.save(SAMPLES, path), _read_samples, checked=True),
    "pt, before torch 1.6": Kind(
        "a.pth",
        lambda path: torch.save(SAMPLES, path, _use_new_zipfile_serialization=False),
        _read_samples,
        checked=False,
    ),
    "jsonl": Kind("a.jsonl", _write_jsonl, _read_samples, checked=False),
    "parquet": Kind("a.parquet", _write_parquet, _read_samples, checked=False),
    "parquet, with checksums": Kind(
        "a.parquet", lambda path: _write_parquet(path, write_page_checksum=True), _read_samples, checked=False
    ),
}


class Net(nn.Module):
    """The factory of the trials."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


def seeded_net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()


def _read_weights(path: Path) -> Any:
    model = load_factory(f"{__name__}:seeded_net", {}, path, None)
    return dict(model.state_dict())


def _write_program(path: Path) -> None:
    torch.export.save(torch.export.export(seeded_net(), (torch.ones(2, 2, 8),)), path)


def _read_program(path: Path) -> Any:
    program = load_program(path)
    return [str(program.graph), dict(program.state_dict)]


def _other_weights() -> dict[str, Tensor]:
    """Not those that the factory itself makes."""
    return {name: tensor + 1 for name, tensor in seeded_net().state_dict().items()}


WEIGHTS = {
    "weights.safetensors": Kind(
        "w.safetensors", lambda path: save_file(_other_weights(), path), _read_weights, checked=False
    ),
    "weights.pt": Kind("w.pt", lambda path: torch.save(_other_weights(), path), _read_weights, checked=True),
    "program.pt2": Kind("p.pt2", _write_program, _read_program, checked=True),
}
KINDS = READERS | WEIGHTS

FINGERPRINT = {"model": "m", "data": "d", "spec": "s"}
COMMITS = ("manifest.json", "layers/00000-a.conv.safetensors", "layers/00001-b.safetensors")


def _record(name: str, shape: tuple[int, ...]) -> LayerRecord:
    return LayerRecord(
        name=name,
        codes=(torch.arange(torch.Size(shape).numel()).reshape(shape) % 7 - 3).to(torch.int8),
        scale=torch.linspace(0.5, 1.5, shape[0]),
        zero_point=torch.zeros(shape[0], dtype=torch.int32),
        format={
            "dtype": "int4",
            "qscheme": "per_channel_symmetric",
            "group_size": None,
            "quant_min": -8,
            "quant_max": 7,
            "element_format": None,
            "scale_format": "float32",
            "tensor_scale": None,
            "groups": 1,
            "transposed": False,
        },
    )


def commits_check(file: str, folder: Path) -> Check:
    """Changes one file of the commits of two layers."""
    output, good = folder / "out", folder / "good"
    checkpoint = Checkpoint.open(str(good), FINGERPRINT)
    records = [_record("a.conv", (4, 3, 2)), _record("b", (6, 8))]
    for record in records:
        checkpoint.commit(record)
    content = (good / "commits" / file).read_bytes()

    def check(changes: list[Change]) -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(good, output)
        (output / "commits" / file).write_bytes(changed(content, changes))
        try:
            found = Checkpoint.open(str(output), FINGERPRINT)
            loaded = [found.load(name) for name in found.committed]
        except InputError as error:
            _check_message(str(error))
            return
        assert same([asdict(record) for record in loaded], [asdict(record) for record in records])

    return check


def states_check(folder: Path) -> Check:
    """Changes the saved state of a solver, which is used whole or not at all."""
    state = {"codes": LABELS, "scale": IMAGES}
    SolverStates(str(folder), FINGERPRINT).save("layer", "key", state)
    (path,) = (Path(uri) for uri in storage.list_files(str(folder)))
    good = path.read_bytes()

    def check(changes: list[Change]) -> None:
        path.write_bytes(changed(good, changes))
        found = SolverStates(str(folder), FINGERPRINT).load("layer", "key")
        assert found is None or same(found, state)

    return check


def status_check(folder: Path) -> Check:
    """Changes status.json, whose code decides what a launcher does."""
    status = Status("digest", "failed", 65, "message", 3, 7)
    write_status(str(folder), status)
    path = folder / "status.json"
    good = path.read_bytes()

    def check(changes: list[Change]) -> None:
        path.write_bytes(changed(good, changes))
        try:
            found = read_status(str(folder))
        except InputError as error:
            _check_message(str(error))
            return
        assert found is not None
        assert isinstance(found.launch_code, int)
        assert 0 <= found.launch_code < 256
        assert "\n" not in str(found)

    return check


def shards_check(suffix: str, folder: Path) -> Check:
    """Changes one of three files of samples after they were listed: no sample of it may be used."""
    kind = READERS[suffix]
    data = folder / "data"
    data.mkdir(parents=True)
    paths = [data / f"{index}-{kind.name}" for index in range(3)]
    for path in paths:
        kind.write(path)
    manifest = build(str(data), microbatch_size=4, virtual_shards=2)
    good = paths[1].read_bytes()
    with loader(manifest, range(4), prefetch=0) as samples:
        expected = list(samples)

    def check(changes: list[Change]) -> None:
        content = changed(good, changes)
        paths[1].write_bytes(content)
        try:
            with loader(manifest, range(4), prefetch=0) as samples:
                found = list(samples)
        except InputError as error:
            if content == good or paths[1].name not in str(error):
                raise
            return
        assert content == good
        assert same(found, expected)

    return check
