"""Checksums that a job expects its data to have: a file as `sha256sum *.npz > SHA256SUMS` writes it.

    0a1b...ff  images/a.npz
    1c2d...00 *images/b.npz

A name stands for every file whose path ends in it, so the list may lie anywhere and be written in any folder above the
files. Names are compared as text and never opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from distributed_adaround import storage
from distributed_adaround.errors import InputError

_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](\S.*)")


@dataclass(frozen=True)
class Checksums:
    """uri: of the list. by_name: SHA-256, in lower hex, of each listed name."""

    uri: str
    by_name: Mapping[str, str]

    @classmethod
    def read(cls, uri: str) -> Self:
        """Raises: InputError when it is not such a list, or lists a name with two checksums; UnreachableError."""
        shown = storage.redact(uri)
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
        path = uri.split("::")[0] if "://" in uri.split("::")[0] else uri.split("::")[-1]
        names = [name for name in self.by_name if path == name or path.endswith(f"/{name.lstrip('/')}")]
        if not names:
            raise InputError(
                f"{storage.redact(uri)}: is not in the list {storage.redact(self.uri)}; add it by sha256sum, or leave "
                "it out of data.uri"
            )
        if self.by_name[max(names, key=len)] != sha256:
            raise InputError(
                f"{storage.redact(uri)}: its SHA-256 is not that of {storage.redact(self.uri)}: it is damaged "
                "or another file; get it again, or correct the list"
            )
