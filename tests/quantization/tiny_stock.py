"""Tiny stock models, saved by transformers, of sizes that all formats hold."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    XLMRobertaConfig,
    XLMRobertaForMaskedLM,
)

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "gemma": (GemmaConfig, GemmaForCausalLM),  # its embedding multiplies by a factor
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaForMaskedLM),  # its output projection is the first to have the weight
}
IDS = torch.randint(96, (2, 12), generator=torch.Generator().manual_seed(1))


def save_stock(folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **changes) -> Path:
    config, model = CLASSES[name]
    torch.manual_seed(0)
    # Large weights: a wrong scale or order of rows changes the logits by far more than rounding does.
    made = model(config(**(SIZES | {"initializer_range": 0.2} | changes))).to(dtype)
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if key.endswith(".bias"):
                parameter.normal_(std=0.2)  # transformers begins with 0
    made.save_pretrained(folder)
    return folder
