"""Tables that describe families of stock transformers: names only, no sizes and no behaviour.

Paths are relative to a layer; a weight that is fused of several parts is named once for each part, in the order in
which they lie. `cook.families.stock` makes an adapter of such a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

AbsentKind = Literal["pair", "value"]
"""What a module returns: attention modules a pair (output, weights), all others their output."""
Size = Literal["heads", "kv_heads", "heads_per_kv", "width"]
"""Numbers of an attention block: query heads, key-value heads, query heads a key-value head, heads × head_dim."""


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention block of a layer."""

    modules: Mapping[str, AbsentKind] = field(default_factory=lambda: {"self_attn": "pair"})
    """The modules that make the block, and what each returns."""
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    """The products that make queries, keys and values; the same path three times where they are fused."""
    interleaved: bool = False
    """In a fused weight: q, k and v lie head by head; else all queries come first, then all keys, then all values."""
    out: str = "self_attn.o_proj"
    """The block's last product, whose input is the heads."""
    norms_before: tuple[str, ...] = ("input_layernorm",)
    """Norms whose output only this block reads."""
    norms_after: tuple[str, ...] = ()
    """Norms through which the block's output, and nothing else, goes."""
    remembers: Mapping[str, Size] = field(default_factory=lambda: {"self_attn.num_key_value_groups": "heads_per_kv"})
    """Attributes of modules that the forward pass reads sizes from; `module.config.name` for the module's config."""


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """The FFN block of a layer."""

    modules: Mapping[str, AbsentKind] = field(default_factory=lambda: {"mlp": "value"})
    """The modules that make the block, and what each returns."""
    ins: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """The products that make the inner features; the same path twice where gate and up are fused."""
    out: str = "mlp.down_proj"
    """The block's last product, whose input is the inner features."""
    norms_before: tuple[str, ...] = ("post_attention_layernorm",)
    """Norms whose output only this block reads."""
    norms_after: tuple[str, ...] = ()
    """Norms through which the block's output, and nothing else, goes."""


@dataclass(frozen=True, kw_only=True)
class ConfigNames:
    """What the family's config calls its sizes."""

    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    """None where every query head has keys and values of its own."""
    head_dim: str | None = "head_dim"
    """None where the class always divides the hidden size by the heads: it cannot hold fewer heads then."""
    hidden: str = "hidden_size"
    ffn: str = "intermediate_size"
    per_layer: tuple[str, ...] = ("layer_types",)
    """Lists with one entry a layer, where the config has them."""
    first_layers: tuple[str, ...] = ()
    """Numbers of layers counted from the bottom, for which something is different."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family that stock transformers has."""

    family: str
    """The name in tables and messages."""
    model_types: frozenset[str]
    """Values of `model_type` in config.json; the weights of all of them have these names."""
    layers: str = "model.layers"
    """Path of the list of layers."""
    attention: Attention = field(default_factory=Attention)
    ffn: FeedForward = field(default_factory=FeedForward)
    names: ConfigNames = field(default_factory=ConfigNames)
    auto_class: str = "AutoModelForCausalLM"
    """The class of transformers that makes the model from its config."""
    stock_heads_except: str = ""
    """What a config must not have for its class to hold fewer heads, in a word."""
    carried: tuple[str, ...] = ()
    """Patterns of keys in files of the family that the model's class may lack: heads of other tasks, which go along
    with the result as they are."""
    empty_layer_is_identity: bool = True
    """Whether a layer without its two blocks hands on its input unchanged, and so can be left out. Not so where norms
    lie on the residual stream itself."""
