"""BERT with pruned matrices that run as tiles: the stock model around an encoder of its own.

An export carries this file and the other `sparse_*.py` along, so that
`AutoModel….from_pretrained(folder, trust_remote_code=True)` works where cook is not installed.

    B rows, T tokens, D hidden size, H heads, E dims a head, M = B · T; activations inside stand transposed, [D, M]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from .sparse_int8 import Int8TileWiseLinear, can_encode, encode
from .sparse_layers import BlockWiseLinear, TileWiseLinear
from .sparse_memory import WORKSPACE
from .sparse_native import add_and_norm, has_native

CLASSES = {
    "BertModel": ("AutoModel", "SparseBertModel", ""),
    "BertForSequenceClassification": (
        "AutoModelForSequenceClassification",
        "SparseBertForSequenceClassification",
        "bert.",
    ),
    "BertForQuestionAnswering": ("AutoModelForQuestionAnswering", "SparseBertForQuestionAnswering", "bert."),
    "BertForTokenClassification": ("AutoModelForTokenClassification", "SparseBertForTokenClassification", "bert."),
}
"""For a stock class the auto class that loads it, its counterpart here, and what its encoder's names begin with."""
ROWS_AT_ONCE = 256
"""Tokens that go through all layers together: their activations stay in the cache."""


class SparseBertConfig(BertConfig):
    """BERT's config and the sizes of every layer's tiles.

    `sparse_layers` holds for each layer `heads`, `scale` (of the attention scores) and the four matrices `qkv`,
    `attention_output`, `intermediate`, `output`, each with `inputs`, `outputs`, `tiles` (pairs of inputs and outputs)
    and `block`. `sparse_int8`: their weights are int8.
    """

    model_type = "cook_sparse_bert"

    def __init__(self, sparse_layers: list[dict[str, Any]] | None = None, sparse_int8: bool = False, **kwargs: Any):
        self.sparse_layers, self.sparse_int8 = sparse_layers or [], sparse_int8
        super().__init__(**kwargs)


def _linear(described: dict[str, Any], is_int8: bool) -> Any:
    kind = Int8TileWiseLinear if is_int8 else BlockWiseLinear if described["block"] > 1 else TileWiseLinear
    return kind(described["inputs"], described["outputs"], described["tiles"], block=described["block"])


class SparseLayer(nn.Module):
    """Attention and FFN of one layer.

    Args:
        config: The model's.
        sizes: The layer's own entry of `sparse_layers`.
    """

    def __init__(self, config: SparseBertConfig, sizes: dict[str, Any]):
        super().__init__()
        self.heads, self.scale = sizes["heads"], sizes["scale"]
        names = ("qkv", "attention_output", "intermediate", "output")
        matrices = [_linear(sizes[name], config.sparse_int8) for name in names]
        self.qkv, self.attention_output, self.intermediate, self.output = matrices
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.output_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.attention_dropout = config.attention_probs_dropout_prob
        self.activation = ACT2FN[config.hidden_act]
        self.is_gelu = config.hidden_act == "gelu"

    def forward(self, x_BTD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """With gradients; `mask` is added to the scores."""
        shape = (*x_BTD.shape[:2], self.heads, -1)
        if self.heads:
            q, k, v = (z.view(shape).transpose(1, 2) for z in self.qkv(x_BTD).chunk(3, dim=-1))
            dropout = self.attention_dropout if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=self.scale)
            mixed = mixed.transpose(1, 2).flatten(2)
        else:
            mixed = x_BTD[..., :0]
        x_BTD = self.attention_norm(x_BTD + self.dropout(self.attention_output(mixed)))
        h = self.activation(self.intermediate(x_BTD))
        return self.output_norm(x_BTD + self.dropout(self.output(h)))

    def columns(self, x_DM: torch.Tensor, batch: int, mask: torch.Tensor | None) -> torch.Tensor:
        """Without gradients, on transposed activations, which it writes over; M counts the tokens row by row."""
        y_DM = WORKSPACE.get("layer", x_DM.shape, x_DM)
        self.attention_output.columns(self._mixed(x_DM, batch, mask), out=y_DM)
        _add_and_norm(x_DM, y_DM, self.attention_norm)
        h = WORKSPACE.get("inner", (self.intermediate.out_features, x_DM.shape[1]), x_DM)
        self.intermediate.columns(x_DM, out=h)
        h = torch.ops.aten.gelu_(h) if self.is_gelu else self.activation(h)
        self.output.columns(h, out=y_DM)
        return _add_and_norm(x_DM, y_DM, self.output_norm)

    def _mixed(self, x_DM: torch.Tensor, batch: int, mask: torch.Tensor | None) -> torch.Tensor:
        """The heads' weighted values, `[H · E, M]`."""
        rows = x_DM.shape[1]
        if not self.heads:
            return x_DM[:0]
        qkv = WORKSPACE.get("qkv", (self.qkv.out_features, rows), x_DM)
        self.qkv.columns(x_DM, out=qkv)
        size, tokens = len(qkv) // (3 * self.heads), rows // batch
        # [3, H, E, B, T] to [3, B · H, E, T], in which every head's tokens are contiguous.
        q, k, v = qkv.view(3, self.heads, size, batch, tokens).permute(0, 3, 1, 2, 4).reshape(3, -1, size, tokens)
        scores = WORKSPACE.get("scores", (len(q), tokens, tokens), x_DM)
        if mask is None:
            start = scores.new_zeros(1, 1, 1)
        else:
            start = mask.expand(batch, self.heads, -1, -1).reshape(len(q), -1, tokens)
        torch.baddbmm(start, q.transpose(1, 2), k, beta=0 if mask is None else 1, alpha=self.scale, out=scores)
        weights = torch.softmax(scores, dim=-1)
        mixed = torch.bmm(v, weights.transpose(1, 2))
        return mixed.view(batch, -1, tokens).transpose(0, 1).reshape(-1, rows)


def _add_and_norm(x_DM: torch.Tensor, y_DM: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    """LayerNorm of x + y over the features, written over x."""
    if has_native(x_DM) and has_native(norm.weight):
        return add_and_norm(x_DM, y_DM, norm)
    x_DM += y_DM
    if x_DM.dtype != torch.float32 or x_DM.is_cuda:
        return x_DM.copy_(F.layer_norm(x_DM.T, norm.normalized_shape, norm.weight, norm.bias, norm.eps).T)
    # Means over the lines as a product: a reduction across contiguous lines is slow.
    average = x_DM.new_full((1, len(x_DM)), 1.0 / len(x_DM))
    x_DM -= average @ x_DM
    torch.mul(x_DM, x_DM, out=y_DM)
    x_DM *= (average @ y_DM).add_(norm.eps).rsqrt_()
    return torch.addcmul(norm.bias[:, None], x_DM, norm.weight[:, None], out=x_DM)


class SparseEncoder(nn.Module):
    """The layers of `sparse_layers`, in the place of the stock encoder."""

    def __init__(self, config: SparseBertConfig):
        super().__init__()
        self.layers = nn.ModuleList([SparseLayer(config, sizes) for sizes in config.sparse_layers])

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        mask = _added(attention_mask, hidden_states)
        trains = torch.is_grad_enabled() and (
            hidden_states.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        if trains:
            for layer in self.layers:
                hidden_states = layer(hidden_states, mask)
        else:
            with torch.autocast(hidden_states.device.type, enabled=False):  # it is written in place, in one type
                if can_encode(list(self.layers), hidden_states):
                    hidden_states = encode(self, list(self.layers), hidden_states, mask)
                else:
                    hidden_states = self._in_parts(hidden_states, mask)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden_states)

    def _in_parts(self, x_BTD: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        batch, tokens, _ = x_BTD.shape
        at_once = batch if x_BTD.is_cuda else max(1, ROWS_AT_ONCE // max(1, tokens))
        out = torch.empty_like(x_BTD)
        for start in range(0, batch, at_once):
            rows = x_BTD[start : start + at_once]
            x_DM = rows.flatten(0, 1).T.clone(memory_format=torch.contiguous_format)  # it is written over
            part = mask if mask is None or len(mask) == 1 else mask[start : start + at_once]
            for layer in self.layers:
                assert isinstance(layer, SparseLayer)
                x_DM = layer.columns(x_DM, len(rows), part)
            out[start : start + at_once] = x_DM.T.view(rows.shape)
        return out


def _added(mask: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """A mask of the stock model, boolean or not, as what is added to the scores, `[B, 1, 1 or T, T]`."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    low = torch.finfo(like.dtype).min
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill_(~mask, low)


class SparseBertModel(BertModel):
    """BERT without a head."""

    config_class = SparseBertConfig
    _can_record_outputs: dict[str, Any] = {}
    _no_split_modules = ["BertEmbeddings", "SparseLayer"]

    def __init__(self, config: SparseBertConfig, add_pooling_layer: bool = True):
        super().__init__(_without_layers(config), add_pooling_layer=add_pooling_layer)
        _adopt(self, config)
        self.encoder = SparseEncoder(config)  # type: ignore[assignment]


def _without_layers(config: SparseBertConfig) -> SparseBertConfig:
    """A config with which the stock class makes no layers that would be thrown away."""
    bare = type(config)(**{**config.to_dict(), "num_hidden_layers": 0, "sparse_layers": None})
    bare._attn_implementation = config._attn_implementation
    return bare


def _adopt(model: PreTrainedModel, config: SparseBertConfig) -> None:
    """Gives a model that was made with a bare config its own, with what the making settled."""
    config._attn_implementation = model.config._attn_implementation
    model.config = config


class SparseBertForSequenceClassification(BertForSequenceClassification):
    """BERT that classifies or scores rows."""

    config_class = SparseBertConfig

    def __init__(self, config: SparseBertConfig):
        super().__init__(_without_layers(config))
        _adopt(self, config)
        self.bert = SparseBertModel(config)


class SparseBertForQuestionAnswering(BertForQuestionAnswering):
    """BERT that finds answers in texts."""

    config_class = SparseBertConfig

    def __init__(self, config: SparseBertConfig):
        super().__init__(_without_layers(config))
        _adopt(self, config)
        self.bert = SparseBertModel(config, add_pooling_layer=False)


class SparseBertForTokenClassification(BertForTokenClassification):
    """BERT that classifies tokens."""

    config_class = SparseBertConfig

    def __init__(self, config: SparseBertConfig):
        super().__init__(_without_layers(config))
        _adopt(self, config)
        self.bert = SparseBertModel(config, add_pooling_layer=False)
