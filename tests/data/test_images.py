"""Pictures as samples: decoded as they are meant to be seen, prepared as the model was trained, read where they lie."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from distributed_adaround.data import images
from distributed_adaround.data.encoder import EncoderContext
from distributed_adaround.data.images import ImageEncoder
from distributed_adaround.data.listing import build_manifest
from distributed_adaround.data.loader import SampleLoader
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.errors import InputError, SpecError
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.spec.data import DataSpec

# Pillow and transformers warn of what is about to change in them.
pytestmark = pytest.mark.filterwarnings("ignore")

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def files() -> Iterator[LocalFiles]:
    with LocalFiles.temporary() as local:
        yield local


def encoder(
    files: LocalFiles, images: dict[str, Any] | None = None, processor: Path | None = None, labels: bool = False
) -> ImageEncoder:
    spec = DataSpec(uri="-", images={} if images is None else images)
    return ImageEncoder(EncoderContext(spec, files, processor, labels))


def plain(files: LocalFiles, **changes: Any) -> ImageEncoder:
    """Pictures as they are, from 0 to 1; with changes also in grey."""
    return encoder(files, {"resize": None} | changes)


def png(pixels: np.ndarray[Any, Any] = PIXELS, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


def archive(path: Path, members: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def processor(folder: Path, size: dict[str, int] | None = None, **config: Any) -> Path:
    """A directory with the image processor of a ViT."""
    from transformers import ViTImageProcessor

    ViTImageProcessor(size=size or {"height": 8, "width": 10}, do_resize=size != {}).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "vit"} | config))
    return folder


def pixels_of(found: Tensor) -> np.ndarray[Any, Any]:
    """`(H, W, C)` bytes from `(C, H, W)` floats from 0 to 1."""
    scaled = found.numpy().transpose(1, 2, 0) * 255
    assert np.abs(scaled - scaled.round()).max() < 1e-3
    return scaled.round().astype(np.uint8)


def test_resized_cut_and_normalized_by_hand(files: LocalFiles, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    samples = encoder(files, {"resize": 15, "crop": 9, "mean": mean, "std": std}).open(tmp_path / "a.png", "a.png")
    assert samples.fields == (FieldInfo("input", "float32", (3, 9, 9)),)
    assert samples.num_samples == 1
    resized = np.asarray(Image.fromarray(PIXELS).resize((22, 15), Image.Resampling.BICUBIC))
    # (22 - 9) / 2 is halfway between two pixels: to the even one, as torchvision does.
    wanted = (resized[3:12, 6:15] / 255 - np.array(mean)) / np.array(std)
    found = samples.read(0)["input"]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted.transpose(2, 0, 1), atol=1e-6)


def test_the_image_processor_of_the_model(files: LocalFiles, tmp_path: Path) -> None:
    beside = processor(tmp_path / "model")
    (tmp_path / "a.png").write_bytes(png())
    samples = encoder(files, processor=beside).open(tmp_path / "a.png", "a.png")
    assert samples.fields == (FieldInfo("pixel_values", "float32", (3, 8, 10)),)
    resized = np.asarray(Image.fromarray(PIXELS).resize((10, 8), Image.Resampling.BILINEAR))
    wanted = (resized / 255 - 0.5) / 0.5
    np.testing.assert_allclose(samples.read(0)["pixel_values"].numpy(), wanted.transpose(2, 0, 1), atol=1e-6)
    # Another processor makes other samples of the same files; with a model beside, the field has its name.
    other = processor(tmp_path / "other", {"height": 8, "width": 9})
    assert encoder(files, processor=other).digest != encoder(files, processor=beside).digest
    assert plain(files, crop=4).open(tmp_path / "a.png", "a").fields[0].name == "input"
    assert encoder(files, {"crop": 4}, beside).open(tmp_path / "a.png", "a").fields[0].name == "pixel_values"


def test_the_image_processor_inside_a_processor_of_several_parts(files: LocalFiles, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import CLIPImageProcessor, CLIPProcessor, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 6, "width": 6})
    CLIPProcessor(images, PreTrainedTokenizerFast(tokenizer_object=words)).save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    (tmp_path / "a.png").write_bytes(png())
    samples = encoder(files, processor=tmp_path).open(tmp_path / "a.png", "a.png")
    assert samples.fields[0].shape == samples.read(0)["pixel_values"].shape == (3, 6, 6)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_pictures_stand_upright(files: LocalFiles, tmp_path: Path, orientation: int, kind: str) -> None:
    # Constant tiles survive the compression of JPEG: the quarters of the picture, far from their borders.
    tiles = np.array([[[200, 0, 0], [0, 200, 0]], [[0, 0, 200], [200, 200, 200]]], np.uint8)
    wide = tiles.repeat(16, 0).repeat(32, 1)
    turned = {
        1: wide, 2: wide[:, ::-1], 3: wide[::-1, ::-1], 4: wide[::-1], 5: wide.transpose(1, 0, 2),
        6: wide.transpose(1, 0, 2)[:, ::-1], 7: wide[::-1, ::-1].transpose(1, 0, 2), 8: wide.transpose(1, 0, 2)[::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(png(wide, kind, exif=exif, **options))
    samples = plain(files).open(path, "a")
    assert samples.fields[0].shape == (3, *turned.shape[:2])
    found = pixels_of(samples.read(0)["input"]).astype(int)
    assert np.abs(found - turned)[8::16, 8::16].max() <= 8


def test_all_kinds_of_pixels_become_colours_or_grey(files: LocalFiles, tmp_path: Path) -> None:
    grey = PIXELS[..., 0]
    colours = Image.fromarray(PIXELS)
    palette = colours.quantize(16)
    alpha = Image.fromarray(grey).point(lambda value: value // 2)
    with_alpha = colours.copy()
    with_alpha.putalpha(alpha)
    pictures = {
        "grey.png": (Image.fromarray(grey), np.stack([grey] * 3, 2)),
        "deep.png": (Image.fromarray(grey.astype(np.uint16) * 256 + 77), np.stack([grey] * 3, 2)),
        "bits.png": (Image.fromarray(grey > 99), np.stack([(grey > 99) * 255] * 3, 2)),
        "palette.png": (palette, np.asarray(palette.convert("RGB"))),
        "alpha.png": (with_alpha, PIXELS),
        "grey_alpha.png": (Image.merge("LA", (Image.fromarray(grey), alpha)), np.stack([grey] * 3, 2)),
    }
    for name, (picture, wanted) in pictures.items():
        picture.save(tmp_path / name, **({"transparency": b"\0\x80"} if name == "palette.png" else {}))
        found = plain(files).open(tmp_path / name, name).read(0)["input"]
        np.testing.assert_array_equal(pixels_of(found), wanted, err_msg=name)
    ink = np.full((16, 16, 4), (0, 200, 250, 10), np.uint8)
    Image.fromarray(ink, "CMYK").save(tmp_path / "ink.jpg", quality=100)
    found = pixels_of(plain(files).open(tmp_path / "ink.jpg", "ink").read(0)["input"]).astype(int)
    assert np.abs(found - np.array([255, 55, 5]) * (245 / 255)).max() <= 6
    found = plain(files, mean=[0.5], std=[0.25]).open(tmp_path / "deep.png", "deep").read(0)["input"]
    np.testing.assert_allclose(found.numpy(), (grey[None] / 255 - 0.5) / 0.25, atol=1e-6)


def test_members_of_an_archive(files: LocalFiles, tmp_path: Path) -> None:
    members = {
        "b/2.jpg.extra.png": png(PIXELS + 1),
        "b/2.cls": b"1",
        "../../up.png": png(PIXELS + 2),
        "/abs.v1.webp": png(PIXELS + 3, "WEBP", lossless=True),
        "b/._2.png": b"of macOS",
        "readme.txt": b"no sample",
    }
    path = archive(tmp_path / "a.tar", members)
    before = sorted(tmp_path.parent.rglob("*"))
    samples = plain(files).open(path, "a.tar")
    assert samples.num_samples == 3
    for row, shift in enumerate((1, 2, 3)):
        np.testing.assert_array_equal(pixels_of(samples.read(row)["input"]), PIXELS + shift)
    assert sorted(tmp_path.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (lambda whole: whole[:700], "damaged or not of this type: unexpected end of data"),
        (lambda whole: whole[:2048], "is damaged or cut off after member 'b.png'; get it again"),
        (lambda whole: whole[:1024] + b"x" * 512 + whole[1536:], "is damaged or cut off after member 'a.png'"),
        (lambda whole: b"x" * 5000, "damaged or not of this type"),
        (lambda whole: b"", "damaged or not of this type: empty file"),
    ],
)
def test_a_damaged_archive(files: LocalFiles, tmp_path: Path, damage: Any, wanted: str) -> None:
    small = png(PIXELS[:4, :4])
    path = archive(tmp_path / "a.tar", {"a.png": small, "b.png": small})
    assert len(small) < 512
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=wanted) as caught:
        plain(files).open(path, "there/a.tar")
    assert str(caught.value).startswith("there/a.tar: ")


def test_an_archive_that_holds_no_pictures_or_is_compressed(files: LocalFiles, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^a: has no member \.jpg or \.jpeg or \.png or \.webp; remove it"):
        plain(files).open(archive(tmp_path / "a.tar", {"a.wav": b"-"}), "a")
    with pytest.raises(InputError, match=r"^a: cannot be read, damaged or not of this type"):
        plain(files).open(archive(tmp_path / "b.tar", {"a.png": png()}, "w:gz"), "a")
    with pytest.raises(InputError, match=r"^a, member 'x\.1\.png': shares its name .* with member 'x\.2\.png'"):
        plain(files).open(archive(tmp_path / "c.tar", {"x.1.png": png(), "x.2.png": png()}), "a")


def test_what_is_no_picture(files: LocalFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    not_one = "is no picture of the types JPEG, PNG, WEBP; remove it, or get it again"
    for content in (b"", b"text", png(kind="GIF")):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(InputError, match=rf"^x/a\.png: {not_one}$"):
            plain(files).open(tmp_path / "a.png", "x/a.png")
        tar = archive(tmp_path / "a.tar", {"a.png": content})
        with pytest.raises(InputError, match=rf"^a\.tar, member 'a\.png': {not_one}$"):
            plain(files).open(tar, "a.tar")
    for kind in ("PNG", "JPEG", "WEBP"):
        whole = png(kind=kind)
        (tmp_path / "a.png").write_bytes(whole[: len(whole) - 40 if kind != "WEBP" else 60])
        with pytest.raises(InputError, match=r"^a\.png: ") as caught:
            plain(files).open(tmp_path / "a.png", "a.png").read(0)
        assert "\n" not in str(caught.value)
    (tmp_path / "a.png").write_bytes(png())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 30 // 2 - 1)
    with pytest.raises(InputError, match=r"^a\.png: cannot be read.* decompression bomb"):
        plain(files).open(tmp_path / "a.png", "a.png")


def test_no_square_that_large(files: LocalFiles, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    with pytest.raises(InputError, match=r"^a\.png: is 30 x 20 pixels, from which no 21 x 21 can be cut"):
        plain(files, crop=21).open(tmp_path / "a.png", "a.png")
    with pytest.raises(SpecError, match=r"crop: 21 is more than resize, 20; make it 20 or less"):
        plain(files, resize=20, crop=21)
    with pytest.raises(SpecError, match=r"mean: .* has two numbers"):
        plain(files, mean=[0.5, 0.5], std=[0.5, 0.5])
    with pytest.raises(SpecError, match=r"std: .* must be a list of three numbers above 0"):
        plain(files, mean=[0.5], std=[0.0])


def test_nothing_says_how_pictures_are_prepared(
    files: LocalFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = r"name one by data\.processor, or say by data\.images how pictures are prepared: \{resize: 256"
    with pytest.raises(InputError, match=rf"^data\.images needs a directory .* no model\.hf; {remedy}"):
        encoder(files)
    with pytest.raises(InputError, match=rf"AutoImageProcessor cannot be loaded from .* model\.hf: .*; {remedy}"):
        encoder(files, processor=tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match=r"^the directory of model\.hf: config\.json holds no object"):
        encoder(files, processor=tmp_path)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(InputError, match=r"needs Pillow: pip install 'distributed_adaround\[hf\]'"):
        plain(files)


def test_a_processor_of_many_parts_of_a_picture_is_refused(files: LocalFiles, tmp_path: Path) -> None:
    from transformers import Qwen2VLImageProcessor

    Qwen2VLImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="makes no tensor for each picture; prepare arrays"):
        encoder(files, processor=tmp_path)


def test_classes_are_folders_or_members(files: LocalFiles, tmp_path: Path) -> None:
    beside = processor(tmp_path / "model", label2id={"cat": 3, "12": 5, "dog": 7})
    reader = encoder(files, {"crop": 4}, beside, labels=True)
    (tmp_path / "a.png").write_bytes(png())
    for folder, number in (("cat", 3), ("12", 5), ("7", 7)):
        samples = reader.open(tmp_path / "a.png", f"s3://data/{folder}/a.png")
        assert samples.fields[-1] == FieldInfo("labels", "int64", ())
        assert torch.equal(samples.read(0)["labels"], torch.tensor(number))
    for shown in ("s3://data/cow/a.png", "data/8/a.png", "a.png"):
        with pytest.raises(InputError, match=r"is no class in label2id of config\.json and no number of one; name"):
            reader.open(tmp_path / "a.png", shown)
    members = {"cat/1.png": png(), "dog/2.png": png(), "dog/2.cls": b"3\n", "3.png": png(), "3.cls": b"dog"}
    samples = reader.open(archive(tmp_path / "a.tar", members), "cow/a.tar")
    assert [int(samples.read(row)["labels"]) for row in range(3)] == [3, 3, 7]
    with pytest.raises(InputError, match=r"^a\.tar, member 'x\.png': the name of its member \.cls, '-1', is no class"):
        reader.open(archive(tmp_path / "b.tar", {"x.png": png(), "x.cls": b"-1"}), "a.tar")
    # Without a list of classes any number is one.
    samples = encoder(files, {"crop": 4}, labels=True).open(tmp_path / "a.png", "12/a.png")
    assert int(samples.read(0)["labels"]) == 12
    (beside / "config.json").write_text('{"label2id": {"cat": "3"}}')
    with pytest.raises(InputError, match="label2id does not map names to numbers"):
        encoder(files, {"crop": 4}, beside, labels=True)


def test_a_remote_picture_has_the_class_of_its_own_folder(files: LocalFiles) -> None:
    with fsspec.open("memory://pictures/31/a.png", "wb") as file:
        file.write(png())
    reader = encoder(files, {"crop": 4}, labels=True)
    manifest = build_manifest(
        "memory://pictures/", reader, files, num_samples=None, microbatch_size=1, virtual_shards=1
    )
    with SampleLoader(manifest, [0], reader, files, mask_field="attention_mask") as loader:
        assert loader.load(0)["labels"].tolist() == [31]


def test_two_ranks_read_what_one_reads(files: LocalFiles, tmp_path: Path) -> None:
    beside = processor(tmp_path / "model", {})
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.png").write_bytes(png(PIXELS[: 10 + i, i:]))
    archive(folder / "b.tar", {f"{i}.png": png(PIXELS[i:]) for i in range(5)})
    reader = encoder(files, processor=beside)
    manifest = build_manifest(str(folder), reader, files, num_samples=None, microbatch_size=2, virtual_shards=3)
    assert manifest.fields == (FieldInfo("pixel_values", "float32", (3, None, None)),)
    assert [file.fields[0].shape for file in manifest.files[:2]] == [(3, 10, 30), (3, 11, 29)]

    def read(rank: int, world_size: int) -> dict[int, dict[str, Tensor]]:
        own = encoder(files, processor=beside)
        owned = manifest.owned(rank, world_size)
        with SampleLoader(manifest, owned, own, files, mask_field="attention_mask") as loader:
            return dict(loader)

    whole, parts = read(0, 1), read(0, 2) | read(1, 2)
    assert whole.keys() == parts.keys() == set(range(5))
    for index, batch in whole.items():
        for name, value in batch.items():
            assert torch.equal(value, parts[index][name])
    # Smaller pictures are filled up to the largest of their microbatch.
    first = whole[0]["pixel_values"]
    assert first.shape == (2, 3, 11, 30)
    np.testing.assert_allclose(first[0, :, :10].numpy(), (PIXELS[:10].transpose(2, 0, 1) / 255 - 0.5) / 0.5, atol=1e-6)
    assert not first[0, :, 10:].any()
    assert not first[1, :, :, 29:].any()


def test_an_image_processor_that_fails_is_one_line(
    files: LocalFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def to_dict(self) -> dict[str, Any]:
            return {}

        def __call__(self, *_: Any, **__: Any) -> None:
            raise ValueError("no\nand no again")

    monkeypatch.setattr(images, "load_pretrained", lambda *_: Failing())
    with pytest.raises(
        InputError, match=r"^Failing cannot take a picture: ValueError: no; choose another, or say"
    ) as error:
        encoder(files, processor=tmp_path)
    assert "\n" not in str(error.value)
