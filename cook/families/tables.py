"""Families of stock transformers: one table per family, where its layers differ from Llama's.

Further ones are in `decoder_tables.py` and `encoder_tables.py`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from cook.base.batches import Batch
from cook.base.errors import UserError
from cook.families.layout import Attention, ConfigNames, Experts, Family, FeedForward
from cook.families.stock import masked_inputs, stock_adapter, windowed_inputs
from cook.families.stock_models import architecture
from cook.pruning.family import ModelConfig


def fused(path: str) -> dict[str, Any]:
    """Queries, keys and values in one weight."""
    return {"q": path, "k": path, "v": path}


# Llama's layers; Qwen's have biases on queries, keys and values, or norms of queries and keys.
LLAMA = Family(family="Llama, SmolLM2", model_types=frozenset({"llama"}))
MISTRAL = Family(family="Mistral", model_types=frozenset({"mistral"}))
QWEN2 = Family(family="Qwen2", model_types=frozenset({"qwen2"}), names=ConfigNames(first_layers=("max_window_layers",)))
QWEN3 = replace(QWEN2, family="Qwen3", model_types=frozenset({"qwen3"}))

# Norms before and after every block, sliding windows in some layers.
GEMMA2 = Family(
    family="Gemma 2",
    model_types=frozenset({"gemma2"}),
    # Scores are divided by the root of a number in the config.
    attention=Attention(norms_after=("post_attention_layernorm",), scaling=""),
    ffn=FeedForward(norms_before=("pre_feedforward_layernorm",), norms_after=("post_feedforward_layernorm",)),
    embedding_times_root="model.norm",
)
GEMMA3 = replace(GEMMA2, family="Gemma 3", model_types=frozenset({"gemma3_text"}))

# Queries, keys and values in one weight, gate and up in another.
PHI3 = Family(
    family="Phi-3",
    model_types=frozenset({"phi3"}),
    attention=Attention(
        **fused("self_attn.qkv_proj"),
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

# Mixtures of experts. Their routers differ in the scores, and Qwen2's has a shared expert.
MIXTRAL = replace(
    MISTRAL,
    family="Mixtral",
    model_types=frozenset({"mixtral"}),
    experts=Experts(count="num_local_experts", dims="intermediate_size"),
)
QWEN2_MOE = replace(
    QWEN2,
    family="Qwen2-MoE",
    model_types=frozenset({"qwen2_moe"}),
    experts=Experts(
        shared=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"),
        shared_out="mlp.shared_expert.down_proj",
    ),
    names=replace(QWEN2.names, dense_layers="mlp_only_layers", sparse_step="decoder_sparse_step"),
)
QWEN3_MOE = replace(
    LLAMA,
    family="Qwen3-MoE",
    model_types=frozenset({"qwen3_moe"}),
    experts=Experts(count="num_local_experts"),
    names=ConfigNames(dense_layers="mlp_only_layers", sparse_step="decoder_sparse_step"),
)
# Norms over all queries and all keys, whose sizes follow from the hidden size.
OLMOE = replace(
    LLAMA,
    family="OLMoE",
    model_types=frozenset({"olmoe"}),
    attention=Attention(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    experts=Experts(dims="intermediate_size"),
    names=ConfigNames(head_dim=None),
)
GRANITE_MOE = replace(
    LLAMA,
    family="GraniteMoE",
    model_types=frozenset({"granitemoe"}),
    attention=Attention(scaling=""),  # the config's `attention_multiplier`
    ffn=FeedForward(modules={"block_sparse_moe": "value"}),
    experts=Experts(
        block="block_sparse_moe",
        router="block_sparse_moe.router",
        module="block_sparse_moe.experts",
        count="num_local_experts",
        dims="intermediate_size",
    ),
)
# Biases everywhere, and a number per head that takes a part of the attention.
GPT_OSS = replace(
    LLAMA,
    family="GPT-OSS",
    model_types=frozenset({"gpt_oss"}),
    attention=Attention(per_head=("self_attn.sinks",)),
    ffn=FeedForward(modules={"mlp": "pair"}),
    experts=Experts(router="mlp.router", transposed=True, count="num_local_experts", dims="intermediate_size"),
)
# Keys and values of all heads from one latent, dense first layers, groups of experts, shared experts.
DEEPSEEK_V3 = Family(
    family="DeepSeek-V3",
    model_types=frozenset({"deepseek_v3"}),
    attention=Attention(
        q="self_attn.q_b_proj",
        k="self_attn.kv_b_proj",
        v="self_attn.kv_b_proj",
        latent=True,
        reads=("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        remembers={"self_attn.num_heads": "heads"},
        head_dim="self_attn.v_head_dim",
    ),
    experts=Experts(
        scores="sigmoid",
        shared=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        shared_out="mlp.shared_experts.down_proj",
        count="n_routed_experts",
        shared_count="n_shared_experts",
    ),
    names=ConfigNames(
        head_dim="v_head_dim", like_head_dim=("qk_nope_head_dim",), first_layers=("first_k_dense_replace",)
    ),
)

# One Conv1D for queries, keys and values, biases everywhere, learned positions.
GPT2 = Family(
    family="GPT-2",
    model_types=frozenset({"gpt2"}),
    layers="transformer.h",
    attention=Attention(
        modules={"attn": "pair"},
        **fused("attn.c_attn"),
        out="attn.c_proj",
        norms_before=("ln_1",),
        remembers={"attn.num_heads": "heads", "attn.split_size": "width"},
        head_dim="attn.head_dim",
        scaling="attn.scaling",
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
        **fused("attention.query_key_value"),
        interleaved=True,
        out="attention.dense",
        remembers={},
        head_dim="attention.head_size",
        scaling="attention.scaling",
        turned="attention.rotary_ndims",
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
    names=ConfigNames(kv_heads=None, head_dim=None, ffn="ffn_dim", like_hidden=("word_embed_proj_dim",)),
)

# Encoders with norms on the residual stream, with any head of transformers.
BERT = Family(
    family="BERT",
    model_types=frozenset({"bert"}),
    layers="bert.encoder.layer",
    attention=Attention(
        # The residual is added after the dense product, inside the module that also contains the norm.
        modules={"attention.self": "pair", "attention.output.dense": "value"},
        q="attention.self.query",
        k="attention.self.key",
        v="attention.self.value",
        out="attention.output.dense",
        norms_before=(),
        remembers={},
        head_dim="attention.self.attention_head_size",
        scaling="attention.self.scaling",
    ),
    ffn=FeedForward(
        modules={"intermediate": "value", "output.dense": "value"},
        ins=("intermediate.dense",),
        out="output.dense",
        norms_before=(),
    ),
    names=ConfigNames(kv_heads=None, head_dim=None),
    auto_class="AutoModelForMaskedLM",
    carried=(r"^cls\.", r"^lm_head\.", r"(^|\.)pooler\."),
    empty_layer_is_identity=False,
)
ROBERTA = replace(BERT, family="RoBERTa", model_types=frozenset({"roberta"}), layers="roberta.encoder.layer")
HEADS = {
    "ElectraForPreTraining": "AutoModelForPreTraining",
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForPreTraining": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "BertModel": "AutoModel",
    "RobertaModel": "AutoModel",
    "ElectraModel": "AutoModel",
    "DebertaV2Model": "AutoModel",
}
"""Suffixes of a config's `architectures`, and the transformers class that builds the model."""


def _gpt2_variant(family: Family, config: ModelConfig) -> Family:
    attention = family.attention
    if not config.get("scale_attn_weights", True):
        attention = replace(attention, scaling="")
    # Scores may be divided by the layer number, which must then stay the same.
    is_identity = not config.get("scale_attn_by_inverse_layer_idx")
    return replace(family, attention=attention, empty_layer_is_identity=is_identity)


def _deepseek_variant(family: Family, config: ModelConfig) -> Family:
    if config.get("q_lora_rank", 1536) is not None:
        return family
    q = "self_attn.q_proj"
    attention = replace(family.attention, q=q, reads=(q, family.attention.reads[1]))
    return replace(family, attention=attention)


def clipped_variant(family: Family, config: ModelConfig) -> Family:
    clips = config.get("clip_qkv") or (config.get("attn_config") or {}).get("clip_qkv")
    return replace(family, attention=replace(family.attention, clipped=True)) if clips else family


def _opt_variant(family: Family, config: ModelConfig) -> Family:
    if config.get("do_layer_norm_before", True):
        return family
    return replace(
        family,
        attention=replace(family.attention, norms_before=()),
        ffn=replace(family.ffn, norms_before=()),
        empty_layer_is_identity=False,
    )


def bert_variant(family: Family, config: ModelConfig) -> Family:
    named = architecture(config)
    auto_class = config.get("stock_class") or next((c for end, c in HEADS.items() if named.endswith(end)), None)
    if named and auto_class is None:
        raise UserError(f"{family.family} cannot be pruned with this head: {named}", wanted=", ".join(HEADS))
    # The bare encoder's weights lack the prefix.
    layers = family.layers.partition(".")[2] if auto_class == "AutoModel" else family.layers
    return replace(family, layers=layers, auto_class=auto_class or family.auto_class)


def roberta_inputs(batch: Batch) -> dict[str, Any]:
    # Its positions begin after the padding id, which is 1 in every RoBERTa.
    return masked_inputs(batch, causal=False) | {"position_ids": batch["position"] + 2}


ADAPTERS = (
    *(stock_adapter(family) for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3)),
    *(stock_adapter(family) for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, GRANITE_MOE)),
    stock_adapter(OLMOE, clipped_variant),
    stock_adapter(GPT_OSS, inputs_by_config=windowed_inputs),
    stock_adapter(DEEPSEEK_V3, _deepseek_variant),
    stock_adapter(GPT2, _gpt2_variant),
    stock_adapter(GPT_NEOX),
    stock_adapter(OPT, _opt_variant, partial(masked_inputs, causal=True)),
    stock_adapter(BERT, bert_variant, partial(masked_inputs, causal=False), is_causal=False),
    stock_adapter(ROBERTA, bert_variant, roberta_inputs, is_causal=False),
)
