"""Further encoders of stock transformers, one table per family, with any head of transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from cook.base.batches import Batch
from cook.families.layout import Attention, ConfigNames, Family, FeedForward
from cook.families.stock import masked_inputs, stock_adapter
from cook.families.tables import BERT, ROBERTA, bert_variant, fused, roberta_inputs
from cook.pruning.family import ModelConfig

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
        positions={"q": "attention.self.pos_query_proj", "k": "attention.self.pos_key_proj"},
        remembers={"attention.self.num_attention_heads": "heads"},
        scaling="attention.self.attention_head_size",  # from the size of what is multiplied
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
        **fused("attn.Wqkv"),
        out="attn.Wo",
        norms_before=("attn_norm",),
        remembers={},
        head_dim="attn.head_dim",
        scaling="attn.head_dim",
    ),
    ffn=FeedForward(ins=("mlp.Wi", "mlp.Wi"), out="mlp.Wo", norms_before=("mlp_norm",)),
    names=ConfigNames(kv_heads=None, head_dim=None),
    auto_class="AutoModelForMaskedLM",
    carried=(r"^head\.", r"^decoder\."),
    first_layer_stays=True,  # it has no norm before attention
)


def _deberta_variant(family: Family, config: ModelConfig) -> Family:
    # The table of relative positions is no module that is called, so that no gate can act on it.
    return replace(bert_variant(family, config), hidden_stays=bool(config.get("relative_attention")))


def _encoder_row_inputs(batch: Batch) -> dict[str, Any]:
    # The class uses its mask of padding in other places than attention, or combines it with windows.
    return {"input_ids": batch["input"]}


ADAPTERS = (
    stock_adapter(XLM_ROBERTA, bert_variant, roberta_inputs, is_causal=False),
    *(
        stock_adapter(family, bert_variant, partial(masked_inputs, causal=False), is_causal=False)
        for family in (ELECTRA, DISTILBERT)
    ),
    *(
        stock_adapter(family, variant, _encoder_row_inputs, is_causal=False, mixes_samples=lambda _config: True)
        for family, variant in ((DEBERTA, _deberta_variant), (MODERNBERT, bert_variant))
    ),
)
