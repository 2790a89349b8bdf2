"""What a model takes of a recording: features of its waveform, and the beginning of the text that it writes."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distributed_adaround.data.archives import Record
from distributed_adaround.data.encoder import ROW_MASK, EncoderContext, fields_of
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.data.pretrained import decoder_settings, load_pretrained, token_id
from distributed_adaround.errors import InputError, first_line

_MASK = "mask"  # attention_mask, padding_mask, input_features_mask
_DEFAULT_SECONDS = 30
# Step from frame to frame: a feature extractor may leave out the rest of one at the end, not more.
_FRAME_SECONDS = 0.01

Waveform = NDArray[np.float32]


class FeatureExtractor:
    """The feature extractor beside a model.

    rate: of the waveforms that it takes, in Hz. seconds: of the longest one. fields: what it makes. pad_values: of
    these, where they vary.
    """

    def __init__(self, context: EncoderContext, seconds: float | None, config: Mapping[str, Any]) -> None:
        """seconds: of the longest waveform, as the job says. config: of the model. Raises InputError."""
        remedy = "name a directory with a feature extractor by data.processor"
        self._extractor = load_pretrained(context, "AutoFeatureExtractor", "data.audio", remedy)
        self._kind = type(self._extractor).__name__
        self.rate: int = self._extractor.sampling_rate
        self._convolutions = list(zip(config.get("conv_kernel") or (), config.get("conv_stride") or (), strict=False))
        self.seconds = self._longest(seconds)
        self.settings = f"{json.dumps(self._extractor.to_dict(), sort_keys=True, default=str)} {self._convolutions}"
        self.fields = fields_of(*(self._features(_noise(int(self.rate * self.seconds) // part)) for part in (1, 2)))
        varying = [info for info in self.fields if None in info.shape and not info.name.endswith(_MASK)]
        self._varying = varying[0] if varying else None
        masks = [ROW_MASK, *(info.name for info in self.fields if info.name.endswith(_MASK))]
        fill = getattr(self._extractor, "padding_value", 0.0)
        self.pad_values: dict[str, int | float] = {info.name: fill for info in varying} | dict.fromkeys(masks, 0)
        if self._varying is not None:
            self.fields += (FieldInfo(ROW_MASK, "int64", (None,)),)

    def __call__(self, waveform: Waveform) -> dict[str, Tensor]:
        """waveform: `(samples,)` at this rate. Raises InputError when it is too short."""
        made = self._features(waveform)
        if self._varying is not None:
            made[ROW_MASK] = torch.ones(self._num_rows(made[self._varying.name]), dtype=torch.int64)
        return made

    def _num_rows(self, features: Tensor) -> int:
        """Rows of the layers behind the convolutions through which waveforms go first, else steps of the features."""
        assert self._varying is not None
        size = features.shape[self._varying.shape.index(None)]
        for kernel, stride in self._convolutions if features.dim() == 1 else ():
            size = (size - kernel) // stride + 1
        if size < 1:
            raise InputError(f"is too short: {features.shape[0]} samples, of which the model makes no row; remove it")
        return int(size)

    def _features(self, waveform: Waveform) -> dict[str, Tensor]:
        try:
            made = self._extractor(waveform, sampling_rate=self.rate, return_tensors="pt")
        except Exception as error:
            what = f"{self._kind} cannot take {len(waveform) / self.rate:g} s: {first_line(error)}"
            raise InputError(f"{what}; remove the recording, or make it longer") from error
        return {name: made[name][0] for name in self._extractor.model_input_names if name in made}

    def _longest(self, wanted: float | None) -> float:
        """Seconds of the longest waveform that is used as a whole, the default at most. Raises InputError."""
        seconds = _DEFAULT_SECONDS if wanted is None else wanted
        if self._uses_all(seconds):
            return seconds
        if wanted is not None:
            what = f"data.audio.seconds: {self._kind} does not take {wanted:g} s as a whole"
            raise InputError(f"{what}; make it less, or leave it out for the longest it takes")
        # Whole seconds that it takes, and that it does not.
        low, high = 0, _DEFAULT_SECONDS
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._uses_all(middle) else (low, middle)
        if not low:
            raise InputError(f"data.audio: {self._kind} makes no features of a waveform; give arrays instead")
        return low

    def _uses_all(self, seconds: float) -> bool:
        """Whether the end matters, and nothing is chosen at random."""
        waveform = _noise(round(self.rate * seconds))
        changed = waveform.copy()
        changed[-round(self.rate * min(_FRAME_SECONDS, seconds)) :] = 0
        # What extractors draw from: with seeds all ranks find the same.
        before = np.random.get_state()
        try:
            first, again, other = map(self._drawn, range(3), (waveform, waveform, changed))
        finally:
            np.random.set_state(before)
        return _equal(first, again) and not _equal(first, other)

    def _drawn(self, seed: int, waveform: Waveform) -> dict[str, Tensor]:
        np.random.seed(seed)
        return self._features(waveform)


def _noise(length: int) -> Waveform:
    return np.random.default_rng(0).uniform(-0.5, 0.5, length).astype(np.float32)


def _equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(value, second[name]) for name, value in first.items())


class DecoderInput:
    """What a decoder has written before the next token: its prompt, and a transcript where there is one."""

    def __init__(self, context: EncoderContext, config: Mapping[str, Any]) -> None:
        """config: of the model. Raises InputError when it does not say how the decoder starts."""
        self._context = context
        settings = decoder_settings(context, config)
        start, pad = (token_id(settings.get(f"{name}_token_id")) for name in ("decoder_start", "pad"))
        if start is None:
            what = "config.json of the model has no decoder_start_token_id"
            raise InputError(f"data.audio: {what}, with which an encoder-decoder starts; add it")
        self.prompt = [start, *_forced(settings.get("forced_decoder_ids") or ())]
        self.pad_token = start if pad is None else pad
        self._longest: int | None = config.get("max_target_positions")

    def __repr__(self) -> str:
        return f"DecoderInput({self.prompt}, {self._longest})"

    def tokens(self, record: Record) -> Tensor:
        """`(tokens,)` int64, as many as the decoder takes. Raises InputError."""
        written = record.beside.get(".txt")
        tokens = [] if written is None else self._tokenizer(written.text(), add_special_tokens=False)["input_ids"]
        return torch.tensor([*self.prompt, *tokens][: self._longest])

    @cached_property
    def _tokenizer(self) -> Any:
        remedy = "save the tokenizer there, or leave the .txt members out"
        return load_pretrained(self._context, "AutoTokenizer", "data.audio with transcripts", remedy)


def _forced(entries: Sequence[Sequence[int | None]]) -> list[int]:
    """Tokens at the places 1, 2, ... of what is written; up to one that the model finds for itself."""
    forced: list[int] = []
    by_place = {entry[0]: entry[1] for entry in entries}
    while (token := by_place.get(len(forced) + 1)) is not None:
        forced.append(token)
    return forced
