"""Changes to the bytes of a file, as a hypothesis strategy: flips, cuts, copies, swaps, and sizes out of bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hypothesis import strategies as st

Kind = Literal["flip", "cut", "drop", "repeat", "swap", "overwrite", "insert"]

# Bytes that parsers take for sizes, offsets and ends.
_ODD_BYTES = [
    b"\0", b"\xff", b"\xff" * 4, b"\xff" * 8, b"\xff\xff\xff\x7f", b"\xff" * 7 + b"\x7f", b"\0" * 8, b"\x80" * 5,
    b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"\x93NUMPY", b"PAR1", b"cos\nsystem\n", b"\x80\x02", b"NaN", b"1e999",
    b"[" * 2000, b"{" * 2000, b'"', b"\n", b"-1", b"99999999999999999999",
]  # fmt: skip


@dataclass(frozen=True)
class Change:
    """place, other, length: taken modulo the size of the file."""

    kind: Kind
    place: int
    other: int = 0
    length: int = 1
    data: bytes = b""

    def apply(self, content: bytes) -> bytes:
        if not content:
            return content
        at, length = self.place % len(content), 1 + self.length % len(content)
        if self.kind == "flip":
            return content[:at] + bytes([content[at] ^ (1 << self.other % 8)]) + content[at + 1 :]
        if self.kind == "cut":
            return content[:at]
        if self.kind == "drop":
            return content[:at] + content[at + length :]
        if self.kind == "repeat":
            return content[: at + length] + content[at : at + length] + content[at + length :]
        if self.kind == "overwrite":
            return content[:at] + self.data + content[at + len(self.data) :]
        if self.kind == "insert":
            return content[:at] + self.data + content[at:]
        first, second = sorted((at, self.other % len(content)))
        length = min(length, second - first, len(content) - second)
        a, b = content[first : first + length], content[second : second + length]
        return content[:first] + b + content[first + length : second] + a + content[second + length :]


_PLACES = st.integers(0, 1 << 20)
_KINDS: list[Kind] = ["flip", "cut", "drop", "repeat", "swap", "overwrite", "insert"]


def one_change() -> st.SearchStrategy[Change]:
    return st.builds(
        Change,
        st.sampled_from(_KINDS),
        _PLACES,
        _PLACES,
        st.integers(0, 64) | _PLACES,
        st.sampled_from(_ODD_BYTES),
    )


def changes() -> st.SearchStrategy[list[Change]]:
    return st.lists(one_change(), min_size=1, max_size=3)


def changed(content: bytes, by: list[Change]) -> bytes:
    for change in by:
        content = change.apply(content)
    return content
