"""The families of stock transformers: one table per family, where its layers differ from Llama's."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from cook.base.batches import Batch
from cook.base.errors import UserError
from cook.families.layout import Attention, ConfigNames, Experts, Family, FeedForward
from cook.families.stock import masked_inputs, packed_inputs, stock_adapter, windowed_inputs
from cook.families.stock_models import architecture
from cook.pruning.family import ModelConfig


def _fused(path: str) -> dict[str, Any]:
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
        **_fused("self_attn.qkv_proj"),
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
    attention=Attention(q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", head_dim=""),
    experts=Experts(dims="intermediate_size"),
    names=ConfigNames(head_dim=None),
)
GRANITE_MOE = replace(
    LLAMA,
    family="GraniteMoE",
    model_types=frozenset({"granitemoe"}),
    attention=Attention(scaling=""),  # a number in the config
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
    attention=Attention(per_head=("self_attn.sinks",), head_dim=""),
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
        head_dim="",
    ),
    experts=Experts(
        scores="sigmoid",
        shared=("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
        shared_out="mlp.shared_experts.down_proj",
        count="n_routed_experts",
        shared_count="n_shared_experts",
    ),
    names=ConfigNames(head_dim="v_head_dim", first_layers=("first_k_dense_replace",)),
)

# One Conv1D for queries, keys and values, biases everywhere, learned positions.
GPT2 = Family(
    family="GPT-2",
    model_types=frozenset({"gpt2"}),
    layers="transformer.h",
    attention=Attention(
        modules={"attn": "pair"},
        **_fused("attn.c_attn"),
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
        **_fused("attention.query_key_value"),
        interleaved=True,
        out="attention.dense",
        remembers={},
        head_dim="attention.head_size",
        scaling="attention.scaling",
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

# Granite's factor of scores is a number in the config. ERNIE's rotary positions turn neighbours, Hunyuan's norms come
# after them, and Ministral 3 scales queries by positions.
OWN_ATTENTION = {"granite": Attention(scaling="")} | dict.fromkeys(
    ("ernie4_5", "hunyuan_v1_dense", "ministral3"), Attention(head_dim="")
)
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

# Gate and up in one weight; GLM-4 has norms behind the blocks as well.
GLM = Family(
    family="GLM",
    model_types=frozenset({"glm"}),
    attention=Attention(head_dim=""),
    ffn=FeedForward(ins=("mlp.gate_up_proj", "mlp.gate_up_proj")),
)
GLM4 = replace(
    GLM,
    family="GLM-4",
    model_types=frozenset({"glm4"}),
    attention=Attention(norms_after=("post_self_attn_layernorm",), head_dim=""),
    ffn=replace(GLM.ffn, norms_after=("post_mlp_layernorm",)),
)

# Norms behind the blocks only; OLMo 2 and 3 have norms over the queries and the keys of all heads.
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
    attention=replace(EXAONE4.attention, q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", head_dim=""),
)
OLMO3 = replace(OLMO2, family="OLMo 3", model_types=frozenset({"olmo3"}))

# Both blocks in parallel behind one norm; Cohere's norms of queries and keys have weights per head.
COHERE = Family(
    family="Cohere",
    model_types=frozenset({"cohere"}),
    attention=Attention(norms_before=(), q_norm="self_attn.q_norm", k_norm="self_attn.k_norm", head_dim=""),
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
        head_dim="",
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
        head_dim="",  # the class remembers how many dims rotary positions turn
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
        **_fused("self_attention.query_key_value"),
        interleaved=True,
        out="self_attention.dense",
        norms_before=("ln_attn",),
        remembers={"self_attention.num_heads": "heads", "self_attention.num_kv_heads": "kv_heads"},
        head_dim="",
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
        **_fused("self_attention.query_key_value"),
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
        **_fused("attn.Wqkv"),
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
XLM_ROBERTA = replace(ROBERTA, family="XLM-RoBERTa", model_types=frozenset({"xlm-roberta"}))
ELECTRA = replace(
    BERT,
    family="ELECTRA",
    model_types=frozenset({"electra"}),
    layers="electra.encoder.layer",
    carried=(*BERT.carried, r"^generator_", r"^discriminator_"),
)
DEBERTA = replace(
    BERT,
    family="DeBERTa-v2, v3",
    model_types=frozenset({"deberta-v2"}),
    layers="deberta.encoder.layer",
    attention=replace(
        BERT.attention,
        q="attention.self.query_proj",
        k="attention.self.key_proj",
        v="attention.self.value_proj",
        positions=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
        remembers={"attention.self.num_attention_heads": "heads"},
        head_dim="",
    ),
    carried=(*BERT.carried, r"^lm_predictions\.", r"^mask_predictions\."),
)
DISTILBERT = Family(
    family="DistilBERT",
    model_types=frozenset({"distilbert"}),
    layers="distilbert.transformer.layer",
    attention=Attention(
        modules={"attention": "pair"},
        q="attention.q_lin",
        k="attention.k_lin",
        v="attention.v_lin",
        out="attention.out_lin",
        norms_before=(),
        remembers={"attention.n_heads": "heads"},
        head_dim="attention.attention_head_size",
        scaling="attention.scaling",
    ),
    ffn=FeedForward(modules={"ffn": "value"}, ins=("ffn.lin1",), out="ffn.lin2", norms_before=()),
    names=ConfigNames(layers="n_layers", heads="n_heads", kv_heads=None, head_dim=None, hidden="dim", ffn="hidden_dim"),
    auto_class="AutoModelForMaskedLM",
    carried=(r"^vocab_",),
    empty_layer_is_identity=False,
)
MODERNBERT = Family(
    family="ModernBERT",
    model_types=frozenset({"modernbert"}),
    attention=Attention(
        modules={"attn": "pair"},
        **_fused("attn.Wqkv"),
        out="attn.Wo",
        norms_before=("attn_norm",),
        remembers={},
        head_dim="",
    ),
    ffn=FeedForward(ins=("mlp.Wi", "mlp.Wi"), out="mlp.Wo", norms_before=("mlp_norm",)),
    names=ConfigNames(kv_heads=None, head_dim=None),
    auto_class="AutoModelForMaskedLM",
    carried=(r"^head\.", r"^decoder\."),
    first_layer_stays=True,  # it has no norm before attention
)
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


def _opt_variant(family: Family, config: ModelConfig) -> Family:
    if config.get("do_layer_norm_before", True):
        return family
    return replace(
        family,
        attention=replace(family.attention, norms_before=()),
        ffn=replace(family.ffn, norms_before=()),
        empty_layer_is_identity=False,
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


def _clipped_variant(family: Family, config: ModelConfig) -> Family:
    # Queries are clipped, which cannot be multiplied for another size of heads.
    clips = config.get("clip_qkv") or (config.get("attn_config") or {}).get("clip_qkv")
    return replace(family, attention=replace(family.attention, head_dim="")) if clips else family


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


def _bert_variant(family: Family, config: ModelConfig) -> Family:
    named = architecture(config)
    auto_class = config.get("stock_class") or next((c for end, c in HEADS.items() if named.endswith(end)), None)
    if named and auto_class is None:
        raise UserError(f"{family.family} cannot be pruned with this head: {named}", wanted=", ".join(HEADS))
    # The bare encoder's weights lack the prefix.
    layers = family.layers.partition(".")[2] if auto_class == "AutoModel" else family.layers
    return replace(family, layers=layers, auto_class=auto_class or family.auto_class)


def _deberta_variant(family: Family, config: ModelConfig) -> Family:
    # The table of relative positions is no module that is called, so that no gate can act on it.
    return replace(_bert_variant(family, config), hidden_stays=bool(config.get("relative_attention")))


def _encoder_row_inputs(batch: Batch) -> dict[str, Any]:
    # The class uses its mask of padding in other places than attention, or combines it with windows.
    return {"input_ids": batch["input"]}


def _roberta_inputs(batch: Batch) -> dict[str, Any]:
    # Its positions begin after the padding id, which is 1 in every RoBERTa.
    return masked_inputs(batch, causal=False) | {"position_ids": batch["position"] + 2}


ADAPTERS = (
    *(stock_adapter(family) for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3)),
    *(stock_adapter(family) for family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, GRANITE_MOE)),
    stock_adapter(GPT_OSS, inputs_by_config=windowed_inputs),
    stock_adapter(DEEPSEEK_V3, _deepseek_variant),
    *(stock_adapter(family, _clipped_variant) for family in LLAMA_LIKE),
    *(stock_adapter(family) for family in (GEMMA, NEMOTRON, ARCEE, STARCODER2, GLM, GLM4, EXAONE4)),
    *(stock_adapter(family) for family in (OLMO2, OLMO3, COHERE, COHERE2, PHI, GPTJ)),
    stock_adapter(GEMMA3_IMAGES),
    stock_adapter(QWEN2_VL, inputs=_qwen2_vl_inputs),
    stock_adapter(STABLELM, _stablelm_variant),
    stock_adapter(FALCON, _falcon_variant, _falcon_inputs, mixes_samples=lambda config: bool(config.get("alibi"))),
    stock_adapter(BLOOM, _bloom_variant, _whole_row_inputs, mixes_samples=lambda _config: True),
    stock_adapter(MPT, _clipped_variant, _mpt_inputs),
    stock_adapter(GPT2, _gpt2_variant),
    stock_adapter(GPT_NEOX),
    stock_adapter(OPT, _opt_variant, partial(masked_inputs, causal=True)),
    stock_adapter(BERT, _bert_variant, partial(masked_inputs, causal=False), is_causal=False),
    *(stock_adapter(family, _bert_variant, _roberta_inputs, is_causal=False) for family in (ROBERTA, XLM_ROBERTA)),
    *(
        stock_adapter(family, _bert_variant, partial(masked_inputs, causal=False), is_causal=False)
        for family in (ELECTRA, DISTILBERT)
    ),
    *(
        stock_adapter(family, variant, _encoder_row_inputs, is_causal=False, mixes_samples=lambda _config: True)
        for family, variant in ((DEBERTA, _deberta_variant), (MODERNBERT, _bert_variant))
    ),
)
