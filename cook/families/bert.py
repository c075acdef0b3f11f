"""BERT and RoBERTa: encoders with norms on the residual stream, with any head of transformers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from cook.base.batches import Batch
from cook.base.errors import UserError
from cook.families.layout import Attention, ConfigNames, Family, FeedForward
from cook.families.stock import masked_inputs, stock_adapter
from cook.families.stock_models import architecture
from cook.pruning.family import ModelConfig

FAMILY = Family(
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
HEADS = {
    "ForMaskedLM": "AutoModelForMaskedLM",
    "ForPreTraining": "AutoModelForMaskedLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
    "ForMultipleChoice": "AutoModelForMultipleChoice",
    "BertModel": "AutoModel",
    "RobertaModel": "AutoModel",
}
"""Suffixes of a config's `architectures`, and the transformers class that builds the model."""


def _variant(family: Family, config: ModelConfig) -> Family:
    named = architecture(config)
    auto_class = config.get("stock_class") or next((c for end, c in HEADS.items() if named.endswith(end)), None)
    if named and auto_class is None:
        raise UserError(f"{family.family} cannot be pruned with this head: {named}", wanted=", ".join(HEADS))
    # The bare encoder's weights lack the prefix.
    layers = family.layers.partition(".")[2] if auto_class == "AutoModel" else family.layers
    return replace(family, layers=layers, auto_class=auto_class or family.auto_class)


def _roberta_inputs(batch: Batch) -> dict[str, Any]:
    # Its positions begin after the padding id, which is 1 in every RoBERTa.
    return masked_inputs(batch, causal=False) | {"position_ids": batch["position"] + 2}


ADAPTERS = (
    stock_adapter(FAMILY, _variant, partial(masked_inputs, causal=False), is_causal=False),
    stock_adapter(
        replace(FAMILY, family="RoBERTa", model_types=frozenset({"roberta"}), layers="roberta.encoder.layer"),
        _variant,
        _roberta_inputs,
        is_causal=False,
    ),
)
