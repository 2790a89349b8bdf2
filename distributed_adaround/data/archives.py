"""Files that hold one sample each, and webdataset archives (.tar), in which members of one name are a sample:

    cat/0001.jpg  cat/0001.cls  cat/0001.txt     the sample cat/0001: the name goes up to the first dot after the folder

Members are read where they lie. Nothing is unpacked, so that their names and links can do no harm.
"""

import tarfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from distributed_adaround.data.readers import explained
from distributed_adaround.errors import InputError, shorten
from distributed_adaround.files import uris

ARCHIVE = ".tar"


@dataclass(frozen=True)
class Part:
    """A file, or a member of an archive. shown: its name in messages."""

    path: Path
    shown: str
    member: tarfile.TarInfo | None = None

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """Its bytes, seekable. What the block raises becomes an InputError that names the part."""
        with explained(self.shown), self.path.open("rb") as file:
            if self.member is None:
                yield file
                return
            with tarfile.open(fileobj=file, mode="r:") as archive:
                member = archive.extractfile(self.member)
                assert member is not None, "only regular files are members"
                with member:
                    yield member

    def text(self) -> str:
        """Raises InputError when it is not UTF-8."""
        with self.open() as file:
            return file.read().decode("utf-8-sig").strip()


@dataclass(frozen=True)
class Record:
    """What belongs to one sample. main: the part with one of the suffixes asked for. folder: name of the folder that
    holds it, "" where there is none. beside: the other parts, by suffix in lower case."""

    main: Part
    folder: str
    beside: Mapping[str, Part] = field(default_factory=dict)


def open_records(path: Path, shown: str, suffixes: Collection[str]) -> list[Record]:
    """The samples of a local file: itself, or those of an archive, in its order.

    shown: its URI in messages, which also says the folder: a copy of a remote file lies elsewhere. suffixes: of the
    parts of which a sample has one. Raises InputError for an archive that is damaged or has no such part.
    """
    if path.suffix.lower() != ARCHIVE:
        start, end = uris.path_span(shown)
        return [Record(Part(path, shown), PurePosixPath(shown[start:end]).parent.name)]
    groups: dict[str, list[Part]] = {}
    for member in _members(path, shown):
        name = PurePosixPath(member.name)
        if not name.name.startswith("."):
            key = str(name.parent / name.name.partition(".")[0])
            part = Part(path, f"{shown}, member {shorten(member.name, 80)!r}", member)
            groups.setdefault(key, []).append(part)
    records = [record for parts in groups.values() if (record := _record(parts, suffixes)) is not None]
    if not records:
        raise InputError(f"{shown}: has no member {' or '.join(suffixes)}; remove it, or correct data.uri")
    return records


def _record(parts: list[Part], suffixes: Collection[str]) -> Record | None:
    """None: nothing of this kind is among the parts."""
    by_suffix: dict[str, Part] = {}
    main: list[Part] = []
    folder = ""
    for part in parts:
        assert part.member is not None
        name = PurePosixPath(part.member.name)
        if name.suffix.lower() in suffixes:
            main.append(part)
            folder = name.parent.name
        else:
            by_suffix[name.suffix.lower()] = part
    if len(main) > 1:
        what = f"shares its name up to the first dot with {main[1].shown.rpartition(', ')[2]}"
        raise InputError(f"{main[0].shown}: {what}; a sample has one of them, rename the others")
    return Record(main[0], folder, by_suffix) if main else None


def _members(path: Path, shown: str) -> list[tarfile.TarInfo]:
    """All regular files of an archive. tarfile takes a damaged header for the end; here zeros must follow."""
    with explained(shown), tarfile.open(path, "r:") as archive:
        members = archive.getmembers()
        assert archive.fileobj is not None
        archive.fileobj.seek(archive.offset)
        end = archive.fileobj.read(tarfile.BLOCKSIZE)
        if end.strip(b"\0") or len(end) < tarfile.BLOCKSIZE:
            where = f"after member {shorten(members[-1].name, 80)!r}" if members else "at its start"
            raise InputError(f"is damaged or cut off {where}; get it again")
        return [member for member in members if member.isreg()]
