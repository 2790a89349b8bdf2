"""Recordings as samples: .wav and .flac files, alone or in webdataset archives.

    bytes ── pieces of equal length ── one channel ── the rate of the feature extractor ── its features

A model that writes text also gets the beginning of it: a prompt, and the transcript that lies beside a recording in an
archive (member .txt).
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from distributed_adaround.data.archives import ARCHIVE, Record, open_records
from distributed_adaround.data.arrays import common_shape
from distributed_adaround.data.classes import Classes
from distributed_adaround.data.encoder import (
    DECODER_INPUT,
    LABELS,
    ROW_MASK,
    Encoder,
    EncoderContext,
    ListedSamples,
    Samples,
)
from distributed_adaround.data.features import DecoderInput, FeatureExtractor, Waveform
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.data.pretrained import read_config
from distributed_adaround.errors import InputError
from distributed_adaround.spec.encoders import AudioSpec

_SUFFIXES = (".wav", ".flac")
# Sizes in the header of a .wav file that was written without knowing its end.
_UNKNOWN_SIZES = (0, 0xFFFFFFFF)
# More than a year; libsndfile's answer where a header says nothing.
_TOO_MANY_FRAMES = 2**40


class AudioEncoder(Encoder):
    """Recordings by the feature extractor of the model."""

    suffixes = (*_SUFFIXES, ARCHIVE)

    def __init__(self, context: EncoderContext) -> None:
        try:
            import soundfile  # noqa: F401
            import soxr  # noqa: F401
        except ImportError as error:
            raise InputError(f"data.audio needs {error.name}: pip install 'distributed_adaround[hf]'") from error
        config = read_config(context)
        self.extractor = FeatureExtractor(context, (context.spec.audio or AudioSpec()).seconds, config)
        self.decoder = DecoderInput(context, config) if config.get("is_encoder_decoder") else None
        self.classes = Classes(config) if context.labels else None
        pad_token = {} if self.decoder is None else {DECODER_INPUT: self.decoder.pad_token}
        self.pad_values: Mapping[str, int | float] = self.extractor.pad_values | pad_token
        decided = f"{self.extractor.settings} {self.decoder} {self.classes}"
        self.digest = hashlib.sha256(decided.encode()).hexdigest()

    def open(self, path: Path, shown: str) -> Samples:
        records = open_records(path, shown, _SUFFIXES)
        pieces = [piece for record in records for piece in self._pieces(record)]
        fields = {info.name: info for info in self.extractor.fields}
        if self.decoder is not None:
            shape = common_shape([self.decoder.tokens(record).shape for record in records])
            # Its mask says more than that of the encoder, which may see silence.
            fields |= {name: FieldInfo(name, "int64", shape) for name in (DECODER_INPUT, ROW_MASK)}
        if self.classes is not None:
            self.classes.check(records)
            fields[LABELS] = self.classes.field
        return ListedSamples(pieces, tuple(fields.values()), self.sample)

    def _pieces(self, record: Record) -> list["_Piece"]:
        """As few as the longest waveform allows, of equal length: a short rest at the end would be no speech."""
        with record.main.open() as file:
            _check_whole(file)
            with _opened(file) as sound:
                frames, longest = sound.frames, self.extractor.seconds * sound.samplerate
            if not 0 < frames < _TOO_MANY_FRAMES:
                what = "is empty" if frames == 0 else "does not say how long it is"
                raise InputError(f"{what}; remove it, or write it again")
            count = int(-(-frames // longest))
            if count > 1 and self.decoder is not None and ".txt" in record.beside:
                what = f"is longer than {self.extractor.seconds:g} s, and its transcript cannot be cut with it"
                raise InputError(f"{what}; cut both, or leave the transcript out")
            return [_Piece(record, frames * i // count, frames * (i + 1) // count) for i in range(count)]

    def sample(self, piece: "_Piece") -> dict[str, Tensor]:
        """The tensors of a piece. Raises InputError."""
        with piece.record.main.open() as file, _opened(file) as sound:
            sample = self.extractor(_waveform(sound, piece, self.extractor.rate))
        if self.decoder is not None:
            tokens = self.decoder.tokens(piece.record)
            sample |= {DECODER_INPUT: tokens, ROW_MASK: torch.ones_like(tokens)}
        if self.classes is not None:
            sample[LABELS] = torch.tensor(self.classes.of_record(piece.record))
        return sample


@dataclass(frozen=True)
class _Piece:
    """Frames start to stop of a recording, at its own rate."""

    record: Record
    start: int
    stop: int


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[Any]:
    """A soundfile.SoundFile. Raises InputError when it is no recording."""
    from soundfile import LibsndfileError, SoundFile

    try:
        sound = SoundFile(file)
    except LibsndfileError as error:
        raise InputError(f"is no recording: {error.error_string}; remove it, or get it again") from None
    with sound:
        yield sound


def _check_whole(file: IO[bytes]) -> None:
    """Raises InputError when a .wav file is shorter than it says, which libsndfile takes for its end."""
    magic, size = file.read(4), int.from_bytes(file.read(4), "little")
    found = file.seek(0, 2)
    file.seek(0)
    if magic == b"RIFF" and size not in _UNKNOWN_SIZES and found < size + 8:
        raise InputError(f"is cut off: {found} bytes of {size + 8}; get it again")


def _waveform(sound: Any, piece: _Piece, rate: int) -> Waveform:
    """`(samples,)`: the mean of all channels, at this rate. Raises InputError."""
    import soxr

    sound.seek(piece.start)
    frames = sound.read(piece.stop - piece.start, dtype="float32", always_2d=True)
    if len(frames) < piece.stop - piece.start:
        what = f"ends after frame {piece.start + len(frames)} of {sound.frames}"
        raise InputError(f"is cut off or damaged: it {what}; get it again")
    if not np.isfinite(frames).all():
        raise InputError("holds numbers that are not finite; get it again")
    mono: Waveform = frames.mean(axis=1, dtype=np.float32)
    return mono if sound.samplerate == rate else np.asarray(soxr.resample(mono, sound.samplerate, rate), np.float32)
