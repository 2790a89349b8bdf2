"""Files behind URIs: local paths and every scheme fsspec knows. The only importer of fsspec.

Writes are atomic. A local file is written under a hidden name in the same folder, synced and renamed, so a full disk
or a kill leaves the old file and no half of the new one. A remote file is uploaded in one piece, because leaving
`fsspec.open(..., "wb")` by an exception publishes what was written so far.

Reading errors are InputError, writing errors OutputError. A store that is busy or away is asked again a few times, then
the error is UnreachableError. Messages show URIs without credentials.
"""

import errno
import glob
import hashlib
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.utils import glob_translate

from distributed_adaround.errors import (
    AdaRoundError,
    InputError,
    OutputError,
    UnreachableError,
    redact,
    remember_secrets,
)
from distributed_adaround.files.retries import is_passing, passing_cause, patiently
from distributed_adaround.files.uris import file_name, is_local, join, path_span, wildcard

_DISK_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
# Servers that write into the old file itself, and can rename.
_FILE_SERVERS = frozenset({"sftp", "ssh"})

# Temporary files of `_replace`.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")

_Result = TypeVar("_Result")


def list_files(uri: str) -> list[str]:
    """URIs of all files at `uri`, sorted: the file itself, a folder's files (recursive), or a glob's matches.

    Hidden files and folders (a name that starts with ".") are left out. Empty when nothing matches.

    Raises: InputError when it cannot be listed, UnreachableError.
    """
    return _reading(uri, lambda: _list_files(uri))


def _list_files(uri: str) -> list[str]:
    fs, path = _resolve(uri)
    kind = _kind(fs, path)
    if not path.endswith("/") and kind == "file":
        return [uri]
    start, end = path_span(uri)
    found, prefix = _find(fs, path, kind), uri[start:end]
    if not found and (position := wildcard(uri)) is not None:
        prefix = uri[start : max(start, uri.rfind("/", start, position) + 1)]
        found = _glob(fs, path)
    # A path found by fsspec lacks what the URI has: credentials, host, chain. Only its tail is taken over.
    base = _resolve(uri[:start] + prefix + uri[end:])[1].rstrip("/")
    assert all(name.startswith(base) for name in found), f"the store lists other paths than {base}"
    tails = {name[len(base) :].lstrip("/") for name in found}
    visible = [tail for tail in tails if not any(part.startswith(".") for part in tail.split("/"))]
    return sorted(uri[:start] + join(prefix, tail) + uri[end:] for tail in visible)


def exists(uri: str) -> bool:
    """Whether there is a file or folder. Raises InputError or UnreachableError when that cannot be found out."""
    return _reading(uri, lambda: _kind(*_resolve(uri)) is not None)


def read_bytes(uri: str) -> bytes:
    """The whole content of a file. Raises InputError, UnreachableError."""

    def read() -> bytes:
        fs, path = _resolve(uri)
        return bytes(fs.cat_file(path))

    return _reading(uri, read)


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """The file itself when it is local, else a download that is removed at the end.

    Raises: InputError when it cannot be read, UnreachableError, OutputError when the temporary folder is full.
    """
    if (path := _reading(uri, lambda: _local_path(uri))) is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="adaround-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, file_name(uri))

        def download() -> None:
            fs, path = _resolve(uri)
            try:
                fs.get_file(path, str(copy))
            except OSError as error:
                if error.errno not in _DISK_IS_FULL:
                    raise
                raise OutputError(
                    f"{folder}: no room for a copy of {redact(uri)}; set TMPDIR to another disk"
                ) from error

        _reading(uri, download)
        yield copy


def _local_path(uri: str) -> Path | None:
    fs, path = _resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        return None
    if not os.path.isfile(path):
        raise FileNotFoundError("no such file")
    return Path(path)


def sha256_file(path: Path) -> str:
    """SHA-256 of a local file, as hex. Raises InputError."""

    def digest() -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return _reading(str(path), digest)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file, whole or not at all. Raises OutputError, UnreachableError."""

    def write() -> None:
        fs, path = _resolve(uri)
        if isinstance(fs, LocalFileSystem):
            _replace(Path(path), lambda temporary: _dump(temporary, data))
        else:
            _upload(fs, path, lambda target: fs.pipe_file(target, data))

    _writing(uri, write)


def write_file(uri: str, write: Callable[[Path], object]) -> None:
    """Write a file, whole or not at all, from what `write` puts at the local path it is given.

    Raises: OutputError, also for exceptions of `write`: a full disk makes torch raise RuntimeError and safetensors
    its own type, not OSError. UnreachableError.
    """
    if is_local(uri):
        _writing(uri, lambda: _replace(Path(_resolve(uri)[1]), write))
        return
    with tempfile.TemporaryDirectory(prefix="adaround-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, "upload")
        _writing(uri, lambda: write(copy))

        def upload() -> None:
            fs, path = _resolve(uri)
            _upload(fs, path, lambda target: fs.put_file(str(copy), target))

        _writing(uri, upload)


def remove_leftovers(uri: str) -> None:
    """Remove temporary files that killed writers left in a local folder (not below it), where nobody writes now.

    Raises: OutputError when one cannot be removed.
    """

    def remove() -> None:
        fs, path = _resolve(uri)
        if isinstance(fs, LocalFileSystem):
            for file in Path(path).glob(".*.tmp"):
                if _TEMPORARY.fullmatch(file.name):
                    file.unlink(missing_ok=True)

    _writing(uri, remove, "cleaned")


def remove_tree(uri: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens when there is none.

    Raises OutputError, UnreachableError.
    """

    def remove() -> None:
        fs, path = _resolve(uri)
        try:
            if not isinstance(fs, LocalFileSystem):
                fs.rm(path, recursive=True)
            elif os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError as error:
            if is_passing(error):
                raise

    _writing(uri, remove, "removed")


def _resolve(uri: str) -> tuple[AbstractFileSystem, str]:
    """File system and the path in it; listings that fsspec may have kept are dropped, since other ranks write too."""
    remember_secrets(uri)
    fs, path = url_to_fs(uri)
    fs.invalidate_cache()
    return fs, path


def _kind(fs: AbstractFileSystem, path: str) -> str | None:
    """ "file", "directory", or None where nothing is. fsspec's own isfile and isdir also say no when a store fails."""
    if isinstance(fs, LocalFileSystem):
        with suppress(FileNotFoundError, NotADirectoryError):
            return "directory" if stat.S_ISDIR(os.stat(path).st_mode) else "file"
        return None
    try:
        return str(fs.info(path)["type"])
    except (FileNotFoundError, NotADirectoryError) as error:
        if is_passing(error):
            raise
        return None


def _find(fs: AbstractFileSystem, path: str, kind: str | None) -> list[str]:
    """All files below a folder, or nothing when there is no such folder. kind: what `_kind` says of the path.

    fsspec would pass over folders that cannot be listed, and take links to local folders for files. Here the first is
    an error, also a circle of links, and links are followed.
    """
    # Web servers do not tell a folder from a file, but for the slash.
    if kind is None or (kind != "directory" and not path.endswith("/")):
        return []
    if isinstance(fs, LocalFileSystem):
        return list(_walk(path, frozenset())) if kind == "directory" else []
    return [name for name, is_folder in _below(fs, path, None) if not is_folder]


def _below(fs: AbstractFileSystem, folder: str, depth: int | None) -> Iterator[tuple[str, bool]]:
    """(path, whether it is a folder) of all that lies in a remote folder, down to `depth` levels."""
    for info in fs.ls(folder, detail=True):
        is_folder = info["type"] == "directory"
        # Some stores list the folder itself.
        if info["name"].strip("/") == folder.strip("/"):
            continue
        yield info["name"], is_folder
        if is_folder and depth != 1:
            yield from _below(fs, info["name"], None if depth is None else depth - 1)


def _walk(folder: str, above: frozenset[str]) -> Iterator[str]:
    real = os.path.realpath(folder)
    if real in above:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _walk(entry.path, above | {real})
            elif not entry.is_dir():
                yield entry.path


def _glob(fs: AbstractFileSystem, path: str) -> list[str]:
    """All files that match, and those below folders that match."""
    if isinstance(fs, LocalFileSystem):
        folders = {match: os.path.isdir(match) for match in glob.glob(path, recursive=True)}
    else:
        folders = _remote_glob(fs, path.replace("?", "[?]") if path.startswith("http") else path)
    below = (_find(fs, match, "directory") if is_folder else [match] for match, is_folder in folders.items())
    return [file for files in below for file in files]


def _remote_glob(fs: AbstractFileSystem, pattern: str) -> dict[str, bool]:
    """Matches in a store, and which of them are folders. fsspec's own glob passes over folders that fail to list."""
    first = re.search(r"[*?[]", pattern)
    root = pattern[: first.start() if first else None].rpartition("/")[0]
    if root and _kind(fs, root) is None:
        return {}
    depth = None if "**" in pattern else pattern[len(root) :].lstrip("/").count("/") + 1
    matches = re.compile(glob_translate(pattern)).match
    return {name: is_folder for name, is_folder in _below(fs, root, depth) if matches(name)}


def _dump(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the target, sync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        write(temporary)
        _sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _upload(fs: AbstractFileSystem, path: str, put: Callable[[str], object]) -> None:
    """Put a file in one piece. Object stores need no folders, file servers do."""
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    folder = path.rpartition("/")[0]
    target = f"{folder}/.{uuid.uuid4().hex}.tmp" if protocols & _FILE_SERVERS else path
    try:
        try:
            put(target)
        except FileNotFoundError as error:
            if is_passing(error):
                raise
            fs.makedirs(folder, exist_ok=True)
            put(target)
        if target != path:
            fs.mv(target, path)
    except BaseException:
        if target != path:
            with suppress(Exception):
                fs.rm(target)
        raise


def _reading(uri: str, work: Callable[[], _Result]) -> _Result:
    return _attempt(uri, work, "read", InputError)


def _writing(uri: str, work: Callable[[], _Result], verb: str = "written") -> _Result:
    return _attempt(uri, work, verb, OutputError)


def _attempt(
    uri: str, work: Callable[[], _Result], verb: str, lasting: type[InputError] | type[OutputError]
) -> _Result:
    """Do it, and where a store fails for the moment, do it again. Stores raise any class, so all errors are translated.

    Args:
        uri: What is read or written.
        work: May be called several times.
        verb: For the message: read, written.
        lasting: Class of errors that another try does not help.
    """
    try:
        return work() if is_local(uri) else patiently(work, redact(uri))
    except AdaRoundError:
        raise
    except Exception as error:
        text = f"{redact(uri)}: cannot be {verb}: {_reason(error)}"
        if is_local(uri) or not is_passing(error):
            raise lasting(text) from error
        raise UnreachableError(f"{text}; the store does not answer, start the job again later") from error


def _reason(error: BaseException) -> str:
    """One line, without credentials."""
    error = passing_cause(error) or error
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, OSError) and error.errno and error.strerror:
        return " ".join(redact(error.strerror).lower().split())
    lines = redact(str(error)).splitlines()
    return lines[0] if lines else type(error).__name__
