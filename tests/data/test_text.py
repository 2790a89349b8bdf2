"""Texts: the tokens of the tokenizer, in windows or padded, the same on any number of ranks; what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import Tensor

from distributed_adaround.data.encoder import LABELS, EncoderContext, Samples
from distributed_adaround.data.listing import build_manifest
from distributed_adaround.data.loader import SampleLoader
from distributed_adaround.data.manifest import FieldInfo
from distributed_adaround.data.text import TextEncoder
from distributed_adaround.data.tokenizer import TextTokenizer
from distributed_adaround.errors import InputError
from distributed_adaround.files import storage
from distributed_adaround.files.local_files import LocalFiles
from distributed_adaround.spec.data import DataSpec

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

# A word's id is its place.
WORDS = ["<pad>", "<unk>", "<eos>", "<cls>", "a", "b", "c", "d", "e", "user", "bot", ":", "26", "Jul", "2024"]
PAD, UNK, EOS, CLS = range(4)
CAUSAL: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": len(WORDS)}
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' <eos> ' }}{% endfor %}"


def ids(text: str) -> list[int]:
    return [WORDS.index(word) if word in WORDS else UNK for word in text.split()]


def save_tokenizer(
    folder: Path, config: Mapping[str, Any] | None = None, *, marked: bool = False, **arguments: Any
) -> Path:
    """A tokenizer of words. marked: it puts <cls> before and <eos> behind each text."""
    words = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if marked:
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single="<cls> $A <eos>", special_tokens=[("<cls>", CLS), ("<eos>", EOS)]
        )
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"} | arguments
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(folder)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def local(tmp_path: Path) -> LocalFiles:
    return LocalFiles(tmp_path / "shared")


class Texts:
    """Encoders of one test, and the files it writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = LocalFiles(folder / "shared")
        self.causal = save_tokenizer(folder / "causal", CAUSAL)

    def encoder(self, processor: Path | None = None, *, labels: bool = False, **fields: Any) -> TextEncoder:
        spec = DataSpec.model_validate({"uri": str(self.folder), "text": fields, "processor": "the/processor"})
        return TextEncoder(EncoderContext(spec, self.files, processor or self.causal, labels))

    def write(self, name: str, content: str | bytes | list[Any]) -> Path:
        path = self.folder / name
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def open(self, name: str, content: Any, processor: Path | None = None, **fields: Any) -> Samples:
        return self.encoder(processor, **fields).open(self.write(name, content), f"shown/{name}")


@pytest.fixture
def texts(tmp_path: Path) -> Texts:
    return Texts(tmp_path)


def read(samples: Samples) -> list[dict[str, Tensor]]:
    """All samples, which must be as the fields say."""
    found = [samples.read(row) for row in range(samples.num_samples)]
    for sample in found:
        assert [*sample] == [info.name for info in samples.fields]
        for info in samples.fields:
            assert str(sample[info.name].dtype) == f"torch.{info.dtype}"
            sizes = zip(info.shape, sample[info.name].shape, strict=True)
            assert all(expected in (None, size) for expected, size in sizes)
    return found


def listed(samples: Samples, name: str = "input_ids") -> list[Any]:
    return [sample[name].tolist() for sample in read(samples)]


def write_parquet(path: Path, columns: Mapping[str, Any], row_group_size: int = 2) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, row_group_size=row_group_size)
    return path


# Windows


def test_windows_of_a_document_are_the_usual_ones(texts: Texts, caplog: pytest.LogCaptureFixture) -> None:
    text = "a b\r\n\r\nc d e a\n  b x <eos> c d\n"
    with caplog.at_level(logging.INFO):
        samples = texts.open("a.txt", text, sequence_length=4)
        again = texts.encoder(sequence_length=4).open(texts.folder / "a.txt", "shown/a.txt")
    tokens = transformers.AutoTokenizer.from_pretrained(texts.causal)(text)["input_ids"]
    assert tokens == [4, 5, 6, 7, 8, 4, 5, 1, 2, 6, 7]
    assert listed(samples) == [tokens[:4], tokens[4:8]] == listed(again)
    assert samples.fields == (FieldInfo("input_ids", "int64", (4,)),)
    lines = [record.getMessage() for record in caplog.records if "windows" in record.getMessage()]
    # Made once, told once.
    assert lines == [
        "shown/a.txt: 11 tokens are 2 windows of 4; the last 3 tokens fill none and are left out",
    ]


def test_long_documents_are_no_reason_to_warn(texts: Texts, capfd: pytest.CaptureFixture[str]) -> None:
    processor = save_tokenizer(texts.folder / "other", {}, model_max_length=4)
    assert texts.open("a.txt", "a " * 40, processor, packed=True).num_samples == 10
    assert texts.open("b.txt", "a " * 40, processor).num_samples == 1
    assert capfd.readouterr() == ("", "")


def test_line_ends_become_those_of_python(texts: Texts) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "\n": 1, "\r": 2}, []))
    folder = texts.folder / "bytes"
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    samples = texts.open("a.txt", "\ufeffa\r\na\ra\n", folder, packed=True, sequence_length=3)
    assert listed(samples) == [[0, 1, 0], [1, 0, 1]]


def test_a_trained_tokenizer_gives_the_windows_of_one_call(texts: Texts) -> None:
    sentences = ["the rain in spain stays mainly in the plain", "to be or not to be, that is the question"]
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<|end|>"], show_progress=False)
    made.train_from_iterator(sentences, trainer)
    folder = texts.folder / "trained"
    usual = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>")
    usual.save_pretrained(folder)
    text = "\n\n".join(sentences * 30)
    tokens = torch.tensor(usual(text)["input_ids"])
    samples = texts.open("a.txt", text, folder, packed=True, sequence_length=32)
    windows = torch.stack([sample["input_ids"] for sample in read(samples)])
    assert torch.equal(windows, tokens[: len(tokens) // 32 * 32].view(-1, 32))


@pytest.mark.parametrize(
    ("marked", "joined"),
    [(False, "a b <eos> c <eos> d e"), (True, "<cls> a b <eos> <cls> c <eos> <cls> d e <eos>")],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_documents_with_bounds(texts: Texts, kind: str, marked: bool, joined: str) -> None:
    processor = save_tokenizer(texts.folder / "other", CAUSAL, marked=marked)
    rows = ["a b", "", "c", "d e"]
    if kind == "jsonl":
        samples = texts.open("a.jsonl", [{"text": row} for row in rows], processor, sequence_length=1)
    else:
        path = write_parquet(texts.folder / "a.parquet", {"text": rows})
        samples = texts.encoder(processor, sequence_length=1).open(path, "shown")
    assert [window[0] for window in listed(samples)] == ids(joined)


@pytest.mark.parametrize("parallel", ["true", "false"])
def test_many_rows_are_joined_across_batches(texts: Texts, parallel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", parallel)
    rows = [WORDS[4 + i % 5] for i in range(600)]
    expected = ids(" <eos> ".join(rows))
    samples = texts.open("a.jsonl", [{"text": row} for row in rows], sequence_length=100)
    assert [token for window in listed(samples) for token in window] == expected[:1100]


def test_a_file_shorter_than_a_window_is_refused(texts: Texts) -> None:
    with pytest.raises(InputError) as error:
        texts.open("a.txt", "a b c", sequence_length=4)
    expected = "shown/a.txt: holds 3 tokens, and a window takes 4; "
    assert str(error.value) == expected + "lower data.text.sequence_length, or make data.text.packed false"
    assert texts.open("a.txt", "a b c", sequence_length=3).num_samples == 1


def test_files_shorter_than_a_window_are_left_out_beside_longer_ones(
    texts: Texts, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = tmp_path / "several"
    data.mkdir()
    for name, content in (("a.txt", "a b c"), ("b.txt", "a b c d e a b c d"), ("c.txt", "d")):
        (data / name).write_text(content)
    cut: dict[str, Any] = {"num_samples": None, "microbatch_size": 2, "virtual_shards": 4}
    with caplog.at_level(logging.WARNING):
        manifest = build_manifest(str(data), texts.encoder(sequence_length=4), texts.files, **cut)
    assert [(Path(file.uri).name, file.num_samples) for file in manifest.files] == [("b.txt", 2)]
    assert f"2 of 3 files are too short and left out, the first: {data}/a.txt: holds 3 tokens" in caplog.text
    with pytest.raises(InputError, match=r"a.txt: holds 3 tokens, and a window takes 10"):
        build_manifest(str(data), texts.encoder(sequence_length=10), texts.files, **cut)


# Texts one by one


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_each_text_is_a_sample_with_special_tokens_and_cut(texts: Texts, kind: str) -> None:
    processor = save_tokenizer(texts.folder / "other", {"model_type": "bert"}, marked=True)
    rows = ["a b", "c", "  ", "d e a b c"]
    encoder = texts.encoder(processor, sequence_length=5)
    if kind == "txt":
        path = texts.write("a.txt", "\r\n".join(["", *rows]))
    elif kind == "jsonl":
        path = texts.write("a.jsonl", [{"text": row, "n": 1} for row in rows])
    else:
        path = write_parquet(texts.folder / "a.parquet", {"n": [1] * 4, "text": rows}, row_group_size=3)
    samples = encoder.open(path, "shown")
    assert samples.fields == (FieldInfo("input_ids", "int64", (None,)),)
    assert listed(samples) == [[CLS, 4, 5, EOS], [CLS, 6, EOS], [CLS, 7, 8, 4, EOS]]


def test_the_loader_pads_with_the_padding_token_and_masks(texts: Texts, local: LocalFiles) -> None:
    processor = save_tokenizer(texts.folder / "other", {"model_type": "bert"}, pad_token="<cls>")
    texts.write("a.txt", "a b\nc\n")
    uri = str(texts.folder / "a.txt")
    encoder = texts.encoder(processor)
    manifest = build_manifest(uri, encoder, local, num_samples=None, microbatch_size=2, virtual_shards=1)
    with SampleLoader(manifest, [0], encoder, local, mask_field="attention_mask") as loader:
        batch = loader.load(0)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[4, 5], [6, CLS]],
        "attention_mask": [[1, 1], [1, 0]],
    }


@pytest.mark.parametrize(
    ("arguments", "vocab_size", "pad"),
    [
        ({}, 15, PAD),
        ({"pad_token": None}, 15, EOS),
        ({"pad_token": "<new>"}, 15, EOS),
        ({"pad_token": "<new>"}, 16, 15),
    ],
)
def test_the_padding_token_is_one_that_the_model_knows(
    texts: Texts, arguments: dict[str, Any], vocab_size: int, pad: int
) -> None:
    processor = save_tokenizer(texts.folder / "other", CAUSAL | {"vocab_size": vocab_size}, **arguments)
    assert texts.encoder(processor).pad_values["input_ids"] == pad


@pytest.mark.parametrize(
    ("config", "fields", "packed"),
    [
        (CAUSAL, {}, True),
        (CAUSAL, {"packed": False}, False),
        ({"architectures": ["GPT2LMHeadModel"]}, {}, True),
        ({"architectures": ["T5WithLMHeadModel"], "is_encoder_decoder": True}, {}, False),
        ({"architectures": ["BertForMaskedLM"]}, {}, False),
        ({"architectures": ["BertForMaskedLM"]}, {"packed": True}, True),
        (CAUSAL, {"labels": True}, False),
        (None, {}, False),
    ],
)
def test_models_that_continue_texts_get_windows(
    texts: Texts, config: dict[str, Any] | None, fields: dict[str, Any], packed: bool
) -> None:
    processor = save_tokenizer(texts.folder / "other", config)
    rows = [{"text": "a b c d", "label": 0}]
    samples = texts.open("a.jsonl", rows, processor, sequence_length=4, **fields)
    assert (samples.fields[0].shape == (4,)) is packed


@pytest.mark.parametrize(
    ("config", "arguments", "length"),
    [
        ({}, {}, 512),
        ({"max_position_embeddings": 2048}, {}, 512),
        ({"max_position_embeddings": 8}, {}, 8),
        ({"n_positions": 9}, {}, 9),
        ({"n_positions": 9}, {"model_max_length": 7}, 7),
        ({"n_positions": None, "max_position_embeddings": -1}, {"model_max_length": 7}, 7),
    ],
)
def test_the_length_is_what_the_model_takes_up_to_512(
    texts: Texts, config: dict[str, Any], arguments: dict[str, Any], length: int
) -> None:
    processor = save_tokenizer(texts.folder / "other", config, **arguments)
    assert listed(texts.open("a.txt", "a " * 600, processor)) == [[4] * length]


# Columns and chats


CHAT = [{"role": "user", "content": "a b"}, {"role": "bot", "content": "c"}]


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"text": "a", "messages": CHAT, "n": 1}, {}, "user : a b <eos> bot : c <eos>"),
        ({"text": "a", "messages": CHAT}, {"column": "text"}, "a"),
        ({"title": "b", "text": "a"}, {}, "a"),
        ({"n": 3, "body": "b c"}, {}, "b c"),
        ({"talk": CHAT, "n": None}, {}, "user : a b <eos> bot : c <eos>"),
        ({"body": "b", "title": "c"}, {"column": "title"}, "c"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_the_column_of_texts(
    texts: Texts, kind: str, row: dict[str, Any], fields: dict[str, Any], expected: str
) -> None:
    processor = save_tokenizer(texts.folder / "other", {}, marked=True, chat_template=TEMPLATE)
    if kind == "jsonl":
        samples = texts.open("a.jsonl", [row] * 3, processor, **fields)
    else:
        path = write_parquet(texts.folder / "a.parquet", {name: [value] * 3 for name, value in row.items()})
        samples = texts.encoder(processor, **fields).open(path, "shown")
    # Chats come out of the template with all special tokens that they have.
    around = ids(expected) if "user" in expected else [CLS, *ids(expected), EOS]
    assert listed(samples) == [around] * 3


def test_packed_chats_are_joined_as_the_template_writes_them(texts: Texts) -> None:
    processor = save_tokenizer(texts.folder / "other", CAUSAL, chat_template=TEMPLATE)
    samples = texts.open("a.jsonl", [{"messages": CHAT}] * 3, processor, sequence_length=3)
    tokens = ids("user : a b <eos> bot : c <eos>") * 3
    assert listed(samples) == [tokens[i : i + 3] for i in range(0, 27, 3)]


def test_a_template_that_asks_for_the_date_gets_the_same_every_day(texts: Texts) -> None:
    template = "{{ strftime_now('%d %b %Y') if strftime_now is defined }} " + TEMPLATE
    processor = save_tokenizer(texts.folder / "other", {}, chat_template=template)
    samples = texts.open("a.jsonl", [{"messages": CHAT[:1]}], processor)
    assert listed(samples) == [ids("26 Jul 2024 user : a b <eos>")]


# Decoders and classes


def test_decoders_get_the_target_behind_their_start(texts: Texts) -> None:
    config = {"is_encoder_decoder": True, "decoder_start_token_id": CLS}
    processor = save_tokenizer(texts.folder / "other", config, marked=True)
    rows = [{"text": "a b c", "summary": "d"}, {"text": "a", "summary": "b c d e"}]
    samples = texts.open("a.jsonl", rows, processor, target_column="summary", sequence_length=5)
    varying = ("input_ids", "decoder_input_ids", "decoder_attention_mask")
    assert samples.fields == tuple(FieldInfo(name, "int64", (None,)) for name in varying)
    assert listed(samples) == [[CLS, 4, 5, 6, EOS], [CLS, 4, EOS]]
    # [CLS d EOS] and [CLS b c d EOS], behind the start and without the last.
    assert listed(samples, "decoder_input_ids") == [[CLS, CLS, 7], [CLS, CLS, 5, 6, 7]]
    assert listed(samples, "decoder_attention_mask") == [[1] * 3, [1] * 5]
    itself = texts.open("b.jsonl", rows, processor, column="text")
    assert listed(itself, "decoder_input_ids") == [[CLS, CLS, 4, 5, 6], [CLS, CLS, 4]]


def test_decoders_get_a_window_behind_their_start(texts: Texts) -> None:
    processor = save_tokenizer(texts.folder / "other", {"is_encoder_decoder": True})
    (processor / "generation_config.json").write_text('{"decoder_start_token_id": 2}')
    samples = texts.open("a.txt", "a b c d e", processor, packed=True, sequence_length=2)
    assert samples.fields == tuple(FieldInfo(name, "int64", (2,)) for name in ("input_ids", "decoder_input_ids"))
    assert listed(samples) == [[4, 5], [6, 7]]
    assert listed(samples, "decoder_input_ids") == [[EOS, 4], [EOS, 6]]


def test_the_loader_pads_and_masks_both_sides(texts: Texts, local: LocalFiles) -> None:
    processor = save_tokenizer(texts.folder / "other", {"is_encoder_decoder": True}, pad_token="<unk>")
    path = texts.write("a.jsonl", [{"text": "a b", "to": "c"}, {"text": "d", "to": "a b c"}])
    encoder = texts.encoder(processor, target_column="to")
    manifest = build_manifest(str(path), encoder, local, num_samples=None, microbatch_size=2, virtual_shards=1)
    with SampleLoader(manifest, [0], encoder, local, mask_field="attention_mask") as loader:
        batch = {name: value.tolist() for name, value in loader.load(0).items()}
    assert batch == {
        "input_ids": [[4, 5], [7, UNK]],
        "attention_mask": [[1, 1], [1, 0]],
        # No model and no generation says how they start, so they do with the padding token.
        "decoder_input_ids": [[UNK, UNK, UNK], [UNK, 4, 5]],
        "decoder_attention_mask": [[1, 0, 0], [1, 1, 1]],
    }


@pytest.mark.parametrize(
    ("config", "column", "values", "expected"),
    [
        ({"label2id": {"bad": 0, "good": 1}}, "label", ["good", 0, 1], [1, 0, 1]),
        ({"label2id": {"bad": 0, "good": 1}}, "mood", ["bad", "good", "bad"], [0, 1, 0]),
        ({}, "label", [0, 7, 2], [0, 7, 2]),
        ({}, "label", ["7", "0"], [7, 0]),
    ],
)
def test_classes_by_number_or_name(
    texts: Texts, config: dict[str, Any], column: str, values: list[Any], expected: list[int]
) -> None:
    processor = save_tokenizer(texts.folder / "other", config)
    rows = [{"words": "a b", column: value} for value in values]
    named = {} if column == "label" else {"label_column": column}
    samples = texts.open("a.jsonl", rows, processor, labels=True, **named)
    assert samples.fields[-1] == FieldInfo(LABELS, "int64", ())
    assert listed(samples, LABELS) == expected


# The same for everyone


def test_two_ranks_get_what_one_rank_gets(texts: Texts) -> None:
    processor = save_tokenizer(texts.folder / "other", {}, marked=True)
    rng = np.random.default_rng(0)
    rows = [" ".join(rng.choice(WORDS[4:9], size)) for size in rng.integers(1, 9, 23)]
    folder = texts.folder / "data"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(rows[:10]))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows[10:17]))
    write_parquet(folder / "c.parquet", {"text": rows[17:]})
    first = texts.encoder(processor)
    manifest = build_manifest(str(folder), first, texts.files, num_samples=None, microbatch_size=3, virtual_shards=4)
    loaded: dict[int, dict[str, Tensor]] = {}
    for rank, world_size in ((0, 1), (0, 2), (1, 2)):
        # As on two machines, each with its own encoder and files.
        encoder, files = texts.encoder(processor), LocalFiles(texts.folder / f"{rank} of {world_size}")
        with SampleLoader(manifest, manifest.owned(rank, world_size), encoder, files, mask_field="mask") as loader:
            for index, batch in loader:
                known = loaded.setdefault(index, batch)
                assert all(torch.equal(known[name], batch[name]) for name in ("input_ids", "mask"))
    found = [
        batch["input_ids"][i][batch["mask"][i] == 1].tolist()
        for _, batch in sorted(loaded.items())
        for i in range(len(batch["mask"]))
    ]
    assert found == [[CLS, *ids(row), EOS] for row in rows]


@pytest.fixture
def remote() -> Iterator[str]:
    """The URI of an empty folder in a store of this process."""
    MemoryFileSystem.store.clear()
    yield "memory://bucket"
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("packed", [True, False])
def test_each_remote_file_is_fetched_once(
    texts: Texts, remote: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryFileSystem()
    for path in sorted(texts.causal.iterdir()):
        store.pipe_file(f"/bucket/model/{path.name}", path.read_bytes())
    for name in ("a.txt", "b.txt"):
        store.pipe_file(f"/bucket/data/{name}", b"a b c\nd e\n")
    fetched: list[str] = []
    download = storage.download
    monkeypatch.setattr(storage, "download", lambda uri, to: (fetched.append(uri), download(uri, to)))
    for _ in range(2):
        processor = texts.files.directory(f"{remote}/model", lambda name: True)
        encoder = texts.encoder(processor, packed=packed, sequence_length=2)
        uri = f"{remote}/data"
        manifest = build_manifest(uri, encoder, texts.files, num_samples=None, microbatch_size=1, virtual_shards=2)
        with SampleLoader(manifest, manifest.owned(0, 1), encoder, texts.files, mask_field="attention_mask") as loader:
            found = [batch["input_ids"].tolist()[0] for _, batch in loader]
        assert found == ([[4, 5], [6, 7]] if packed else [[4, 5], [7, 8]]) * 2
    expected = [f"model/{path.name}" for path in texts.causal.iterdir()] + ["data/a.txt", "data/b.txt"]
    assert sorted(uri.removeprefix("memory://").partition("bucket/")[2] for uri in fetched) == sorted(expected)


def test_files_are_tokenized_once_for_all_encoders_of_a_machine(texts: Texts, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    tokenize = TextTokenizer.ids
    monkeypatch.setattr(
        TextTokenizer, "ids", lambda self, *args, **options: (calls.append(1), tokenize(self, *args, **options))[1]
    )
    windows = [texts.open("a.txt", "a b c d", sequence_length=length) for length in (2, 2, 4)]
    assert [samples.num_samples for samples in windows] == [2, 2, 1]
    assert len(calls) == 2


def test_the_digest_is_of_what_decides_about_tokens(texts: Texts) -> None:
    digests = [texts.encoder().digest]
    for name in ("tokenizer.json", "chat_template.jinja", "config.json", "generation_config.json"):
        path = texts.causal / name
        old = path.read_text() if path.exists() else "{}"
        path.write_text(old + " ")
        digests.append(texts.encoder().digest)
    assert len(set(digests)) == len(digests)
    (texts.causal / "README.md").write_text("no matter")
    assert texts.encoder().digest == digests[-1]
    same = save_tokenizer(texts.folder / "elsewhere", CAUSAL)
    assert texts.encoder(same).digest == digests[0]


# What is refused, in one line


def refused(texts: Texts, name: str, content: Any, **fields: Any) -> str:
    with pytest.raises(InputError) as error:
        read(texts.open(name, content, **fields))
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "content", "fields", "message"),
    [
        ("a.txt", b"", {}, "shown/a.txt: holds no text; remove the file"),
        ("a.txt", b"\xef\xbb\xbf \n\n", {}, "shown/a.txt: holds no text; remove the file"),
        ("a.txt", b"", {"packed": False}, "shown/a.txt: holds no text; remove the file"),
        ("a.jsonl", b"\n", {}, "shown/a.jsonl: holds no text; remove the file"),
        ("a.jsonl", [{"text": " "}], {}, "shown/a.jsonl: holds no text; remove the file"),
        ("a.txt", b"abc\nd\xe9f", {}, "shown/a.txt: is not UTF-8 at byte 5; convert it"),
        ("a.txt", b"abc\nd\xe9f", {"packed": False}, "shown/a.txt: line 2: is not UTF-8 at byte 5; convert it"),
        (
            "a.txt",
            "abc".encode("utf-16"),
            {},
            "shown/a.txt: is not UTF-8 at byte 0; convert it, for instance by iconv -f UTF-16",
        ),
        ("a.txt", "abc".encode("utf-16-le"), {}, "shown/a.txt: holds a zero at byte 1, so it is not text in UTF-8"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": \n',
            {},
            "shown/a.jsonl: line 2: is not JSON: JSONDecodeError: Expecting",
        ),
        ("a.jsonl", [["a"]], {}, "shown/a.jsonl: line 1: is not an object of columns; write {"),
        ("a.jsonl", [{"n": 1}], {}, "shown/a.jsonl: has no column messages or text, and none of its columns holds"),
        (
            "a.jsonl",
            [{"x": "a", "y": "b", "n": 1}],
            {},
            "shown/a.jsonl: has no column messages or text, and texts are in x, y; choose one by data.text.column",
        ),
        ("a.jsonl", [{"x": "a", "n": 1}], {"column": "z"}, "shown/a.jsonl: has no column 'z'; it has x, n"),
        (
            "a.jsonl",
            [{"text": "a"}, {"text": None}],
            {"packed": False},
            "shown/a.jsonl: line 2: the column 'text' is null, not a text; correct or remove it",
        ),
        ("a.jsonl", [{"text": "a"}, {}], {}, "shown/a.jsonl: line 2: the column 'text' is null, not a text"),
        ("a.jsonl", [{"text": "a\ud800"}], {}, "shown/a.jsonl: line 1: the column 'text' holds half of a surrogate"),
        (
            "a.jsonl",
            [{"messages": CHAT}, {"messages": [{"role": "x"}]}],
            {},
            "shown/a.jsonl: line 1: data.processor 'the/processor' has no chat template, which messages need; give",
        ),
        ("a.parquet", b"PAR1 and nothing else", {}, "shown/a.parquet: cannot be read, damaged or not of this type: "),
        ("a.txt", b"a", {"labels": True}, "shown/a.txt: has no column 'label'; it has text"),
        (
            "a.jsonl",
            [{"text": "a", "label": 0}, {"text": "a", "label": -1}],
            {"labels": True},
            "shown/a.jsonl: line 2: the column 'label' is -1; it must be a number from 0",
        ),
    ],
)
def test_files_that_cannot_be_used(texts: Texts, name: str, content: Any, fields: dict[str, Any], message: str) -> None:
    found = refused(texts, name, content, **fields)
    assert found.startswith(message), found


def test_a_chat_that_is_none_is_named(texts: Texts) -> None:
    template = "{{ raise_exception('users\nonly') if messages[0]['role'] != 'user' }}" + TEMPLATE
    processor = save_tokenizer(texts.folder / "other", {}, chat_template=template)
    rows = [{"messages": CHAT}, {"messages": [{"role": "user"}]}]
    message = refused(texts, "a.jsonl", rows, processor=processor)
    assert message.startswith("shown/a.jsonl: line 2: the column 'messages' is [{'role': 'user'}]; it must be a list")
    rows = [{"messages": CHAT}, {"messages": CHAT[::-1]}]
    message = refused(texts, "a.jsonl", rows, processor=processor)
    expected = "shown/a.jsonl: line 2: the chat template refuses the messages: TemplateError: users; correct them"
    assert message == expected


def test_a_class_that_the_model_has_not_is_named(texts: Texts) -> None:
    processor = save_tokenizer(texts.folder / "other", {"label2id": {"bad": 0, "good": 1}})
    for value, shown in (("fair", "'fair'"), (2, "2"), (None, "null"), (True, "True"), (1.0, "1.0")):
        rows = [{"text": "a", "label": value}]
        message = refused(texts, "a.jsonl", rows, processor=processor, labels=True)
        rule = "it must be a class of config.json, bad, good, or its number"
        assert message == f"shown/a.jsonl: line 1: the column 'label' is {shown}; {rule}"


def test_a_text_without_tokens_is_named(texts: Texts) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, []))
    folder = texts.folder / "bytes"
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    samples = texts.open("a.txt", "a\n\nzzz\n", folder)
    assert samples.read(0)["input_ids"].tolist() == [0]
    with pytest.raises(InputError) as error:
        samples.read(1)
    expected = "shown/a.txt: line 3: the tokenizer makes no token of its text; correct or remove it"
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("config", "fields", "message"),
    [
        ({}, {"packed": True, "labels": True}, "data.text.packed is true, but windows of joined texts have no class"),
        (
            {},
            {"target_column": "x"},
            "data.text.target_column is for encoder-decoders, which this model is not; remove",
        ),
        (
            {"max_position_embeddings": 8},
            {"sequence_length": 9},
            "data.text.sequence_length is 9; the model takes at most 8, lower it",
        ),
        ({"n_positions": 8}, {"sequence_length": 9}, "data.text.sequence_length is 9; the model takes at most 8"),
        (
            {},
            {"sequence_length": 2},
            "data.text.sequence_length is 2, but the tokenizer adds 2 tokens of its own to every text; raise it",
        ),
    ],
)
def test_fields_that_contradict_the_model(
    texts: Texts, config: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    processor = save_tokenizer(texts.folder / "other", config, marked=True)
    with pytest.raises(InputError) as error:
        texts.encoder(processor, **fields)
    assert str(error.value).startswith(message)


def test_t5_has_no_limit_of_positions(texts: Texts) -> None:
    processor = save_tokenizer(texts.folder / "other", {"is_encoder_decoder": True, "n_positions": 8})
    assert listed(texts.open("a.txt", "a " * 9, processor, sequence_length=9)) == [[4] * 9]
    assert listed(texts.open("a.txt", "a " * 9, processor)) == [[4] * 8]


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ({}, "data.text: {} has no files of a tokenizer; name a directory with tokenizer.json"),
        # transformers makes tokenizers of five words for these.
        (
            {"config.json": '{"model_type": "bert"}'},
            "data.text: {} has no files of a tokenizer; name a directory with tokenizer.json",
        ),
        (
            {"config.json": '{"model_type": "gpt2"}'},
            "data.text: {} has no files of a tokenizer; name a directory with tokenizer.json",
        ),
        ({"tokenizer.json": "{"}, "data.text: AutoTokenizer cannot be loaded from {}: JSONDecodeError: "),
        ({"tokenizer.json": "{}"}, "data.text: AutoTokenizer cannot be loaded from {}: "),
        ({"config.json": "{"}, "{}: config.json cannot be read: JSONDecodeError: "),
        ({"config.json": "[]"}, "{}: config.json holds no object; get it again"),
        (
            {"config.json": '{"is_encoder_decoder": true}', "special": ""},
            "{}: config.json has no decoder_start_token_id, and its tokenizer no pad_token; add one",
        ),
    ],
)
def test_directories_without_a_whole_tokenizer(texts: Texts, contents: dict[str, str], message: str) -> None:
    folder = texts.folder / "other"
    folder.mkdir()
    if "special" in contents:
        save_tokenizer(folder, pad_token=None)
    for name, content in contents.items():
        (folder / name).write_text(content)
    with pytest.raises(InputError) as error:
        texts.encoder(folder)
    found = str(error.value)
    assert found.startswith(message.format("data.processor 'the/processor'")), found
    assert "\n" not in found


def test_code_in_the_directory_is_not_run(texts: Texts) -> None:
    named = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (texts.causal / "tokenizer_config.json").write_text(json.dumps(named))
    (texts.causal / "mine.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()")
    with pytest.raises(
        InputError, match=r"AutoTokenizer cannot be loaded from .*: ValueError: The repository .* by data\.processor$"
    ):
        texts.encoder()
    assert not (texts.causal / "ran").exists()


def test_a_tokenizer_of_another_model_is_refused(texts: Texts) -> None:
    processor = save_tokenizer(texts.folder / "other", CAUSAL | {"vocab_size": 6})
    assert listed(texts.open("a.txt", "a b", processor, sequence_length=2)) == [[4, 5]]
    message = refused(texts, "b.txt", "a b c", processor=processor, sequence_length=2)
    expected = "shown/b.txt: data.processor 'the/processor': the tokenizer makes the token 6, config.json says"
    assert message.startswith(f"{expected} vocab_size 6; ")


def test_texts_need_a_processor(local: LocalFiles) -> None:
    spec = DataSpec.model_validate({"uri": "x", "text": {}})
    with pytest.raises(
        InputError,
        match=r"^data\.text needs a directory .* no model\.hf; name a directory with tokenizer\.json",
    ):
        TextEncoder(EncoderContext(spec, local))


def test_tokenizers_of_bytes_need_no_files(texts: Texts) -> None:
    folder = texts.folder / "other"
    folder.mkdir()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    (folder / "config.json").write_text('{"model_type": "t5"}')
    # A byte is itself plus the three special tokens, of which 1 ends a text.
    assert listed(texts.open("a.txt", "ab", folder)) == [[97 + 3, 98 + 3, 1]]
