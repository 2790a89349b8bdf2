"""Tiny random models of transformers, one for each architecture, and what of each stays in float, written out as data.

`left` holds patterns of names (`re.fullmatch`) with the reason that must be given. Biases, norms and other vectors need
no entry: what counts are tensors of two and more dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY, TOKENS, IMAGE = 96, 6, 32
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32}
_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_PICTURES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
             "image_size": IMAGE, "patch_size": 8}  # fmt: skip
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Architecture:
    """model: class of transformers. config: its configuration class and fields. inputs: what a batch holds. left: what
    stays in float, by pattern."""

    model: str
    config: str
    fields: Mapping[str, Any]
    inputs: Callable[[], dict[str, torch.Tensor]]
    left: Mapping[str, str] = field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.fields)
        model: nn.Module = getattr(transformers, self.model)(config)
        return model.eval()


def _tokens(*names: str) -> Callable[[], dict[str, torch.Tensor]]:
    return lambda: {name: torch.randint(3, VOCABULARY, (3, TOKENS)) for name in names}


def _pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, IMAGE, IMAGE)}


_ids = _tokens("input_ids")
_EMBEDDING = {r".*embed_tokens\.weight": "embedding"}
_HEAD = {r"(lm_head|embed_out)\.weight": "head of a language model"}

ARCHITECTURES: dict[str, Architecture] = {
    "Llama": Architecture("LlamaForCausalLM", "LlamaConfig", {**_LLAMA, **_IDS}, _ids, {**_EMBEDDING, **_HEAD}),
    "Qwen3": Architecture(
        "Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, **_IDS, "head_dim": 8}, _ids, {**_EMBEDDING, **_HEAD}
    ),
    "Gemma 3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {**_LLAMA, **_IDS, "head_dim": 8, "sliding_window": 4},
        _ids,
        _EMBEDDING,
    ),
    "Phi-3": Architecture("Phi3ForCausalLM", "Phi3Config", {**_LLAMA, **_IDS}, _ids, {**_EMBEDDING, **_HEAD}),
    "GPT-2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, **_IDS},
        _ids,
        {r".*wte\.weight": "embedding", r".*wpe\.weight": "embedding"},
    ),
    "OPT": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {**_TEXT, **_IDS, "ffn_dim": 48, "max_position_embeddings": 32, "word_embed_proj_dim": 32},
        _ids,
        {r".*embed_tokens\.weight": "embedding", r".*embed_positions\.weight": "embedding"},
    ),
    "GPT-NeoX": Architecture(
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {**_TEXT, **_IDS, "intermediate_size": 48, "max_position_embeddings": 32},
        _ids,
        {r".*embed_in\.weight": "embedding", **_HEAD},
    ),
    "Mixtral": Architecture(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_LLAMA, **_IDS, "num_hidden_layers": 1, "num_local_experts": 3, "num_experts_per_tok": 2},
        _ids,
        {**_EMBEDDING, **_HEAD, r".*\.gate\.weight": "router"},
    ),
    "Qwen3-MoE": Architecture(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**_LLAMA, **_IDS, "num_hidden_layers": 1, **_EXPERTS, "num_experts": 3, "head_dim": 8},
        _ids,
        {**_EMBEDDING, **_HEAD, r".*\.gate\.weight": "router"},
    ),
    "gpt-oss": Architecture(
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_LLAMA,
            **_IDS,
            "num_hidden_layers": 1,
            "num_local_experts": 3,
            "num_experts_per_tok": 2,
            "head_dim": 8,
            "sliding_window": 4,
        },
        _ids,
        {**_EMBEDDING, **_HEAD, r".*\.router\.weight": "router", r".*\.experts\..*_proj_bias": "used by index"},
    ),
    "DeepSeek-V3": Architecture(
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_LLAMA,
            **_IDS,
            **_EXPERTS,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        _ids,
        {**_EMBEDDING, **_HEAD, r".*\.gate\.weight": "router"},
    ),
    "Mamba2": Architecture(
        "Mamba2ForCausalLM",
        "Mamba2Config",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_heads": 4,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            **_IDS,
        },
        _ids,
        {r".*embeddings\.weight": "embedding", **_HEAD},
    ),
    "BERT": Architecture(
        "BertModel",
        "BertConfig",
        {**_TEXT, "intermediate_size": 48, "max_position_embeddings": 32},
        _ids,
        {r"embeddings\..*": "embedding"},
    ),
    "ModernBERT": Architecture(
        "ModernBertModel",
        "ModernBertConfig",
        {**_TEXT, **_IDS, "intermediate_size": 48, "max_position_embeddings": 32, "local_attention": 8},
        _ids,
        {r".*tok_embeddings\.weight": "embedding"},
    ),
    "T5": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        _tokens("input_ids", "decoder_input_ids"),
        {r"shared\.weight": "embedding", r".*relative_attention_bias\.weight": "embedding"},
    ),
    "Whisper": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            **_IDS,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 16,
            "decoder_start_token_id": 1,
        },
        lambda: {"input_features": torch.randn(3, 8, 32), **_tokens("decoder_input_ids")()},
        {
            r".*embed_tokens\.weight": "embedding",
            r".*encoder\.embed_positions\.weight": "embedding",
            r".*decoder\.embed_positions\.weight": "used by index",
        },
    ),
    "ViT": Architecture(
        "ViTForImageClassification",
        "ViTConfig",
        {**_PICTURES, "num_labels": 5},
        _pixels,
        {r".*position_embeddings": "used by add", r".*cls_token": "used by expand"},
    ),
    "CLIP": Architecture(
        "CLIPModel",
        "CLIPConfig",
        {"text_config": {**_LLAMA, **_IDS}, "vision_config": _PICTURES, "projection_dim": 16},
        lambda: {**_ids(), **_pixels()},
        {r".*(token|position)_embedding\.weight": "embedding"},
    ),
    "SigLIP": Architecture(
        "SiglipModel",
        "SiglipConfig",
        {"text_config": {**_LLAMA, **_IDS}, "vision_config": _PICTURES},
        lambda: {**_ids(), **_pixels()},
        {r".*(token|position)_embedding\.weight": "embedding", r".*head\.probe": "used by repeat"},
    ),
    "Wav2Vec2": Architecture(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {
            **_TEXT,
            "intermediate_size": 48,
            "conv_dim": [16, 16],
            "conv_stride": [4, 2],
            "conv_kernel": [8, 3],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        lambda: {"input_values": torch.randn(3, 160)},
    ),
    "ResNet": Architecture(
        "ResNetForImageClassification",
        "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5},
        _pixels,
    ),
    "ConvNeXt": Architecture(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 5, "patch_size": 4},
        _pixels,
    ),
    "SegFormer": Architecture(
        "SegformerForSemanticSegmentation",
        "SegformerConfig",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "hidden_sizes": [8, 16],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16,
            "num_labels": 5,
        },
        _pixels,
    ),
}
