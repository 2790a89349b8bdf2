"""Files from elsewhere, proven whole and harmless in form before a library reads them.

`torch.load` does not compare the checksums that are in its zip files: a flipped bit would load as another weight.
Libraries also believe what a header says about sizes, so a small file can claim any amount of memory. Errors are
InputError and leave out the file's name.
"""

import warnings
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO, Any

from distributed_adaround.errors import InputError, shorten

ZIP_MAGIC = b"PK\x03\x04"
MAX_SAFETENSORS_HEADER = 32 << 20  # bytes, enough for 200,000 tensors
# A file may claim this much at any size; beyond it no more than so many times its size. Deflate reaches 1,030 times,
# the encodings of parquet any factor, real arrays rarely 10.
_FREE_BYTES = 256 << 20
_MAX_EXPANSION = 100
_PIECE = 1 << 20
_ENCRYPTED = 1


def load_tensors(path: Path) -> Any:
    """What torch.save wrote, without running anything in it. Raises also what torch raises."""
    import torch

    # Only zip files, which torch.save writes since 1.6, can be mapped. Mapped, no tensor reaches beyond the file.
    mapped = is_zip(path)
    if mapped:
        check_zip(path, compressed=False)
    with warnings.catch_warnings(action="ignore"):  # about the pickle protocol of a file it then refuses
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def is_zip(path: Path) -> bool:
    """torch takes any file that does not begin as a zip for its older format, which has no checksums."""
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def check_zip(path: Path, *, compressed: bool) -> None:
    """Compare every member of a zip with its checksum, without unpacking it anywhere.

    Members must not be encrypted, named twice, named so that they would leave the folder, or claim far more bytes than
    the file has. compressed: members may be; torch never compresses.
    """
    # Opened out here: a file that is missing or may not be read is not damaged.
    with path.open("rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                _check_members(members, path.stat().st_size, compressed)
                for member in members:
                    with archive.open(member) as content:
                        _read_through(content, member.file_size)
        except InputError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, OSError) as error:
            reason = shorten(str(error).partition("\n")[0]) or type(error).__name__
            raise InputError(f"is damaged: {reason}; get it again from where it came") from error


def _check_members(members: list[zipfile.ZipInfo], file_size: int, compressed: bool) -> None:
    allowed = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) if compressed else (zipfile.ZIP_STORED,)
    seen: set[str] = set()
    for member in members:
        shown = shorten(member.filename)
        if member.filename in seen:
            raise InputError(f"holds {shown!r} twice, and readers differ in which they take; write it again")
        seen.add(member.filename)
        # orig_filename: zipfile cuts names at a NUL.
        name = PurePosixPath(member.orig_filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or "\0" in member.orig_filename:
            raise InputError(f"holds {shorten(member.orig_filename)!r}, a name that leaves its folder; it is not used")
        if member.flag_bits & _ENCRYPTED:
            raise InputError(f"holds {shown!r} encrypted; write it without a password")
        if member.compress_type not in allowed:
            raise InputError(f"holds {shown!r} compressed by a method that its writer never uses; write it again")
    check_expansion(sum(member.file_size for member in members), file_size)


def check_expansion(claimed: int, file_size: int) -> None:
    """Refuse a file that would grow out of all proportion in memory. claimed: bytes of its content, unpacked."""
    if claimed > max(_FREE_BYTES, _MAX_EXPANSION * file_size):
        raise InputError(f"unpacks to {claimed} bytes, over {_MAX_EXPANSION} times its size; write it uncompressed")


def _read_through(content: IO[bytes], size: int) -> None:
    """zipfile compares the checksum when it has seen the last byte."""
    seen = sum(len(piece) for piece in iter(lambda: content.read(_PIECE), b""))
    if seen != size:
        raise zipfile.BadZipFile(f"a member has {seen} bytes and claims {size}")


def check_safetensors(path: Path) -> None:
    """Bound what a header makes a reader allocate; the library itself compares it with the size of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if size < 8 or claimed > size - 8:
        raise InputError("is damaged: it is shorter than its header says; get it again from where it came")
    if claimed > MAX_SAFETENSORS_HEADER:
        raise InputError(f"has a header of {claimed} bytes, over {MAX_SAFETENSORS_HEADER}; it is no file of tensors")
