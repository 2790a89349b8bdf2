"""Files of data that mean nothing, to see what a job would do before there are real ones."""

import os
import random
import struct
import wave
from pathlib import Path

from distributed_adaround.errors import InputError

_WORDS = (
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over man"
)
_WORDS_OF_TEXT = 120_000
_PIXELS, _RATE, _SECONDS = 256, 16_000, 10
_COPIES = {"images": 512, "audio": 64}


def made_up(kind: str, folder: Path) -> str:
    """Write samples of this kind (text, images, audio) into the folder, as many as a job takes; returns their place.
    Raises InputError when a library is missing."""
    draw = random.Random(0)
    if kind == "text":
        path = folder / "words.txt"
        lines = (" ".join(draw.choices(_WORDS.split(), k=20)) for _ in range(_WORDS_OF_TEXT // 20))
        path.write_text("\n".join(lines), encoding="utf-8")
        return str(path)
    first = folder / ("0.png" if kind == "images" else "0.wav")
    _picture(first, draw) if kind == "images" else _recording(first, draw)
    for index in range(1, _COPIES[kind]):
        os.link(first, folder / f"{index}{first.suffix}")
    return str(folder)


def _picture(path: Path, draw: random.Random) -> None:
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("pictures need pillow: pip install 'distributed_adaround[hf]'") from error
    Image.frombytes("RGB", (_PIXELS, _PIXELS), draw.randbytes(3 * _PIXELS * _PIXELS)).save(path)


def _recording(path: Path, draw: random.Random) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, _RATE, 0, "NONE", ""))
        samples = (draw.randrange(-8000, 8000) for _ in range(_RATE * _SECONDS))
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
