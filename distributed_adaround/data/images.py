"""Pictures as samples: .jpg, .jpeg, .png and .webp files, alone or in webdataset archives.

    bytes ── Pillow: upright, RGB or grey ── the model's image processor, or resize, crop and normalize ── tensors

The rank that lists the data reads headers only; a picture is decoded by the rank that owns it.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distributed_adaround.data.archives import ARCHIVE, Record, open_records
from distributed_adaround.data.classes import Classes
from distributed_adaround.data.encoder import (
    LABELS,
    Encoder,
    EncoderContext,
    ListedSamples,
    Samples,
    common_fields,
    fields_of,
)
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.data.pretrained import load_pretrained, read_config
from distributed_adaround.errors import InputError, first_line
from distributed_adaround.spec.encoders import ImagesSpec

if TYPE_CHECKING:
    from PIL.Image import Image

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
# Of all that Pillow can decode: some of the others start programs.
_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112
# EXIF's orientations from here on swap the sides.
_FIRST_ON_ITS_SIDE = 5
# Pictures so unlike each other that an image processor which makes one shape of all of them always does.
_PROBES = ((640, 480), (300, 500), (1000, 250), (90, 90))
_REMEDY = "or say by data.images how pictures are prepared: {resize: 256, crop: 224, mean: [...], std: [...]}"

Size = tuple[int, int]  # width and height, as in Pillow


class _Preparation(Protocol):
    """From an upright picture to the tensors of a sample. mode: of the picture, RGB or L. fixed: all have one shape.
    settings: what it does, apart from the job file."""

    mode: str
    fixed: bool
    settings: str

    def fields(self, size: Size) -> tuple[FieldInfo, ...]:
        """What a picture of this size becomes. Raises InputError when it cannot be used."""

    def __call__(self, picture: "Image") -> dict[str, Tensor]: ...


class ImageEncoder(Encoder):
    """Pictures by the image processor of the model, or as `data.images` says."""

    suffixes = (*_SUFFIXES, ARCHIVE)
    pad_values: Mapping[str, int | float] = {}

    def __init__(self, context: EncoderContext) -> None:
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise InputError("data.images needs Pillow: pip install 'distributed_adaround[hf]'") from error
        spec, config = context.spec.images or ImagesSpec(), read_config(context)
        self.prepare: _Preparation
        if spec.by_hand:
            self.prepare = _ByHand(spec, "pixel_values" if config else "input")
        else:
            self.prepare = _ByProcessor(context)
        self.classes = Classes(config) if context.labels else None
        self.digest = hashlib.sha256(f"{self.prepare.settings} {self.classes}".encode()).hexdigest()

    def open(self, path: Path, shown: str) -> Samples:
        records = open_records(path, shown, _SUFFIXES)
        # Sizes of all, so that a file which is no picture is found before the job starts.
        fields = common_fields(list(dict.fromkeys(map(self._fields, records))))
        if self.classes is not None:
            self.classes.check(records)
            fields += (self.classes.field,)
        return ListedSamples(records, fields, self.sample)

    def _fields(self, record: Record) -> tuple[FieldInfo, ...]:
        with record.main.open() as file, _opened(file) as image:
            size = image.size
            # Pillow decodes a .png to look for its orientation.
            if not self.prepare.fixed and image.getexif().get(_ORIENTATION, 1) >= _FIRST_ON_ITS_SIDE:
                size = size[::-1]
            return self.prepare.fields(size)

    def sample(self, record: Record) -> dict[str, Tensor]:
        """The tensors of a picture. Raises InputError."""
        with record.main.open() as file, _opened(file) as image:
            sample = self.prepare(_upright(image, self.prepare.mode))
        return sample if self.classes is None else sample | {LABELS: torch.tensor(self.classes.of_record(record))}


@contextmanager
def _opened(file: IO[bytes]) -> Iterator["Image"]:
    """Its header; Pillow decodes the rest when it is used. Raises InputError when it is no picture."""
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(file, formats=_FORMATS)
    except UnidentifiedImageError:
        raise InputError(f"is no picture of the types {', '.join(_FORMATS)}; remove it, or get it again") from None
    with image:
        yield image


def _upright(image: "Image", mode: str) -> "Image":
    """The picture as its EXIF orientation says, in the mode RGB or L. Transparency is left out, as in training."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        # 16 bits of grey, which Pillow would clip.
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image.convert(mode)


class _ByHand:
    """Resize, cut and normalize, as is usual for models of torchvision and timm."""

    settings = ""  # all of them are in the job file

    def __init__(self, spec: ImagesSpec, name: str) -> None:
        self._spec, self._name = spec, name
        self.mode = "L" if spec.mean is not None and len(spec.mean) == 1 else "RGB"
        self.fixed = spec.crop is not None

    def _resized(self, size: Size) -> Size:
        if self._spec.resize is None:
            return size
        short = min(size)
        width, height = (max(1, side * self._spec.resize // short) for side in size)
        return width, height

    def fields(self, size: Size) -> tuple[FieldInfo, ...]:
        width, height = self._resized(size)
        if self._spec.crop is not None:
            if min(width, height) < self._spec.crop:
                what = f"is {width} x {height} pixels, from which no {self._spec.crop} x {self._spec.crop} can be cut"
                raise InputError(f"{what}; set data.images.resize, or leave it out")
            width = height = self._spec.crop
        return (FieldInfo(self._name, "float32", (len(self.mode), height, width)),)

    def __call__(self, picture: "Image") -> dict[str, Tensor]:
        from PIL.Image import Resampling

        # Pillow's bicubic filter grows with the scale: it is antialiased.
        picture = picture.resize(self._resized(picture.size), Resampling.BICUBIC)
        if self._spec.crop is not None:
            left, top = (round((side - self._spec.crop) / 2) for side in picture.size)
            picture = picture.crop((left, top, left + self._spec.crop, top + self._spec.crop))
        pixels = np.asarray(picture, np.float32).reshape(picture.height, picture.width, len(self.mode)) / 255
        if self._spec.mean is not None:
            pixels = (pixels - np.array(self._spec.mean, np.float32)) / np.array(self._spec.std, np.float32)
        return {self._name: torch.from_numpy(pixels.transpose(2, 0, 1).copy())}


class _ByProcessor:
    """The image processor of the model. Without torchvision, transformers takes its own in numpy and Pillow."""

    def __init__(self, context: EncoderContext) -> None:
        remedy = f"name one by data.processor, {_REMEDY}"
        self._processor = load_pretrained(context, "AutoImageProcessor", "data.images", remedy)
        mean = getattr(self._processor, "image_mean", None)
        self.mode = "L" if isinstance(mean, (list, tuple)) and len(mean) == 1 else "RGB"
        self.settings = json.dumps(self._processor.to_dict(), sort_keys=True, default=str)
        self._made = lru_cache(maxsize=256)(self._try)
        self.fixed = len({self._made(size) for size in _PROBES}) == 1

    def fields(self, size: Size) -> tuple[FieldInfo, ...]:
        return self._made(_PROBES[0] if self.fixed else size)

    def _try(self, size: Size) -> tuple[FieldInfo, ...]:
        from PIL import Image

        return fields_of(self(Image.new(self.mode, size)))

    def __call__(self, picture: "Image") -> dict[str, Tensor]:
        kind = type(self._processor).__name__
        try:
            made: Mapping[str, Any] = self._processor(picture, return_tensors="pt")
        except Exception as error:
            raise InputError(f"{kind} cannot take a picture: {first_line(error)}; choose another, {_REMEDY}") from error
        tensors = {name: made[name] for name in self._processor.model_input_names if name in made}
        if not tensors or any(not isinstance(value, Tensor) or len(value) != 1 for value in tensors.values()):
            raise InputError(f"{kind} makes no tensor for each picture; prepare arrays with it, and give these")
        return {name: value[0] for name, value in tensors.items()}
