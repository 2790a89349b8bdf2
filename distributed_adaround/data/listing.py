"""The manifest of a job's data: which files there are, what they hold, and how their samples are cut."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from distributed_adaround.data.encoder import Encoder, NoSampleError
from distributed_adaround.data.manifest import DataFile, Manifest, cut, take
from distributed_adaround.errors import InputError, redact
from distributed_adaround.files import storage, uris
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.spec.data import SECTION_OF

logger = logging.getLogger(__name__)

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](\S.*)")


@dataclass(frozen=True)
class Checksums:
    """What the files must have: a list as `sha256sum *.npz > SHA256SUMS` writes it.

        0a1b...ff  images/a.npz
        1c2d...00 *images/b.npz

    A name stands for every file whose path ends in it, so the list may be written in any folder above the files. Names
    are compared as text and never opened.
    """

    uri: str
    by_name: Mapping[str, str]

    @classmethod
    def read(cls, uri: str) -> Self:
        """Raises: InputError when it is not such a list, or lists a name with two checksums; UnreachableError."""
        shown = redact(uri)
        try:
            text = storage.read_bytes(uri).decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InputError(f"{shown}: byte {error.start} is not UTF-8 text; write it by sha256sum") from error
        by_name: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.startswith("#"):
                continue
            match = _LINE.fullmatch(line)
            if match is None:
                raise InputError(f"{shown}: line {number} is not 'SHA-256, two blanks, name'; write it by sha256sum")
            digest, name = match[1].lower(), match[2].removeprefix("./")
            if by_name.setdefault(name, digest) != digest:
                raise InputError(f"{shown}: line {number}: another checksum for {name!r} stands above; remove one")
        return cls(uri, by_name)

    def check(self, uri: str, sha256: str) -> None:
        """Raises: InputError when the file differs or is not listed. The longest name that fits it counts."""
        names, shown, listed = self._names(uri), redact(uri), redact(self.uri)
        if not names:
            raise InputError(f"{shown}: is not in the list {listed}; add it by sha256sum, or leave it out of data.uri")
        if self.by_name[max(names, key=len)] != sha256:
            what = f"its SHA-256 is not that of {listed}: it is damaged or another file"
            raise InputError(f"{shown}: {what}; get it again, or correct the list")

    def unused(self, files: Iterable[str]) -> list[str]:
        """Names of none of these files."""
        used = {name for uri in files for name in self._names(uri)}
        return [name for name in self.by_name if name not in used]

    def _names(self, uri: str) -> list[str]:
        start, end = uris.path_span(uri)
        path = uri[start:end]
        return [name for name in self.by_name if path == name or path.endswith(f"/{name.lstrip('/')}")]


def build_manifest(
    uri: str | Sequence[str],
    encoder: Encoder,
    local: LocalFiles,
    *,
    num_samples: int | None,
    max_samples: int | None = None,
    microbatch_size: int,
    virtual_shards: int,
    checksums: str | None = None,
) -> Manifest:
    """List, read and hash the files, and cut their samples into microbatches.

    Args:
        uri: one or several files, folders or globs.
        encoder: says what the files hold.
        local: local copies of the files.
        num_samples: how many to take; None: all.
        max_samples: how many to take at most.
        microbatch_size: samples of a microbatch.
        virtual_shards: parts that are dealt to the ranks.
        checksums: URI of a list of the SHA-256 that the files must have.

    Raises: InputError when nothing matches, or a file is empty, damaged, unlike the others or not as the list says.
    """
    usable, skipped = _list_data((uri,) if isinstance(uri, str) else uri, encoder.suffixes)
    expected = None if checksums is None else Checksums.read(checksums)
    files = _read_files(usable, encoder, local, expected)
    unused = [] if expected is None else expected.unused(usable)
    if unused:
        message = "data.checksums lists %d files that data.uri does not name, the first is %s"
        logger.warning(message, len(unused), unused[0])
    num_available = sum(file.num_samples for file in files)
    if max_samples is not None:
        num_samples = min(max_samples, num_available)
    manifest = Manifest(
        files=tuple(files),
        num_available=num_available,
        microbatches=cut(take(num_available, num_samples), microbatch_size, virtual_shards),
        num_shards=virtual_shards,
        encoding=encoder.digest,
        skipped=tuple(other for other in skipped if other != checksums),
    )
    assert manifest.fields  # merging them proves that the files agree
    return manifest


def _read_files(
    usable: Sequence[str], encoder: Encoder, local: LocalFiles, expected: Checksums | None
) -> list[DataFile]:
    """What the files hold; those too short for a sample are left out, unless all are."""
    files, short = [], []
    for found in usable:
        path = local.path(found)
        sha256 = local.sha256(path)
        if expected is not None:
            expected.check(found, sha256)
        try:
            samples = encoder.open(path, redact(found))
        except NoSampleError as error:
            short.append(error)
        else:
            files.append(DataFile(found, path.stat().st_size, sha256, samples.num_samples, samples.fields))
    if short and not files:
        raise short[0]
    if short:
        logger.warning("%d of %d files are too short and left out, the first: %s", len(short), len(usable), short[0])
    return files


def _list_data(given: Sequence[str], suffixes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Files of these types, and the others. A file named by the user must be of one of them."""

    def known(uri: str) -> bool:
        return Path(uris.file_name(uri)).suffix.lower() in suffixes

    found: set[str] = set()
    for uri in given:
        matches = storage.matching_files(uri)
        if matches == [uri] and not known(uri):
            raise InputError(f"{redact(uri)}: unknown file type; supported are {', '.join(suffixes)}{_hint(uri)}")
        found.update(matches)
    usable = sorted(filter(known, found))
    skipped = sorted(found.difference(usable))
    if not usable:
        what = f"{len(skipped)} files of unknown type, for example {redact(skipped[0])}"
        names = ", ".join(map(redact, given))
        raise InputError(f"{names}: {what}; supported are {', '.join(suffixes)}{_hint(skipped[0])}")
    return usable, skipped


def _hint(uri: str) -> str:
    """Which encoder reads a file like this one."""
    section = SECTION_OF.get(Path(uris.file_name(uri)).suffix.lower())
    return f"; for such files write data.{section}: {{}}" if section else ""
