"""The tokenizer of a model, from its local directory, and what config.json says that decides how texts are cut."""

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

from distributed_adaround.data.encoder import EncoderContext
from distributed_adaround.data.pretrained import (
    CONFIG,
    GENERATION_CONFIG,
    decoder_settings,
    directory_of,
    load_pretrained,
    processor_directory,
    read_config,
    token_id,
)
from distributed_adaround.errors import InputError, first_line

# What decides about token ids.
_VOCABULARY = ("tokenizer.json", "tokenizer.model", "vocab*", "merges.txt", "*.model", "*.tiktoken")
_FILES = (*_VOCABULARY, "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_REMEDY = "name a directory with tokenizer.json, as save_pretrained writes it, by data.processor"
_USUAL_LENGTH = 512
# Some chat templates write the date. With one that stands still, all ranks and all days get the same tokens.
_CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}{{ '' }}"


class TextTokenizer:
    """Safe to use from several threads.

    config: config.json, empty where there is none. digest: SHA-256, as hex, of all files that decide about tokens.
    """

    def __init__(self, context: EncoderContext) -> None:
        """Raises InputError when the directory has no tokenizer, or a damaged one."""
        self.shown = directory_of(context)
        directory = processor_directory(context, "data.text", _REMEDY)
        self.config = read_config(context)
        self._decoder = decoder_settings(context, self.config)
        # Its truncation and padding are a state that every call sets.
        self._lock = Lock()
        none = InputError(f"data.text: {self.shown} has no files of a tokenizer; {_REMEDY}")
        if not _matching(directory, _FILES):
            raise none
        self._tokenizer = load_pretrained(context, "AutoTokenizer", "data.text", _REMEDY)
        # Without its files transformers makes a tokenizer without words. Those of bytes have none, and are not fast.
        if self._tokenizer.is_fast and not _matching(directory, _VOCABULARY):
            raise none
        beside = map(context.beside, (CONFIG, GENERATION_CONFIG))
        self.digest = _digest([*_matching(directory, _FILES), *filter(None, beside)])

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
    def num_special(self) -> int:
        """Special tokens around a text."""
        return int(self._tokenizer.num_special_tokens_to_add())

    @property
    def eos(self) -> int | None:
        """Token that ends a text."""
        return token_id(self._tokenizer.eos_token_id)

    @property
    def pad(self) -> int:
        """Token that fills up shorter texts: one that the model knows, where it does not look."""
        named = (token_id(self._tokenizer.pad_token_id), self.eos)
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
        return min([_USUAL_LENGTH, *(size for size in takes if isinstance(size, int) and size > 0)])

    @property
    def decoder_start(self) -> int:
        """First token that a decoder gets. Raises InputError when neither the model nor the tokenizer has one."""
        name, tokenizer = "decoder_start_token_id", self._tokenizer
        named = (self._decoder.get(name), tokenizer.pad_token_id, tokenizer.bos_token_id)
        found = next((token for token in map(token_id, named) if token is not None), None)
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


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _matching(directory: Path, patterns: Sequence[str]) -> list[Path]:
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})
