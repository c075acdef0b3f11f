"""What GGUF files say of the families that llama.cpp runs: architecture, sizes, positions, tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cook.base.errors import UserError
from cook.pruning.family import ModelConfig

PROGRAM = "llama.cpp"
FILE_TYPES = {8: 7, 4: 2}
"""llama.cpp's number of a file whose matrices are mostly Q8_0, and of one with Q4_0, by the bits of a weight."""
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's architecture by `model_type`."""
INTERLEAVED = ("llama", "mistral")
"""The model types whose queries and keys llama.cpp expects with the two halves of each head interleaved."""
SENTENCEPIECE, BYTE_LEVEL, NONE = "llama", "gpt2", "no_vocab"
"""Kinds of tokenizers."""
SPLITS = ((r"\p{N}{1,3}", "llama-bpe"), (r"\p{N}|", "qwen2"), ("individual_digits", "smollm"), ("ByteLevel", "gpt-2"))
"""How a byte-level tokenizer splits text: a part of its pre-tokenizer in tokenizer.json, and llama.cpp's name of it;
the first part that occurs counts."""


def gguf_architecture(config: ModelConfig) -> str:
    """llama.cpp's architecture of a model.

    Raises:
        UserError: GGUF files cannot hold the model.
    """
    model_type = config.get("model_type")
    if model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    raise UserError(
        f"--format gguf: not available for models of type {model_type!r}",
        wanted=f"one of {', '.join(ARCHITECTURES)}, with blocks of equal sizes",
        remedy="--format transformers; or reshape with --uniform if blocks have different sizes",
    )


def split_name(pre_tokenizer: Mapping[str, Any] | None) -> str | None:
    """llama.cpp's name of how a byte-level tokenizer splits text; None if it is not byte-level or not known."""
    written = str(pre_tokenizer)
    if "ByteLevel" not in written:
        return None
    return next((name for part, name in SPLITS if part in written), None)


def row_order(name: str, config: ModelConfig) -> np.ndarray | None:
    """The rows of a query or key projection in llama.cpp's order; None for the same order.

    transformers rotates feature i of a head with feature i + size / 2, llama.cpp with its neighbour.
    """
    heads = {"q_proj": config.get("num_attention_heads"), "k_proj": config.get("num_key_value_heads")}
    count = next((number for part, number in heads.items() if f".{part}." in name), None)
    if count is None or config["model_type"] not in INTERLEAVED:
        return None
    size = _head_size(config)
    return np.arange(count * size).reshape(count, 2, size // 2).swapaxes(1, 2).reshape(-1)


def _head_size(config: ModelConfig) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_settings(writer: Any, config: ModelConfig) -> list[str]:
    """Adds the sizes and positions of a model to gguf's writer; returns sentences on what the file cannot say."""
    size, notes = _head_size(config), []
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(size)
    writer.add_rope_freq_base(_rope(config)["rope_theta"])
    window = config.get("sliding_window")
    slides = window and (config.get("use_sliding_window", True) or "sliding_attention" in config.get("layer_types", ()))
    if slides and window < config["max_position_embeddings"]:
        notes.append(f"{PROGRAM} lets every token see all others before it, not the last {window} alone")
    return notes


def _rope(config: ModelConfig) -> dict[str, Any]:
    rope = {
        "rope_type": "default",
        "rope_theta": config.get("rope_theta", 1e4),
        **(config.get("rope_parameters") or {}),
    }
    if rope["rope_type"] not in ("default", "llama3"):
        kind = rope["rope_type"]
        raise UserError(f"--format gguf: positions of type {kind!r} are not written", wanted="default or llama3")
    return rope


def frequency_factors(config: ModelConfig) -> np.ndarray | None:
    """By what the frequencies of the positions are divided; None for the plain ones."""
    if _rope(config)["rope_type"] == "default":
        return None
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    whole = AutoConfig.for_model(**config)
    frequencies, _ = ROPE_INIT_FUNCTIONS[_rope(config)["rope_type"]](whole, torch.device("cpu"))
    size = _head_size(config)
    plain = _rope(config)["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    factors: np.ndarray = (plain / frequencies.double()).float().numpy()
    return factors
