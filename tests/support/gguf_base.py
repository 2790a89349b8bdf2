"""Float GGUF files of models of transformers, as llama.cpp's converter makes them: what `output.base_gguf` names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from architectures import ARCHITECTURES

_TYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
}
# Architectures whose rows of queries and keys the converter puts in another order.
_PERMUTED = ("llama",)


def small_model(name: str, **fields: Any) -> Any:
    """A model of one block whose matrices all have multiples of 32 inputs."""
    architecture = ARCHITECTURES[name]
    sizes = {"intermediate_size": 64, "num_hidden_layers": 1}
    if "moe_intermediate_size" in architecture.fields:
        sizes["moe_intermediate_size"] = 32
    return replace(architecture, fields={**architecture.fields, **sizes, **fields}).build()


def write_base(
    model: Any,
    path: Path,
    outtype: str = "f32",
    metadata: Mapping[str, Any] | None = None,
    alignment: int = 32,
    quantized: str | None = None,
) -> Path:
    """Write a model of transformers (llama, mixtral, qwen3, qwen3_moe). outtype: of matrices; all else is F32.
    metadata: more of it, as arguments of `add_key_value`. quantized: a tensor that is Q8_0, as no base is."""
    config = model.config
    architecture = {"qwen3_moe": "qwen3moe", "mixtral": "llama"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, architecture)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_vocab_size(config.vocab_size)
    if architecture == "qwen3moe" or config.model_type == "mixtral":
        writer.add_expert_count(getattr(config, "num_experts", None) or config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "a", "é"])
    writer.add_token_types([1, 1, 3])
    writer.add_token_scores([0.0, -1.5, 2.5])
    writer.add_add_bos_token(True)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for key, value in (metadata or {}).items():
        writer.add_key_value(key, *value)
    writer.data_alignment = alignment
    for source, name, tensor in _tensors(model, architecture, heads, kv_heads):
        kind = _TYPES[outtype] if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        kind = gguf.GGMLQuantizationType.Q8_0 if source == quantized else kind
        data = gguf.quants.quantize(tensor.float().numpy(), kind)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _tensors(model: Any, architecture: str, heads: int, kv_heads: int) -> list[tuple[str, str, torch.Tensor]]:
    keys = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(keys[architecture], model.config.num_hidden_layers)
    found = []
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.endswith("experts.gate_up_proj"):
            for half, part in zip(("gate_proj", "up_proj"), tensor.chunk(2, dim=1), strict=True):
                place = names.get_name(name.replace("gate_up_proj", half))
                found.append((name, f"{place}.weight", part))
            continue
        place = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert place is not None, name
        place = place if place.endswith((".weight", ".bias")) else f"{place}.weight"
        if architecture in _PERMUTED and (".q_proj." in name or ".k_proj." in name):
            count = heads if ".q_proj." in name else kv_heads
            tensor = permuted(tensor, count)
        found.append((name, place, tensor))
    return found


def permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows `(h, 2, d/2)` as `(h, d/2, 2)`."""
    split = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return split.swapaxes(1, 2).reshape(tensor.shape)


def arrays(path: Path) -> dict[str, tuple[str, np.ndarray[Any, Any]]]:
    """Type and values of all tensors of a file."""
    reader = gguf.GGUFReader(path)
    return {
        tensor.name: (tensor.tensor_type.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        for tensor in reader.tensors
    }
