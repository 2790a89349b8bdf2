"""Files behind URIs: local paths and every scheme fsspec knows.

Writes are atomic: a full disk or a kill leaves the old file and no half of the new one. A remote file is uploaded in
one piece, because leaving `fsspec.open(..., "wb")` by an exception publishes what was written so far.

All functions raise InputError for what cannot be read and OutputError for what cannot be written. A store that is busy
or away is asked again a few times, then the error is UnreachableError. Messages show URIs without credentials.
"""

import errno
import glob
import hashlib
import math
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

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

DISK_IS_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
# Servers that write into the old file itself, and can rename.
_FILE_SERVERS = frozenset({"sftp", "ssh"})
# Temporary files of `_replace`.
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _attempt(
    verb: str, lasting: type[InputError] | type[OutputError]
) -> Callable[[Callable[_Arguments, _Result]], Callable[_Arguments, _Result]]:
    """Work on a URI, its first argument, is done again where a store fails for the moment, which may raise any class.

    lasting: what errors become where another try does not help.
    """

    def decorate(work: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
        @wraps(work)
        def attempt(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
            uri = str(args[0])
            try:
                if is_local(uri):
                    return work(*args, **kwargs)
                return patiently(partial(work, *args, **kwargs), redact(uri))
            except AdaRoundError:
                raise
            except Exception as error:
                text = f"{redact(uri)}: cannot be {verb}: {_reason(error)}"
                if is_local(uri) or not is_passing(error):
                    raise lasting(text) from error
                raise UnreachableError(f"{text}; the store does not answer, start the job again later") from error

        return attempt

    return decorate


def _reason(error: BaseException) -> str:
    """One line, without credentials."""
    error = passing_cause(error) or error
    if isinstance(error, FileNotFoundError):
        return "no such file or folder"
    if isinstance(error, OSError) and error.errno and error.strerror:
        return " ".join(redact(error.strerror).lower().split())
    lines = redact(str(error)).splitlines()
    return lines[0] if lines else type(error).__name__


@_attempt("read", InputError)
def list_files(uri: str) -> list[str]:
    """URIs of all files at `uri`, sorted: the file itself, a folder's files (recursive), or a glob's matches.

    Hidden files and folders (a name that starts with ".") are left out. Empty when nothing matches.
    """
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


def matching_files(uri: str) -> list[str]:
    """`list_files`, of which there must be some. Raises InputError when nothing matches."""
    found = list_files(uri)
    if not found:
        raise InputError(f"{redact(uri)}: no file matches; check the path, the wildcards and the mounts")
    return found


def list_folder(uri: str) -> dict[str, str]:
    """URIs of all files below a folder, by their names relative to it, sorted; what is hidden is left out.

    Raises InputError when there is no such folder, or it is empty.
    """
    start, end = path_span(uri)
    prefix, after = uri[start:end].rstrip("/") + "/", len(uri) - end
    found = {file[start + len(prefix) : len(file) - after]: file for file in list_files(uri) if file != uri}
    if not found:
        raise InputError(f"{redact(uri)}: no such folder, or it is empty; check the path and the mounts")
    return found


@_attempt("read", InputError)
def exists(uri: str) -> bool:
    """Whether there is a file or folder. An error when that cannot be found out."""
    return _kind(*_resolve(uri)) is not None


@_attempt("read", InputError)
def read_bytes(uri: str) -> bytes:
    fs, path = _resolve(uri)
    return bytes(fs.cat_file(path))


@contextmanager
def local_file(uri: str) -> Iterator[Path]:
    """The file itself when it is local, else a download that is removed at the end. OutputError: no room for it."""
    if (path := local_path(uri)) is not None:
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="adaround-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, file_name(uri))
        download(uri, copy)
        yield copy


@_attempt("read", InputError)
def local_path(uri: str) -> Path | None:
    """The file itself when it is local; None: it lies elsewhere."""
    fs, path = _resolve(uri)
    if not isinstance(fs, LocalFileSystem):
        return None
    if not os.path.isfile(path):
        raise FileNotFoundError("no such file")
    return Path(path)


@_attempt("read", InputError)
def download(uri: str, copy: Path) -> None:
    """Copy a file to a local path. OutputError: no room for it."""
    fs, path = _resolve(uri)
    try:
        fs.get_file(path, str(copy))
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        raise OutputError(f"{copy.parent}: no room for a copy of {redact(uri)}; set TMPDIR to another disk") from error


@_attempt("read", InputError)
def sha256_file(path: Path) -> str:
    """SHA-256 of a local file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@_attempt("written", OutputError)
def write_bytes(uri: str, data: bytes) -> None:
    """Write a file, whole or not at all."""
    fs, path = _resolve(uri)
    if isinstance(fs, LocalFileSystem):
        _replace(Path(path), lambda temporary: temporary.write_bytes(data))
    else:
        _upload(fs, path, lambda target: fs.pipe_file(target, data))


@_attempt("written", OutputError)
def write_file(uri: str, write: Callable[[Path], object]) -> None:
    """Write a file, whole or not at all, from what `write` puts at the local path it is given; maybe several times.

    Exceptions of `write` are OutputError too: a full disk makes torch raise RuntimeError and safetensors its own type.
    """
    fs, path = _resolve(uri)
    if isinstance(fs, LocalFileSystem):
        _replace(Path(path), write)
        return
    with tempfile.TemporaryDirectory(prefix="adaround-", ignore_cleanup_errors=True) as folder:
        copy = Path(folder, "upload")
        write(copy)
        _upload(fs, path, lambda target: fs.put_file(str(copy), target))


@_attempt("cleaned", OutputError)
def remove_leftovers(uri: str) -> None:
    """Remove temporary files that killed writers left in a local folder (not below it), where nobody writes now."""
    fs, path = _resolve(uri)
    if isinstance(fs, LocalFileSystem):
        for file in Path(path).glob(".*.tmp"):
            if _TEMPORARY.fullmatch(file.name):
                file.unlink(missing_ok=True)


@_attempt("removed", OutputError)
def remove_tree(uri: str) -> None:
    """Remove a file or a folder with all it holds; nothing happens when there is none."""
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


def _resolve(uri: str) -> tuple[AbstractFileSystem, str]:
    """File system and the path in it; listings that fsspec may have kept are dropped, since other ranks write too."""
    remember_secrets(uri)
    fs, path = url_to_fs(uri)
    fs.invalidate_cache()
    return fs, path


def _kind(fs: AbstractFileSystem, path: str) -> str | None:
    """ "file", "directory", or None where nothing is. fsspec's own isfile and isdir also say no when a store fails."""
    try:
        if isinstance(fs, LocalFileSystem):
            return "directory" if stat.S_ISDIR(os.stat(path).st_mode) else "file"
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
    return [name for name, is_folder in _below(fs, path, math.inf) if not is_folder]


def _below(fs: AbstractFileSystem, folder: str, depth: float) -> Iterator[tuple[str, bool]]:
    """(path, whether it is a folder) of all that lies in a remote folder, down to `depth` levels."""
    for info in fs.ls(folder, detail=True):
        name, is_folder = info["name"], info["type"] == "directory"
        # Some stores list the folder itself.
        if name.strip("/") != folder.strip("/"):
            yield name, is_folder
            if is_folder and depth > 1:
                yield from _below(fs, name, depth - 1)


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
    depth = math.inf if "**" in pattern else pattern[len(root) :].lstrip("/").count("/") + 1
    matches = re.compile(glob_translate(pattern)).match
    return {name: is_folder for name, is_folder in _below(fs, root, depth) if matches(name)}


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
