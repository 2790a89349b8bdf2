"""Files from elsewhere, proven whole and harmless in form before a library reads them. Imports no torch.

`torch.load` does not compare the checksums that are in its zip files: a flipped bit would load as another weight.
Libraries also believe what a header says about sizes, so a small file can claim any amount of memory.
"""

import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import IO

from distributed_adaround.errors import InputError, shorten

ZIP_MAGIC = b"PK\x03\x04"
MAX_SAFETENSORS_HEADER = 32 << 20  # bytes, enough for 200,000 tensors
# A file may claim this much at any size; beyond it no more than so many times its size. Deflate reaches 1,030 times,
# the encodings of parquet any factor, real arrays rarely 10.
_FREE_BYTES = 256 << 20
_MAX_EXPANSION = 100
_PIECE = 1 << 20
_ENCRYPTED = 1


def is_zip(path: Path) -> bool:
    """Whether a file begins as a zip does. torch takes any other for its older format, which has no checksums."""
    with path.open("rb") as file:
        return file.read(len(ZIP_MAGIC)) == ZIP_MAGIC


def check_zip(path: Path, *, compressed: bool) -> None:
    """Compare every member of a zip with its checksum, without unpacking it anywhere.

    compressed: members may be; torch never compresses.

    Raises: InputError, the file's name left out, when a member is damaged, encrypted, named twice, named so that it
    would leave its folder, or when the members claim far more bytes than the file has.
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
            lines = str(error).splitlines() or [type(error).__name__]
            raise InputError(f"is damaged: {shorten(lines[0])}; get it again from where it came") from error


def _check_members(members: list[zipfile.ZipInfo], file_size: int, compressed: bool) -> None:
    names = [member.filename for member in members]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"holds {shorten(twice)!r} twice, and readers differ in which they take; write it again")
    allowed = (zipfile.ZIP_STORED, *((zipfile.ZIP_DEFLATED,) if compressed else ()))
    for member in members:
        # orig_filename: zipfile cuts names at a NUL.
        name = PurePosixPath(member.orig_filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or "\0" in member.orig_filename:
            raise InputError(f"holds {shorten(member.orig_filename)!r}, a name that leaves its folder; it is not used")
        if member.flag_bits & _ENCRYPTED:
            raise InputError(f"holds {shorten(member.filename)!r} encrypted; write it without a password")
        if member.compress_type not in allowed:
            raise InputError(
                f"holds {shorten(member.filename)!r} compressed by a method that its writer never uses; write it again"
            )
    check_expansion(sum(member.file_size for member in members), file_size)


def check_expansion(claimed: int, file_size: int) -> None:
    """Refuse a file that would grow out of all proportion in memory. claimed: bytes of its content, unpacked.

    Raises: InputError, the file's name left out.
    """
    if claimed > max(_FREE_BYTES, _MAX_EXPANSION * file_size):
        raise InputError(f"unpacks to {claimed} bytes, over {_MAX_EXPANSION} times its size; write it uncompressed")


def _read_through(content: IO[bytes], size: int) -> None:
    """zipfile compares the checksum when it has seen the last byte."""
    seen = 0
    while piece := content.read(_PIECE):
        seen += len(piece)
    if seen != size:
        raise zipfile.BadZipFile(f"a member has {seen} bytes and claims {size}")


def check_safetensors(path: Path) -> None:
    """Bound what a header makes a reader allocate; the library itself compares it with the size of the file.

    Raises: InputError, the file's name left out.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        claimed = int.from_bytes(file.read(8), "little")
    if size < 8 or claimed > size - 8:
        raise InputError("is damaged: it is shorter than its header says; get it again from where it came")
    if claimed > MAX_SAFETENSORS_HEADER:
        raise InputError(f"has a header of {claimed} bytes, over {MAX_SAFETENSORS_HEADER}; it is no file of tensors")
