"""Checksums that a job expects its data to have: a file as `sha256sum *.npz > SHA256SUMS` writes it.

    0a1b...ff  images/a.npz
    1c2d...00 *images/b.npz

A name stands for every file whose path ends in it, so the list may lie anywhere and be written in any folder above the
files. Names are compared as text and never opened.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Self

from distributed_adaround.errors import InputError, redact
from distributed_adaround.files import storage, uris

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](\S.*)")


@dataclass(frozen=True)
class Checksums:
    """uri: of the list. by_name: SHA-256, in lower hex, of each listed name."""

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
        """Compare a file with the list. Raises InputError when it differs or is not listed."""
        names = self._names(uri)
        if not names:
            raise InputError(
                f"{redact(uri)}: is not in the list {redact(self.uri)}; add it by sha256sum, or leave "
                "it out of data.uri"
            )
        if self.by_name[max(names, key=len)] != sha256:
            raise InputError(
                f"{redact(uri)}: its SHA-256 is not that of {redact(self.uri)}: it is damaged "
                "or another file; get it again, or correct the list"
            )

    def unused(self, files: Iterable[str]) -> list[str]:
        """Names that are none of these files: of other data, or of files that have gone."""
        used = {name for uri in files for name in self._names(uri)}
        return [name for name in self.by_name if name not in used]

    def _names(self, uri: str) -> list[str]:
        """All names that a file's path ends in."""
        start, end = uris.path_span(uri)
        path = uri[start:end]
        return [name for name in self.by_name if path == name or path.endswith(f"/{name.lstrip('/')}")]
