"""Recordings as samples: whole, at the rate of the model, in pieces of equal length; with rows that do not count."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from distributed_adaround.data import features
from distributed_adaround.data.audio import AudioEncoder
from distributed_adaround.data.encoder import ROW_MASK, EncoderContext
from distributed_adaround.data.listing import build_manifest
from distributed_adaround.data.loader import SampleLoader
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.data.microbatches import bind_inputs
from distributed_adaround.errors import InputError
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.spec.data import DataSpec

# transformers warns of what is about to change in it.
pytestmark = pytest.mark.filterwarnings("ignore")

RATE = 1000
CONVOLUTIONS = {"conv_kernel": [10, 3], "conv_stride": [5, 2]}


@pytest.fixture
def files() -> Iterator[LocalFiles]:
    with LocalFiles.temporary() as local:
        yield local


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    """A directory with an extractor of raw waveforms, which are left as they are."""
    from transformers import Wav2Vec2FeatureExtractor

    Wav2Vec2FeatureExtractor(sampling_rate=RATE, do_normalize=False).save_pretrained(tmp_path / "waves")
    (tmp_path / "waves" / "config.json").write_text(json.dumps(CONVOLUTIONS))
    return tmp_path / "waves"


@pytest.fixture
def whisper(tmp_path: Path) -> Path:
    """A directory with the extractor of a Whisper of 2 s and 8 mel bands, and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

    folder = tmp_path / "whisper"
    WhisperFeatureExtractor(feature_size=8, chunk_length=2).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"?": 10, "to": 11, "be": 12}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    config = {"is_encoder_decoder": True, "decoder_start_token_id": 3, "pad_token_id": 1, "max_target_positions": 6}
    (folder / "config.json").write_text(json.dumps(config))
    forced = {"forced_decoder_ids": [[2, 6], [1, 5], [3, None], [4, 9]]}
    (folder / "generation_config.json").write_text(json.dumps(forced))
    return folder


def encoder(files: LocalFiles, processor: Path | None, labels: bool = False, **audio: Any) -> AudioEncoder:
    return AudioEncoder(EncoderContext(DataSpec(uri="-", audio=audio), files, processor, labels))


def noise(frames: int, channels: int = 1, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (frames, channels)).astype(np.float32)


def recording(sound: np.ndarray[Any, Any], rate: int = RATE, kind: str = "WAV", subtype: str = "FLOAT") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, sound, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rows(samples: int) -> int:
    """Steps of the two convolutions that a waveform goes through."""
    return len(range(0, len(range(0, samples - 10 + 1, 5)) - 3 + 1, 2))


def test_channels_are_averaged(files: LocalFiles, waves: Path, tmp_path: Path) -> None:
    sound = noise(500, 2)
    samples = encoder(files, waves).open(written(tmp_path / "a.wav", recording(sound)), "a.wav")
    assert samples.num_samples == 1
    assert samples.fields == (FieldInfo("input_values", "float32", (None,)), FieldInfo(ROW_MASK, "int64", (None,)))
    found = samples.read(0)
    np.testing.assert_allclose(found["input_values"].numpy(), (sound[:, 0] + sound[:, 1]) / 2, atol=1e-6)
    assert found["input_values"].dtype == torch.float32
    assert torch.equal(found[ROW_MASK], torch.ones(rows(500), dtype=torch.int64))


@pytest.mark.parametrize("rate", [400, 1600, 2000])
def test_another_rate(files: LocalFiles, waves: Path, tmp_path: Path, rate: int) -> None:
    """A tone stays the tone it was: the same pitch, loudness and length."""

    def tone(at: int) -> np.ndarray[Any, Any]:
        return 0.5 * np.sin(2 * np.pi * 50 * np.arange(2 * at) / at)

    path = written(tmp_path / "a.flac", recording(tone(rate), rate, "FLAC", "PCM_16"))
    found = encoder(files, waves).open(path, "a").read(0)["input_values"].numpy()
    assert len(found) == 2 * RATE
    np.testing.assert_allclose(found[200:-200], tone(RATE)[200:-200], atol=1e-3)


def test_long_recordings_are_cut_into_equal_pieces(files: LocalFiles, waves: Path, tmp_path: Path) -> None:
    sound = noise(2500)
    path = written(tmp_path / "a.wav", recording(sound))
    samples = encoder(files, waves, seconds=0.8).open(path, "a")
    pieces = [samples.read(row)["input_values"] for row in range(samples.num_samples)]
    assert [len(piece) for piece in pieces] == [625] * 4
    np.testing.assert_array_equal(torch.cat(pieces).numpy(), sound[:, 0])
    assert encoder(files, waves, seconds=2.5).open(path, "a").num_samples == 1
    # 30 s by itself.
    path = written(tmp_path / "b.wav", recording(noise(30 * RATE + 1)))
    assert encoder(files, waves).open(path, "b").num_samples == 2


def test_the_model_gets_a_mask_where_its_extractor_makes_one(files: LocalFiles, waves: Path, tmp_path: Path) -> None:
    path = written(tmp_path / "a.wav", recording(noise(500)))
    written(tmp_path / "b.wav", recording(noise(300)))
    for makes_mask in (False, True):
        settings = json.loads((waves / "preprocessor_config.json").read_text())
        (waves / "preprocessor_config.json").write_text(json.dumps(settings | {"return_attention_mask": makes_mask}))
        reader = encoder(files, waves)
        manifest = build_manifest(
            [str(path), str(tmp_path / "b.wav")], reader, files, num_samples=None, microbatch_size=2, virtual_shards=1
        )
        with SampleLoader(manifest, [0], reader, files, pad_value=7, mask_field="attention_mask") as loader:
            batch = loader.load(0)
        assert ("attention_mask" in batch) is makes_mask
        # The silence that the extractor itself would add, whatever data.pad_value says.
        assert not batch["input_values"][1, 300:].any()
        inputs = bind_inputs(batch, ["input_values", "attention_mask"], "attention_mask")
        assert inputs.kwargs.keys() == batch.keys() - {ROW_MASK}
        assert inputs.mask is batch[ROW_MASK]
        assert inputs.mask.tolist() == [[1] * rows(500), [1] * rows(300) + [0] * (rows(500) - rows(300))]
        if makes_mask:
            assert batch["attention_mask"].sum(1).tolist() == [500, 300]


def test_features_of_one_size(files: LocalFiles, whisper: Path, tmp_path: Path) -> None:
    from transformers import WhisperFeatureExtractor

    sound = noise(16000, 1, 3)
    reader = encoder(files, whisper)
    samples = reader.open(written(tmp_path / "a.wav", recording(sound, 16000)), "a")
    decoder = FieldInfo("decoder_input_ids", "int64", (3,)), FieldInfo(ROW_MASK, "int64", (3,))
    assert samples.fields == (FieldInfo("input_features", "float32", (8, 200)), *decoder)
    found = samples.read(0)
    # Up to the token that the model finds for itself.
    assert found["decoder_input_ids"].tolist() == [3, 5, 6]
    padded = np.concatenate([sound[:, 0], np.zeros(16000, np.float32)])
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=2)
    wanted = extractor(padded, sampling_rate=16000, return_tensors="np")["input_features"][0]
    np.testing.assert_allclose(found["input_features"].numpy(), wanted, atol=1e-5)
    # It takes 2 s: nothing of a longer one is lost.
    assert reader.extractor.seconds == 2
    path = written(tmp_path / "b.wav", recording(noise(5 * 16000), 16000))
    assert reader.open(path, "b").num_samples == 3
    with pytest.raises(InputError, match=r"seconds: WhisperFeatureExtractor does not take 3 s as a whole; make it"):
        encoder(files, whisper, seconds=3)


def test_an_extractor_that_takes_parts_at_random_gets_none_to_choose(files: LocalFiles, tmp_path: Path) -> None:
    from transformers import ClapFeatureExtractor

    ClapFeatureExtractor(sampling_rate=8000, max_length_s=4, truncation="rand_trunc").save_pretrained(tmp_path)
    reader = encoder(files, tmp_path)
    assert reader.extractor.seconds == 4


def test_transcripts(files: LocalFiles, whisper: Path, tmp_path: Path) -> None:
    sound = recording(noise(4000), 16000)
    members = {"a.wav": sound, "a.txt": b"to be\n", "b.flac": recording(noise(4000), 16000, "FLAC", "PCM_16"),
               "c.wav": sound, "c.txt": b"to be to be to be"}  # fmt: skip
    archive(tmp_path / "a.tar", members)
    written(tmp_path / "b.wav", sound)
    reader = encoder(files, whisper)
    manifest = build_manifest(
        [str(tmp_path / "a.tar"), str(tmp_path / "b.wav")],
        reader,
        files,
        num_samples=None,
        microbatch_size=4,
        virtual_shards=1,
    )
    with SampleLoader(manifest, [0], reader, files, mask_field="attention_mask") as loader:
        batch = loader.load(0)
    assert batch["decoder_input_ids"].tolist() == [
        [3, 5, 6, 11, 12, 1],
        [3, 5, 6, 1, 1, 1],
        [3, 5, 6, 11, 12, 11],  # as many as the decoder takes
        [3, 5, 6, 1, 1, 1],
    ]
    assert batch[ROW_MASK].sum(1).tolist() == [5, 3, 6, 3]
    assert batch.keys() == {"input_features", "decoder_input_ids", ROW_MASK}
    long = archive(tmp_path / "long.tar", {"a.wav": recording(noise(40000), 16000), "a.txt": b"be"})
    with pytest.raises(InputError, match=r"^long, member 'a\.wav': is longer than 2 s, and its transcript"):
        reader.open(long, "long")
    for file in whisper.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match=r"AutoTokenizer cannot be loaded .*; save the tokenizer there"):
        encoder(files, whisper).open(tmp_path / "a.tar", "a")
    (whisper / "config.json").write_text('{"is_encoder_decoder": true}')
    with pytest.raises(InputError, match=r"^data\.audio: config\.json .* has no decoder_start_token_id"):
        encoder(files, whisper)


def test_what_is_no_recording(files: LocalFiles, waves: Path, tmp_path: Path) -> None:
    reader = encoder(files, waves)
    sound = noise(500)
    broken = sound.copy()
    broken[77] = np.nan
    whole = recording(sound)
    flac = recording(noise(20000), RATE, "FLAC", "PCM_16")
    streamed = whole[:4] + b"\xff" * 4 + whole[8:]
    cases = {
        b"text": "is no recording: .*; remove it, or get it again",
        b"": "is no recording: .*; remove it, or get it again",
        recording(sound[:0]): "is empty; remove it, or write it again",
        whole[:-1]: rf"is cut off: {len(whole) - 1} bytes of {len(whole)}; get it again",
        flac[: len(flac) // 2]: "cannot be read, damaged or not of this type: .*flac decoder lost sync",
        recording(broken): "holds numbers that are not finite; get it again",
        recording(sound[:10]): "is too short: 10 samples, of which the model makes no row; remove it",
    }
    for content, wanted in cases.items():
        for path, shown in (
            (written(tmp_path / "a.wav", content), "x/a.wav"),
            (archive(tmp_path / "a.tar", {"a.wav": content}), r"x/a.tar, member 'a.wav'"),
        ):
            with pytest.raises(InputError, match=wanted) as caught:
                reader.open(path, shown.partition(",")[0]).read(0)
            assert str(caught.value).startswith(f"{shown}: ")
            assert "\n" not in str(caught.value)
    # Written by a program that could not go back to its header.
    found = reader.open(written(tmp_path / "a.wav", streamed), "a").read(0)["input_values"]
    np.testing.assert_array_equal(found.numpy(), sound[:, 0])


@pytest.mark.parametrize("missing", ["soundfile", "soxr"])
def test_a_missing_library(files: LocalFiles, waves: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=rf"^data\.audio needs {missing}: pip install 'distributed_adaround\[hf\]'$"):
        encoder(files, waves)


def test_no_feature_extractor(files: LocalFiles, tmp_path: Path) -> None:
    remedy = r"name a directory with a feature extractor by data\.processor"
    with pytest.raises(InputError, match=rf"^data\.audio needs a directory of .*; {remedy}$"):
        encoder(files, None)
    with pytest.raises(InputError, match=rf"^data\.audio: AutoFeatureExtractor cannot be loaded .*; {remedy}$"):
        encoder(files, tmp_path)


def test_classes_of_recordings(files: LocalFiles, waves: Path, tmp_path: Path) -> None:
    sound = recording(noise(500))
    (waves / "config.json").write_text(json.dumps(CONVOLUTIONS | {"label2id": {"yes": 1, "no": 0}}))
    reader = encoder(files, waves, labels=True)
    samples = reader.open(archive(tmp_path / "a.tar", {"yes/1.wav": sound, "2.wav": sound, "2.cls": b"no"}), "a")
    assert samples.fields[-1] == FieldInfo("labels", "int64", ())
    assert [int(samples.read(row)["labels"]) for row in range(2)] == [1, 0]
    with pytest.raises(InputError, match=r"^maybe/a\.wav: the name of its folder, 'maybe', is no class"):
        reader.open(written(tmp_path / "a.wav", sound), "maybe/a.wav")


def test_two_ranks_read_what_one_reads(files: LocalFiles, waves: Path, tmp_path: Path) -> None:
    folder = tmp_path / "sounds"
    folder.mkdir()
    for i in range(4):
        written(folder / f"{i}.wav", recording(noise(700 + 311 * i, seed=i), RATE * (1 + i % 2)))
    archive(folder / "x.tar", {f"{i}.wav": recording(noise(400 + i, seed=i)) for i in range(3)})
    reader = encoder(files, waves, seconds=0.6)
    manifest = build_manifest(str(folder), reader, files, num_samples=None, microbatch_size=2, virtual_shards=3)
    assert [file.num_samples for file in manifest.files] == [2, 1, 3, 2, 3]

    def read(ranks: Sequence[int], world_size: int) -> dict[int, dict[str, Tensor]]:
        found: dict[int, dict[str, Tensor]] = {}
        for rank in ranks:
            owned, own = manifest.owned(rank, world_size), encoder(files, waves, seconds=0.6)
            with SampleLoader(manifest, owned, own, files, mask_field="attention_mask") as loader:
                found |= dict(loader)
        return found

    whole, parts = read((0,), 1), read((1, 0), 2)
    assert whole.keys() == parts.keys() == set(range(6))
    for index, batch in whole.items():
        assert batch.keys() == {"input_values", ROW_MASK}
        assert all(torch.equal(value, parts[index][name]) for name, value in batch.items())


class Drawing:
    """An extractor that leaves out the first sample of more than 2.5 s, or not, as a coin falls."""

    sampling_rate = RATE
    model_input_names = ("input_values",)

    def to_dict(self) -> dict[str, Any]:
        return {}

    def __call__(self, waveform: np.ndarray[Any, Any], **_: Any) -> dict[str, torch.Tensor]:
        start = np.random.randint(2) if len(waveform) > 2500 else 0
        return {"input_values": torch.from_numpy(waveform[None, start:])}


def test_what_is_drawn_does_not_decide_about_the_longest_piece(
    files: LocalFiles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "load_pretrained", lambda *_: Drawing())
    for seed in range(5):
        np.random.seed(seed)
        assert encoder(files, tmp_path).extractor.seconds == 2
        drawn = np.random.random()
        np.random.seed(seed)
        assert np.random.random() == drawn
