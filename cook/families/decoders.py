"""The decoder families of transformers: one table per family, where its layers differ from Llama's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from cook.families.layout import Attention, ConfigNames, Family, FeedForward
from cook.families.stock import masked_inputs, stock_adapter
from cook.pruning.family import ModelConfig

# Llama's layers; Qwen's have biases on queries, keys and values, or norms of queries and keys.
LLAMA = Family(family="Llama, SmolLM2", model_types=frozenset({"llama"}))
MISTRAL = Family(family="Mistral", model_types=frozenset({"mistral"}))
QWEN2 = Family(family="Qwen2", model_types=frozenset({"qwen2"}), names=ConfigNames(first_layers=("max_window_layers",)))
QWEN3 = replace(QWEN2, family="Qwen3", model_types=frozenset({"qwen3"}))

# Norms before and after every block, sliding windows in some layers.
GEMMA2 = Family(
    family="Gemma 2",
    model_types=frozenset({"gemma2"}),
    attention=Attention(norms_after=("post_attention_layernorm",)),
    ffn=FeedForward(norms_before=("pre_feedforward_layernorm",), norms_after=("post_feedforward_layernorm",)),
)
GEMMA3 = replace(GEMMA2, family="Gemma 3", model_types=frozenset({"gemma3_text"}))

# Queries, keys and values in one weight, gate and up in another.
PHI3 = Family(
    family="Phi-3",
    model_types=frozenset({"phi3"}),
    attention=Attention(
        q="self_attn.qkv_proj",
        k="self_attn.qkv_proj",
        v="self_attn.qkv_proj",
        remembers={
            "self_attn.num_key_value_groups": "heads_per_kv",
            "self_attn.num_key_value_heads": "kv_heads",
            "self_attn.config.num_attention_heads": "heads",
        },
    ),
    ffn=FeedForward(ins=("mlp.gate_up_proj", "mlp.gate_up_proj")),
    # Phi3Config requires a number of longrope factors that follows from hidden size / heads.
    stock_heads_except="longrope",
)

# One Conv1D for queries, keys and values, biases everywhere, learned positions.
GPT2 = Family(
    family="GPT-2",
    model_types=frozenset({"gpt2"}),
    layers="transformer.h",
    attention=Attention(
        modules={"attn": "pair"},
        q="attn.c_attn",
        k="attn.c_attn",
        v="attn.c_attn",
        out="attn.c_proj",
        norms_before=("ln_1",),
        remembers={"attn.num_heads": "heads", "attn.split_size": "width"},
    ),
    ffn=FeedForward(ins=("mlp.c_fc",), out="mlp.c_proj", norms_before=("ln_2",)),
    names=ConfigNames(layers="n_layer", heads="n_head", kv_heads=None, head_dim=None, hidden="n_embd", ffn="n_inner"),
)

# GPT-NeoX and Pythia: queries, keys and values fused per head; the blocks in parallel or in sequence.
GPT_NEOX = Family(
    family="GPT-NeoX",
    model_types=frozenset({"gpt_neox"}),
    layers="gpt_neox.layers",
    attention=Attention(
        modules={"attention": "pair"},
        q="attention.query_key_value",
        k="attention.query_key_value",
        v="attention.query_key_value",
        interleaved=True,
        out="attention.dense",
        remembers={},
    ),
    ffn=FeedForward(ins=("mlp.dense_h_to_4h",), out="mlp.dense_4h_to_h"),
    names=ConfigNames(kv_heads=None, head_dim=None),
)

# Learned positions, biases; norms before the blocks or, in the 350M model, after them on the residual stream.
OPT = Family(
    family="OPT",
    model_types=frozenset({"opt"}),
    layers="model.decoder.layers",
    attention=Attention(
        out="self_attn.out_proj",
        norms_before=("self_attn_layer_norm",),
        remembers={"self_attn.num_heads": "heads"},
    ),
    ffn=FeedForward(
        modules={"fc1": "value", "fc2": "value"}, ins=("fc1",), out="fc2", norms_before=("final_layer_norm",)
    ),
    names=ConfigNames(kv_heads=None, head_dim=None, ffn="ffn_dim"),
)


def _gpt2_variant(family: Family, config: ModelConfig) -> Family:
    # Scores may be divided by the layer number, which must then stay the same.
    return replace(family, empty_layer_is_identity=not config.get("scale_attn_by_inverse_layer_idx"))


def _opt_variant(family: Family, config: ModelConfig) -> Family:
    if config.get("do_layer_norm_before", True):
        return family
    return replace(
        family,
        attention=replace(family.attention, norms_before=()),
        ffn=replace(family.ffn, norms_before=()),
        empty_layer_is_identity=False,
    )


ADAPTERS = (
    *(stock_adapter(family) for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3)),
    stock_adapter(GPT2, _gpt2_variant),
    stock_adapter(GPT_NEOX),
    stock_adapter(OPT, _opt_variant, partial(masked_inputs, causal=True)),
)
