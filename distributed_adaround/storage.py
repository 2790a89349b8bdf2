"""Files behind URIs: local paths and every scheme fsspec knows. The only importer of fsspec.

A URI is a `str`: a path ("data/x.npy"), a URL ("s3://bucket/x.npy") or a chain ("simplecache::s3://bucket/x.npy").

Writes are atomic. A local file is written under a hidden name in the same folder, synced and renamed, so a full disk
or a kill leaves the old file and no half of the new one. A remote file is uploaded in one piece, because leaving
`fsspec.open(..., "wb")` by an exception publishes what was written so far.

Reading errors are InputError, writing errors OutputError; their messages show URIs without credentials.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from distributed_adaround.errors import AdaRoundError, InputError, OutputError

# Everything up to the last "@": of the host part, or of the whole link where a colon not followed by a port says that
# what stands before it is a password (keys of object stores hold slashes).
_CREDENTIALS = re.compile(r"(?<=://)(?:[^/@:\s]*:(?!\d+(?:/|\s|$))\S*@|[^/\s]*@)")
# A query: after an http URL anything, elsewhere only what holds a "=", since "?" is also a wildcard.
_QUERY = re.compile(r"(?<=://)([^?\s'\"]*)\?[^\s?'\"]*=[^\s'\"]*")
# Temporary files of `_replace`.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
_HTTP_QUERY = re.compile(r"(https?://[^?#\s'\"]*)[?#][^\s'\"]*")


def redact(uri: str) -> str:
    """The URI (or any text that holds URIs) without user names, passwords, tokens and query strings."""
    links = (_CREDENTIALS.sub("", link) for link in uri.split("::"))
    return "::".join(_QUERY.sub(r"\1", _HTTP_QUERY.sub(r"\1", link)) for link in links)


def join(uri: str, *parts: str) -> str:
    """The URI of something inside a folder."""
    for part in parts:
        uri = uri + part.lstrip("/") if not uri or uri.endswith("/") else f"{uri}/{part.lstrip('/')}"
    return uri


def file_name(uri: str) -> str:
    """Last part of the path, without folder, credentials and query string."""
    links = redact(uri).split("::")
    return links[_path_link(links)].rstrip("/").rsplit("/", 1)[-1]


def list_files(uri: str) -> list[str]:
    """URIs of all files at `uri`, sorted: the file itself, a folder's files (recursive), or a glob's matches.

    Hidden files and folders (a name that starts with ".") are left out. Empty when nothing matches.

    Raises: InputError when it cannot be listed.
    """
    with _reading(uri):
        fs, path = _resolve(uri)
        if not path.endswith("/") and fs.isfile(path):
            return [uri]
        start, end = _path_span(uri)
        found, prefix = _find(fs, path), uri[start:end]
        if not found and (wildcard := _wildcard(uri)) is not None:
            prefix = uri[start : max(start, uri.rfind("/", start, wildcard) + 1)]
            found = _glob(fs, path)
        # A path found by fsspec lacks what the URI has: credentials, host, chain. Only its tail is taken over.
        base = _resolve(uri[:start] + prefix + uri[end:])[1].rstrip("/")
        assert all(name.startswith(base) for name in found), f"the store lists other paths than {base}"
        tails = {name[len(base) :].lstrip("/") for name in found}
        visible = [tail for tail in tails if not any(part.startswith(".") for part in tail.split("/"))]
        return sorted(uri[:start] + join(prefix, tail) + uri[end:] for tail in visible)


def exists(uri: str) -> bool:
    """Whether there is a file or folder. Raises InputError when that cannot be found out."""
    with _reading(uri):
        fs, path = _resolve(uri)
        try:
            fs.info(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True


def size(uri: str) -> int:
    """Bytes of a file. Raises InputError."""
    with _reading(uri):
        fs, path = _resolve(uri)
        info = fs.info(path)
        if info["type"] == "directory":
            raise IsADirectoryError("it is a folder; a file is needed")
        # Some HTTP servers do not tell.
        return int(info["size"]) if info["size"] is not None else len(fs.cat_file(path))


def read_bytes(uri: str) -> bytes:
    """The whole content of a file. Raises InputError."""
    with _reading(uri):
        fs, path = _resolve(uri)
        return bytes(fs.cat_file(path))


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """The file itself when it is local, else a download that is removed at the end.

    Raises: InputError when it cannot be read.
    """
    with _reading(uri):
        fs, path = _resolve(uri)
        local = isinstance(fs, LocalFileSystem)
        if local and not os.path.isfile(path):
            raise FileNotFoundError("no such file")
    if local:
        yield Path(path)
        return
    with tempfile.TemporaryDirectory(prefix="adaround-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, file_name(uri))
        with _reading(uri):
            fs.get_file(path, str(copy))
        yield copy


def sha256_file(path: Path) -> str:
    """SHA-256 of a local file, as hex. Raises InputError."""
    with _reading(str(path)), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file, whole or not at all. Raises OutputError."""
    with _writing(uri):
        fs, path = _resolve(uri)
        if isinstance(fs, LocalFileSystem):
            _replace(Path(path), lambda temporary: _dump(temporary, data))
        else:
            _upload(fs, path, lambda: fs.pipe_file(path, data))


def write_file(uri: str, write: Callable[[Path], object]) -> None:
    """Write a file, whole or not at all, from what `write` puts at the local path it is given.

    Raises: OutputError, also for exceptions of `write`: a full disk makes torch raise RuntimeError and safetensors
    its own type, not OSError.
    """
    with _writing(uri):
        fs, path = _resolve(uri)
        if isinstance(fs, LocalFileSystem):
            _replace(Path(path), write)
            return
        with tempfile.TemporaryDirectory(prefix="adaround-", ignore_cleanup_errors=True) as folder:
            copy = Path(folder, "upload")
            write(copy)
            _upload(fs, path, lambda: fs.put_file(str(copy), path))


def remove_leftovers(uri: str) -> None:
    """Remove temporary files that killed writers left in a local folder (not below it), where nobody writes now.

    Raises: OutputError when one cannot be removed.
    """
    with _writing(uri, "cleaned"):
        fs, path = _resolve(uri)
        if isinstance(fs, LocalFileSystem):
            for file in Path(path).glob(".*.tmp"):
                if _TEMPORARY.fullmatch(file.name):
                    file.unlink(missing_ok=True)


def remove_tree(uri: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens when there is none. Raises OutputError."""
    with _writing(uri, "removed"):
        fs, path = _resolve(uri)
        try:
            if not isinstance(fs, LocalFileSystem):
                fs.rm(path, recursive=True)
            elif os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError:
            return


def _resolve(uri: str) -> tuple[AbstractFileSystem, str]:
    """File system and the path in it; listings that fsspec may have kept are dropped, since other ranks write too."""
    fs, path = url_to_fs(uri)
    fs.invalidate_cache()
    return fs, path


def _path_link(links: list[str]) -> int:
    """Which link of a chain holds the path: the first with "://", else the last (caches come before it)."""
    return next((i for i, link in enumerate(links) if "://" in link), len(links) - 1)


def _path_span(uri: str) -> tuple[int, int]:
    """Start and end of the link that holds the path."""
    links = uri.split("::")
    position = _path_link(links)
    start = sum(len(link) + 2 for link in links[:position])
    return start, start + len(links[position])


def _wildcard(uri: str) -> int | None:
    """Position of the first wildcard in the path, if it has one."""
    start, end = _path_span(uri)
    # In an http URL a "?" starts the query.
    wildcard = re.compile(r"[*[]" if uri.startswith("http", start) else r"[*?[]")
    match = wildcard.search(uri, start, end)
    return match.start() if match else None


def _find(fs: AbstractFileSystem, path: str) -> list[str]:
    """All files below a folder, or nothing when there is no such folder.

    fsspec would pass over local folders that may not be read, and take links to folders for files. Here the first is an
    error, also a circle of links, and links are followed.
    """
    if not fs.isdir(path):
        return []
    if not isinstance(fs, LocalFileSystem):
        return list(fs.find(path))
    return list(_walk(path, frozenset()))


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
        folders = {match: info["type"] == "directory" for match, info in fs.glob(path, detail=True).items()}
    return [file for match, is_folder in folders.items() for file in (_find(fs, match) if is_folder else [match])]


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


def _upload(fs: AbstractFileSystem, path: str, put: Callable[[], object]) -> None:
    """Object stores need no folders, file servers do."""
    try:
        put()
    except FileNotFoundError:
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        put()


# Stores raise what they like (botocore, aiohttp ... are no OSError), so all of Exception is translated here.
@contextmanager
def _reading(uri: str) -> Iterator[None]:
    try:
        yield
    except AdaRoundError:
        raise
    except Exception as error:
        raise InputError(f"{redact(uri)}: cannot be read: {_reason(error)}") from error


@contextmanager
def _writing(uri: str, verb: str = "written") -> Iterator[None]:
    try:
        yield
    except AdaRoundError:
        raise
    except Exception as error:
        raise OutputError(f"{redact(uri)}: cannot be {verb}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """One line, without credentials."""
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    lines = redact(str(error)).splitlines()
    return lines[0] if lines else type(error).__name__
