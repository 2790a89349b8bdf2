"""Small model directories as `save_pretrained` writes them, and data for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

_COMMON = "the of and to in is that for it as was with be by on not he his but at are"
WORDS = ["<pad>", "<unk>", "<eos>", *_COMMON.split()]
LLAMA: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
}


def llama(folder: Path, *, shard_size: str = "50GB", **changes: Any) -> Path:
    """A causal language model with a tokenizer of words; its head is not tied."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA | changes))
    model.save_pretrained(folder, max_shard_size=shard_size)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    return folder


def text(path: Path, num_words: int, seed: int = 0) -> Path:
    """Words of the tokenizer, drawn at random, ten in a line."""
    drawn = torch.randint(3, len(WORDS), (num_words,), generator=torch.Generator().manual_seed(seed)).tolist()
    lines = (" ".join(WORDS[word] for word in drawn[start : start + 10]) for start in range(0, num_words, 10))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
