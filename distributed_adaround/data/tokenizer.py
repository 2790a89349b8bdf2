"""The tokenizer of a model, from its local directory, and what config.json says that decides how texts are cut."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from distributed_adaround.errors import InputError, first_line
from distributed_adaround.runtime.transformers_library import offline_transformers

# What decides about token ids.
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab*", "merges.txt", "*.model", "*.tiktoken")
_FILES = (
    *_VOCABULARY, "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*", "config.json",
    "generation_config.json",
)  # fmt: skip
_USUAL_LENGTH = 512
# Some chat templates write the date. With one that stands still, all ranks and all days get the same tokens.
_CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"


class TextTokenizer:
    """Safe to use from several threads.

    config: config.json, empty where there is none. digest: SHA-256 of all files that decide about tokens.

    Args:
        directory: as save_pretrained writes it; nothing else is looked up, and no code in it is run.
        shown: its name in messages.

    Raises: InputError when it has no tokenizer, or a damaged one.
    """

    def __init__(self, directory: Path, shown: str) -> None:
        self.shown = shown
        self.config = _read_object(directory / "config.json", shown)
        self._generation = _read_object(directory / "generation_config.json", shown)
        self.digest = _digest(directory)
        # Its truncation and padding are a state that every call sets.
        self._lock = Lock()
        self._tokenizer = _load(directory, shown)

    @property
    def is_causal(self) -> bool:
        """Whether the model continues texts."""
        names = self.config.get("architectures") or ()
        ends = ("ForCausalLM", "LMHeadModel")
        return not self.is_encoder_decoder and any(str(name).endswith(ends) for name in names)

    @property
    def is_encoder_decoder(self) -> bool:
        return bool(self.config.get("is_encoder_decoder"))

    @property
    def classes(self) -> dict[str, int]:
        """Classes of a model that sorts texts, by their names; empty: config.json names none."""
        found = self.config.get("label2id")
        return found if isinstance(found, dict) else {}

    @property
    def num_special(self) -> int:
        """Special tokens around a text."""
        return int(self._tokenizer.num_special_tokens_to_add())

    @property
    def eos(self) -> int | None:
        """Token that ends a text."""
        return _id(self._tokenizer.eos_token_id)

    @property
    def pad(self) -> int:
        """Token that fills up shorter texts: one that the model knows, where it does not look."""
        named = (_id(self._tokenizer.pad_token_id), self.eos)
        return next((token for token in named if token is not None and self._knows(token)), 0)

    @property
    def most_tokens(self) -> int | None:
        """Tokens for which the model has positions; None: config.json names no limit."""
        # T5 has the field n_positions, and no positions.
        names = ("max_position_embeddings", *(() if self.is_encoder_decoder else ("n_positions",)))
        return next((size for size in map(self.config.get, names) if isinstance(size, int) and size > 0), None)

    @property
    def usual_length(self) -> int:
        """Tokens of a text where the job says nothing."""
        takes = (self._tokenizer.model_max_length, *map(self.config.get, ("max_position_embeddings", "n_positions")))
        return min(_USUAL_LENGTH, *(size for size in takes if isinstance(size, int) and size > 0))

    @property
    def decoder_start(self) -> int:
        """First token that a decoder gets. Raises InputError when neither the model nor the tokenizer has one."""
        name, tokenizer = "decoder_start_token_id", self._tokenizer
        named = (self.config.get(name), self._generation.get(name), tokenizer.pad_token_id, tokenizer.bos_token_id)
        found = next((token for token in map(_id, named) if token is not None), None)
        if found is None:
            raise InputError(f"{self.shown}: config.json has no {name}, and its tokenizer no pad_token; add one")
        return found

    def ids(
        self, texts: Sequence[str], *, special: bool = True, target: bool = False, length: int | None = None
    ) -> list[list[int]]:
        """Token ids of each text.

        special: with the special tokens around it. target: as texts that a decoder writes. length: most tokens; None:
        all. Raises InputError for ids that the model does not know.
        """
        with self._lock:
            encoded = self._tokenizer(
                **{"text_target" if target else "text": list(texts)},
                add_special_tokens=special,
                truncation=length is not None,
                max_length=length,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,  # which would be about texts longer than the model takes
            )
        found: list[list[int]] = encoded["input_ids"]
        highest = max((max(ids) for ids in found if ids), default=0)
        if not self._knows(highest):
            what = f"the tokenizer makes the token {highest}, config.json says vocab_size {self.config['vocab_size']}"
            raise InputError(f"{self.shown}: {what}; they are not of one model, get both again")
        return found

    def chat_text(self, chat: list[dict[str, Any]]) -> str:
        """A chat as one text, with all special tokens. Raises InputError when the template refuses it."""
        try:
            text: str = self._tokenizer.apply_chat_template(chat, chat_template=self._template, tokenize=False)
        except InputError:
            raise
        except Exception as error:
            raise InputError(f"the chat template refuses the messages: {first_line(error)}; correct them") from error
        return text

    def _knows(self, token: int) -> bool:
        size = self.config.get("vocab_size")
        return not isinstance(size, int) or token < size

    @cached_property
    def _template(self) -> str:
        if not self._tokenizer.chat_template:
            remedy = "give another directory by data.processor, or a column of texts by data.text.column"
            raise InputError(f"{self.shown} has no chat template, which messages need; {remedy}")
        template: str = self._tokenizer.get_chat_template()
        return _CLOCK + template if "strftime_now" in template else template


def _load(directory: Path, shown: str) -> Any:
    with offline_transformers(shown) as transformers:
        try:
            found = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:
            remedy = "give a directory with tokenizer.json, as save_pretrained writes it"
            raise InputError(f"{shown} has no tokenizer that can be loaded: {first_line(error)}; {remedy}") from error
    # Without its files transformers makes a tokenizer that knows no words. Those of bytes need none, and are not fast.
    if found.is_fast and not _matching(directory, _VOCABULARY):
        raise InputError(f"{shown} has no files of a tokenizer; give a directory with tokenizer.json by data.processor")
    return found


def _digest(directory: Path) -> str:
    digest = hashlib.sha256()
    for path in _matching(directory, _FILES):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _matching(directory: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def _read_object(path: Path, shown: str) -> dict[str, Any]:
    """A file of JSON; empty where there is none."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise InputError(f"{shown}: {path.name} cannot be read: {first_line(error)}; get it again") from None
    if not isinstance(found, dict):
        raise InputError(f"{shown}: {path.name} holds no object; get it again")
    return found


def _id(value: object) -> int | None:
    return value if isinstance(value, int) and value >= 0 else None
