"""Local copies of files behind URIs, and their checksums: each made once on a machine, for all of its ranks."""

import fcntl
import hashlib
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Self

from distributed_adaround.errors import OutputError
from distributed_adaround.files import storage, uris


class LocalFiles:
    """What the ranks of one machine share in a folder. Safe to use from several processes and threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    @contextmanager
    def temporary(cls) -> Iterator[Self]:
        """In a folder of its own, that is removed at the end."""
        with tempfile.TemporaryDirectory(prefix="adaround-", ignore_cleanup_errors=True) as folder:
            yield cls(Path(folder))

    @property
    def folder(self) -> Path:
        return self._folder

    def path(self, uri: str) -> Path:
        """The file itself when it is local, else a copy. Raises InputError, UnreachableError; OutputError: no room."""
        found = storage.local_path(uri)
        return found or self._once(f"copies/{_hash(uri)}/{uris.file_name(uri)}", partial(storage.download, uri))

    def sha256(self, path: Path) -> str:
        """SHA-256 of a local file, as hex; read again only when the file has changed."""
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_ino}|{stat.st_size}|{stat.st_mtime_ns}"
        return self.derived(key, lambda to: to.write_text(storage.sha256_file(path), encoding="ascii")).read_text(
            "ascii"
        )

    def derived(self, key: str, make: Callable[[Path], object]) -> Path:
        """What `make` writes at the path it is given: once for each key. OutputError: no room for it."""
        return self._once(f"derived/{_hash(key)}", make)

    def directory(self, uri: str, wanted: Callable[[str], bool]) -> Path:
        """A local folder with those files below `uri` whose names, relative to it, are wanted: the folder itself when
        it is local. May be called again for more of them. Raises InputError when there is no such folder."""
        found = storage.list_folder(uri)
        first = next(iter(found))
        if (local := storage.local_path(found[first])) is not None:
            return Path(str(local)[: -len(first)])
        target = f"directories/{_hash(uri)}"
        for name, file in found.items():
            if wanted(name):
                self._once(f"{target}/{name}", partial(storage.download, file))
        return self._folder / target

    def _once(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file in the shared folder, made by whichever process or thread asks first; others wait for it."""
        target = self._folder / name
        if target.exists():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_name(f".{target.name}.lock").open("w") as lock:
            # Let go by the system when the process that holds it dies.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                part = target.with_name(f".{target.name}.part")
                try:
                    make(part)
                except OSError as error:
                    if error.errno not in storage.DISK_IS_FULL:
                        raise
                    what = f"{self._folder}: no room for what the ranks of this machine share"
                    raise OutputError(f"{what}; set TMPDIR to another disk") from error
                part.replace(target)
        return target


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
