"""A tiny model of every stock family, with the traits that its real models have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from cook.families.registry import by_config
from cook.pruning.family import ModelSource

SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "max_position_embeddings": 64}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 6, "intermediate_size": 20}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 5}
# The norm after a block of a single dim divides rounding by almost nothing, unless it adds something to it: with
# 0.01, random masks were found whose logits differ by 1.2e-5 from rounding alone.
GEMMA = {"query_pre_attn_scalar": 16, "rms_norm_eps": 0.1, **SLIDING}
# Every query head has keys and values of its own, and the hidden size divided by the heads for its size.
ALIKE = {"num_attention_heads": 4, "num_key_value_heads": None, "head_dim": None}
GPT2 = {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_inner": 20,
    "n_positions": 64,
    **dict.fromkeys((*SIZES, *GROUPED)),
    "vocab_size": 61,
}
# GELU: a dim whose ReLU is zero on all the few tokens would have no gradient.
OPT = {"ffn_dim": 20, "activation_function": "gelu", **ALIKE, "intermediate_size": None}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2, **SLIDING},
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "gemma2": {"model_type": "gemma2", "attention_bias": True, **GEMMA},
    "gemma3": {"model_type": "gemma3_text", **GEMMA},
    "phi3": {
        "model_type": "phi3",
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "gpt2": {"model_type": "gpt2", **GPT2},
    "gpt2, scores by layer": {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True, **GPT2},
    "gpt_neox": {"model_type": "gpt_neox", **ALIKE},
    "gpt_neox, in a row": {"model_type": "gpt_neox", "use_parallel_residual": False, "attention_bias": False, **ALIKE},
    "opt": {"model_type": "opt", **OPT},
    "opt, norms behind": {"model_type": "opt", "do_layer_norm_before": False, "word_embed_proj_dim": 16, **OPT},
    "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"], **ALIKE},
    "roberta": {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"], **ALIKE, "pad_token_id": 1},
}
"""config.json by a name; a test runs over all of them."""
MIXED = {"num_hidden_layers": 3, "head_dim": 6, "num_experts_per_tok": 2, "intermediate_size": 16}
MOE: dict[str, dict[str, Any]] = {
    "mixtral": {"model_type": "mixtral", "num_local_experts": 5, **MIXED},
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "num_experts": 5,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 12,
        "mlp_only_layers": [0],
        **MIXED,
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "num_experts": 5,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "decoder_sparse_step": 2,
        **MIXED,
    },
    "olmoe": {"model_type": "olmoe", "num_experts": 5, **MIXED, "head_dim": None},
    "olmoe, clipped": {"model_type": "olmoe", "num_experts": 5, **MIXED, "head_dim": None, "clip_qkv": 1.0},
    "granitemoe": {
        "model_type": "granitemoe",
        "num_local_experts": 5,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 2.0,
        **MIXED,
    },
    "gpt_oss": {"model_type": "gpt_oss", "num_local_experts": 5, "sliding_window": 5, **MIXED},
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        "n_routed_experts": 8,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "q_lora_rank": 10,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 6,
        "v_head_dim": 6,
        **MIXED,
        "num_key_value_heads": 8,
        "head_dim": None,
    },
}
"""The same of every family with experts."""
MOE["deepseek_v3, one group"] = MOE["deepseek_v3"] | {"n_group": 1, "q_lora_rank": None, "v_head_dim": 5}
BY_HEAD = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": None}
FALCON = {"model_type": "falcon", "ffn_hidden_size": 20, "intermediate_size": None}
MORE: dict[str, dict[str, Any]] = {
    "granite": {
        "model_type": "granite",
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
        "mlp_bias": True,
    },
    "gemma": {"model_type": "gemma", "rms_norm_eps": 0.1},
    "ernie4_5": {"model_type": "ernie4_5", "use_bias": True},
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense"},
    "seed_oss": {"model_type": "seed_oss", "attention_out_bias": True},
    "ministral": {"model_type": "ministral", **SLIDING},
    "ministral3": {"model_type": "ministral3"},
    "smollm3": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 0, 1],
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "sliding_window": 5,
    },
    "olmo": {"model_type": "olmo"},
    "olmo, clipped": {"model_type": "olmo", "clip_qkv": 2.0},
    "nemotron": {"model_type": "nemotron", "hidden_act": "gelu", "partial_rotary_factor": 0.5, "head_dim": 8},
    "arcee": {"model_type": "arcee", "hidden_act": "gelu", "mlp_bias": True},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": 5},
    "glm": {"model_type": "glm", "head_dim": 8},
    "glm4": {"model_type": "glm4", "head_dim": 8, "rms_norm_eps": 0.1},
    "exaone4": {"model_type": "exaone4", "rms_norm_eps": 0.1, **SLIDING},
    "olmo2": {"model_type": "olmo2", "rms_norm_eps": 0.1, "attention_bias": True},
    "olmo3": {"model_type": "olmo3", "rms_norm_eps": 0.1, **SLIDING},
    "cohere": {"model_type": "cohere", "use_qk_norm": True},
    "cohere2": {"model_type": "cohere2", **SLIDING, **BY_HEAD},
    "phi": {"model_type": "phi", "head_dim": 8},
    "phi, norms of heads": {"model_type": "phi", "qk_layernorm": True, "partial_rotary_factor": 0.5, **BY_HEAD},
    "gptj": {"model_type": "gptj", "rotary_dim": 4, **GPT2},
    "stablelm": {"model_type": "stablelm", "partial_rotary_factor": 0.5, **BY_HEAD},
    "stablelm, in parallel": {
        "model_type": "stablelm",
        "partial_rotary_factor": 0.5,
        "use_parallel_residual": True,
        "qk_layernorm": True,
        **BY_HEAD,
    },
    "falcon": {**FALCON, **BY_HEAD, "new_decoder_architecture": True, "num_kv_heads": 4},
    "falcon, one key": {**FALCON, **BY_HEAD, "bias": True},
    "falcon, alibi": {
        **FALCON,
        **BY_HEAD,
        "bias": True,
        "multi_query": False,
        "parallel_attn": False,
        "alibi": True,
    },
    "bloom": {
        "model_type": "bloom",
        "n_layer": 3,
        "n_head": 6,
        "hidden_size": 36,
        **dict.fromkeys(("num_hidden_layers", *GROUPED)),
    },
    "mpt": {
        "model_type": "mpt",
        "n_layers": 3,
        "n_heads": 6,
        "d_model": 36,
        "max_seq_len": 64,
        **dict.fromkeys((*SIZES, *GROUPED)),
        "vocab_size": 61,
    },
}
"""Families with fewer tests."""
MORE["mpt, clipped"] = MORE["mpt"] | {"attn_config": {"clip_qkv": 1.0}}
ENCODER = {**ALIKE, "head_dim": None}
MORE_ENCODERS: dict[str, dict[str, Any]] = {
    "xlm-roberta": {"model_type": "xlm-roberta", **ENCODER, "pad_token_id": 1},
    "electra": {"model_type": "electra", "embedding_size": 24, **ENCODER},
    "deberta-v2": {
        "model_type": "deberta-v2",
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "share_att_key": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        **ENCODER,
    },
    "deberta-v2, own positions": {
        "model_type": "deberta-v2",
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        **ENCODER,
    },
    "deberta-v2, no positions": {"model_type": "deberta-v2", **ENCODER},
    "distilbert": {
        "model_type": "distilbert",
        "n_layers": 3,
        "n_heads": 4,
        "dim": 32,
        "hidden_dim": 20,
        **dict.fromkeys((*SIZES, *GROUPED)),
        "max_position_embeddings": 64,
        "vocab_size": 61,
    },
    "modernbert": {
        "model_type": "modernbert",
        "local_attention": 6,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        **ENCODER,
    },
}
CAUSAL = [name for name in FAMILIES if name not in ("bert", "roberta")]


def given_config(name: str, **changes: Any) -> dict[str, Any]:
    """The fields of the family's config.json that are given."""
    merged = {**SIZES, **GROUPED, **IDS, **(FAMILIES | MOE | MORE | MORE_ENCODERS)[name], **changes}
    # None is a choice in a single one of these fields.
    return {field: value for field, value in merged.items() if value is not None or field == "q_lora_rank"}


def tiny_config(name: str, **changes: Any) -> dict[str, Any]:
    """The family's config, all fields given, as an adapter's `read` leaves it."""
    given = given_config(name, **changes)
    native, _ = by_config(given).read(given, {})
    return native


def draw_weights(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Draws every weight, those of biases and norms too, and the buffers that are stored."""
    generator = torch.Generator().manual_seed(seed)
    for path, weight in model.named_parameters():
        flat = 0.3 * torch.randn(weight.shape, generator=generator)
        weight.data = flat + (1.0 if weight.ndim == 1 and path.endswith(".weight") else 0.0)
    stored = model.state_dict()
    for name, buffer in model.named_buffers():  # the biases by which groups of experts are chosen
        if name in stored:
            buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator))
    return model


def tiny_source(name: str, seed: int = 0, **changes: Any) -> ModelSource:
    """A model in memory whose every weight matters: biases and norms are drawn as well."""
    config = tiny_config(name, **changes)
    adapter = by_config(config)
    model = draw_weights(adapter.build(config), seed)
    names = model.state_dict().keys()
    tensors = {n: w for n, w in (*model.named_parameters(), *model.named_buffers()) if n in names}
    return ModelSource(adapter=adapter, config=config, tensors=tensors, path=Path(name))
