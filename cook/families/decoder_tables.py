"""Further decoders of stock transformers, one table per family; those of images and text are among them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cook.base.batches import Batch
from cook.base.errors import UserError
from cook.families.layout import Attention, ConfigNames, Family, FeedForward
from cook.families.stock import masked_inputs, packed_inputs, stock_adapter
from cook.families.tables import GEMMA3, clipped_variant, fused
from cook.pruning.family import ModelConfig

OWN_ATTENTION = {
    "granite": Attention(scaling=""),  # the factor of scores is a number in the config
}
# Llama's layers with other multipliers, biases, windows and positions, which stay as they are.
LLAMA_LIKE = tuple(
    Family(
        family=name,
        model_types=frozenset({model_type}),
        names=ConfigNames(per_layer=("layer_types", "no_rope_layers")),
        attention=OWN_ATTENTION.get(model_type, Attention()),
    )
    for model_type, name in {
        "granite": "Granite",
        "ernie4_5": "ERNIE 4.5",
        "hunyuan_v1_dense": "Hunyuan",
        "seed_oss": "Seed-OSS",
        "ministral": "Ministral",
        "ministral3": "Ministral 3",
        "smollm3": "SmolLM3",
        "olmo": "OLMo",
    }.items()
)
GEMMA = Family(family="Gemma", model_types=frozenset({"gemma"}), embedding_times_root="model.norm")

# An FFN without a gate.
NEMOTRON = Family(family="Nemotron", model_types=frozenset({"nemotron"}), ffn=FeedForward(ins=("mlp.up_proj",)))
ARCEE = replace(NEMOTRON, family="Arcee", model_types=frozenset({"arcee"}))
STARCODER2 = Family(
    family="StarCoder2",
    model_types=frozenset({"starcoder2"}),
    ffn=FeedForward(ins=("mlp.c_fc",), out="mlp.c_proj"),
)

# Gate and up in one weight; GLM-4 has norms after the blocks as well.
GLM = Family(
    family="GLM",
    model_types=frozenset({"glm"}),
    ffn=FeedForward(ins=("mlp.gate_up_proj", "mlp.gate_up_proj")),
)
GLM4 = replace(
    GLM,
    family="GLM-4",
    model_types=frozenset({"glm4"}),
    attention=Attention(norms_after=("post_self_attn_layernorm",)),
    ffn=replace(GLM.ffn, norms_after=("post_mlp_layernorm",)),
)

# Norms after the blocks only; OLMo 2 and 3 have norms over the queries and the keys of all heads.
EXAONE4 = Family(
    family="EXAONE 4",
    model_types=frozenset({"exaone4"}),
    attention=Attention(norms_before=(), norms_after=("post_attention_layernorm",)),
    ffn=FeedForward(norms_before=(), norms_after=("post_feedforward_layernorm",)),
)
OLMO2 = replace(
    EXAONE4,
    family="OLMo 2",
    model_types=frozenset({"olmo2"}),
    attention=replace(EXAONE4.attention, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
)
OLMO3 = replace(OLMO2, family="OLMo 3", model_types=frozenset({"olmo3"}))

# Both blocks in parallel behind one norm; Cohere's norms of queries and keys have weights per head.
COHERE = Family(
    family="Cohere",
    model_types=frozenset({"cohere"}),
    attention=Attention(norms_before=(), q_norm="self_attn.q_norm", k_norm="self_attn.k_norm"),
    ffn=FeedForward(norms_before=()),
    norms_shared=("input_layernorm",),
)
COHERE2 = replace(COHERE, family="Cohere 2", model_types=frozenset({"cohere2"}))
PHI = replace(
    COHERE,
    family="Phi",
    model_types=frozenset({"phi"}),
    attention=Attention(out="self_attn.dense", norms_before=()),
    ffn=FeedForward(ins=("mlp.fc1",), out="mlp.fc2", norms_before=()),
    # Its norms of queries and keys are as wide as hidden size / heads.
    stock_heads_except="qk_layernorm",
)
GPTJ = Family(
    family="GPT-J",
    model_types=frozenset({"gptj"}),
    layers="transformer.h",
    attention=Attention(
        modules={"attn": "pair"},
        q="attn.q_proj",
        k="attn.k_proj",
        v="attn.v_proj",
        out="attn.out_proj",
        norms_before=(),
        remembers={"attn.num_attention_heads": "heads"},
        head_dim="attn.head_dim",
        scaling="",  # a divisor that the class computes from the hidden size and the heads of the config
        turned="attn.rotary_dim",
        from_table=True,
    ),
    ffn=FeedForward(ins=("mlp.fc_in",), out="mlp.fc_out", norms_before=()),
    norms_shared=("ln_1",),
    names=ConfigNames(layers="n_layer", heads="n_head", kv_heads=None, head_dim=None, hidden="n_embd", ffn="n_inner"),
)

# The blocks in sequence or in parallel; in the 12B model a norm per head.
STABLELM = Family(
    family="StableLM",
    model_types=frozenset({"stablelm"}),
    attention=Attention(
        remembers={
            "self_attn.num_heads": "heads",
            "self_attn.num_key_value_heads": "kv_heads",
            "self_attn.num_key_value_groups": "heads_per_kv",
        },
        turned="self_attn.rotary_ndims",
    ),
    names=ConfigNames(head_dim=None),
)

# Queries of a key-value head, its key and its value one after the other, or all queries, one key and one value. The
# attention's output is added to that of the FFN in place. Older models have ALiBi instead of rotary positions.
FALCON = Family(
    family="Falcon",
    model_types=frozenset({"falcon"}),
    layers="transformer.h",
    attention=Attention(
        modules={"self_attention": "pair"},
        **fused("self_attention.query_key_value"),
        interleaved=True,
        out="self_attention.dense",
        norms_before=("ln_attn",),
        remembers={"self_attention.num_heads": "heads", "self_attention.num_kv_heads": "kv_heads"},
        head_dim="self_attention.head_dim",
        scaling="self_attention.inv_norm_factor",
    ),
    ffn=FeedForward(
        modules={"mlp": "full value"}, ins=("mlp.dense_h_to_4h",), out="mlp.dense_4h_to_h", norms_before=("ln_mlp",)
    ),
    names=ConfigNames(kv_heads="num_kv_heads", head_dim=None, ffn="ffn_hidden_size"),
)

# ALiBi; the blocks add the residual themselves.
BLOOM = Family(
    family="BLOOM",
    model_types=frozenset({"bloom"}),
    layers="transformer.h",
    attention=Attention(
        modules={"self_attention": "added pair"},
        **fused("self_attention.query_key_value"),
        interleaved=True,
        slopes=True,
        out="self_attention.dense",
        remembers={"self_attention.num_heads": "heads"},
        head_dim="self_attention.head_dim",
        scaling="self_attention.inv_norm_factor",
    ),
    ffn=FeedForward(modules={"mlp": "added value"}, ins=("mlp.dense_h_to_4h",), out="mlp.dense_4h_to_h"),
    names=ConfigNames(layers="n_layer", heads="n_head", kv_heads=None, head_dim=None, ffn=None),
)
MPT = Family(
    family="MPT",
    model_types=frozenset({"mpt"}),
    layers="transformer.blocks",
    attention=Attention(
        modules={"attn": "pair"},
        **fused("attn.Wqkv"),
        slopes=True,
        out="attn.out_proj",
        norms_before=("norm_1",),
        remembers={"attn.n_heads": "heads"},
        head_dim="attn.head_dim",
        scaling="attn.softmax_scale",
    ),
    ffn=FeedForward(
        modules={"ffn": "added value"}, ins=("ffn.up_proj",), out="ffn.down_proj", norms_before=("norm_2",)
    ),
    names=ConfigNames(layers="n_layers", heads="n_heads", kv_heads=None, head_dim=None, hidden="d_model", ffn=None),
)

# Models of images and text: the text part is pruned, the rest is copied. Images enter the residual stream, which stays.
GEMMA3_IMAGES = replace(
    GEMMA3,
    family="Gemma 3 with images",
    model_types=frozenset({"gemma3"}),
    layers="model.language_model.layers",
    part="text_config",
    auto_class="AutoModelForImageTextToText",
    embedding_times_root="",
    hidden_stays=True,
)
QWEN2_VL = replace(
    GEMMA3_IMAGES,
    family="Qwen2-VL, Qwen2.5-VL",
    model_types=frozenset({"qwen2_vl", "qwen2_5_vl"}),
    attention=Attention(),
    ffn=FeedForward(),
    names=ConfigNames(head_dim=None, first_layers=("max_window_layers",)),
)


def _parallel(family: Family, norm: str) -> Family:
    """Both blocks read the output of one norm."""
    attention, ffn = replace(family.attention, norms_before=()), replace(family.ffn, norms_before=())
    return replace(family, attention=attention, ffn=ffn, norms_shared=(norm,))


def _stablelm_variant(family: Family, config: ModelConfig) -> Family:
    family = _parallel(family, "input_layernorm") if config.get("use_parallel_residual") else family
    return replace(family, heads_stay=bool(config.get("qk_layernorm")))


def _falcon_variant(family: Family, config: ModelConfig) -> Family:
    is_new, is_parallel = config.get("new_decoder_architecture", False), config.get("parallel_attn", True)
    attention, names = replace(family.attention, slopes=bool(config.get("alibi"))), family.names
    if not is_new:
        is_one = config.get("multi_query", True)
        attention = replace(attention, interleaved=not is_one)
        names = replace(names, kv_heads=1 if is_one else None)
    family = replace(family, attention=attention, names=names)
    if not is_parallel:
        return replace(
            family,
            attention=replace(attention, norms_before=("input_layernorm",)),
            ffn=replace(family.ffn, norms_before=("post_attention_layernorm",)),
        )
    norms = config.get("num_ln_in_parallel_attn")
    has_two = norms == 2 or (norms is None and is_new)
    return family if has_two else _parallel(family, "input_layernorm")


def _bloom_variant(family: Family, config: ModelConfig) -> Family:
    if config.get("slow_but_exact") and config.get("pretraining_tp", 1) > 1:
        raise UserError(
            "BLOOM with slow_but_exact cannot be pruned: it splits its products at numbers of the whole model",
            remedy="set slow_but_exact to false in config.json",
        )
    if not config.get("apply_residual_connection_post_layernorm"):
        return family
    attention, ffn = replace(family.attention, norms_before=()), replace(family.ffn, norms_before=())
    return replace(family, attention=attention, ffn=ffn, empty_layer_is_identity=False)


def _whole_row_inputs(batch: Batch) -> dict[str, Any]:
    # The class computes ALiBi from a mask of padding, and takes none of samples.
    return {"input_ids": batch["input"], "use_cache": False}


def _falcon_inputs(batch: Batch) -> dict[str, Any]:
    has_one = int((batch["position"] == 0).sum(1).max()) == 1
    return _whole_row_inputs(batch) if has_one else masked_inputs(batch, causal=True)


def _mpt_inputs(batch: Batch) -> dict[str, Any]:
    # Its positions are differences, from ALiBi, and its attention wants what is masked.
    inputs = masked_inputs(batch, causal=True)
    del inputs["position_ids"]
    return inputs | {"attention_mask": ~inputs["attention_mask"]}


def _qwen2_vl_inputs(batch: Batch) -> dict[str, Any]:
    # Text positions, by which samples are separated, and those along time, height and width of an image.
    return packed_inputs(batch) | {"position_ids": batch["position"].expand(4, -1, -1)}


ADAPTERS = (
    *(stock_adapter(family, clipped_variant) for family in LLAMA_LIKE),
    *(stock_adapter(family) for family in (GEMMA, NEMOTRON, ARCEE, STARCODER2, GLM, GLM4, EXAONE4)),
    *(stock_adapter(family) for family in (OLMO2, OLMO3, COHERE, COHERE2, PHI, GPTJ)),
    stock_adapter(GEMMA3_IMAGES),
    stock_adapter(QWEN2_VL, inputs=_qwen2_vl_inputs),
    stock_adapter(STABLELM, _stablelm_variant),
    stock_adapter(FALCON, _falcon_variant, _falcon_inputs, mixes_samples=lambda config: bool(config.get("alibi"))),
    stock_adapter(BLOOM, _bloom_variant, _whole_row_inputs, mixes_samples=lambda _config: True),
    stock_adapter(MPT, clipped_variant, _mpt_inputs),
)
