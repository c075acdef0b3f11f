"""Tables that describe families of stock transformers by names only.

Paths are relative to a layer. A weight that is fused from several parts is named once per part, in the order of the
parts. `cook.families.stock` makes an adapter from such a table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

# What a module returns: attention modules return a pair (output, weights), all others their output. "added": it adds
# the residual, its second argument, itself. "full": the layer changes the returned tensor.
AbsentKind = Literal["pair", "value", "added pair", "added value", "full value"]
# Numbers of an attention block: query heads, key-value heads, query heads per key-value head, heads × head_dim.
Size = Literal["heads", "kv_heads", "heads_per_kv", "width"]
# How a router makes weights of its scores: a softmax, or a sigmoid of each with a bias for the choice and groups.
Scores = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """The attention block of a layer."""

    # The modules of the block, and what each returns.
    modules: Mapping[str, AbsentKind] = field(default_factory=lambda: {"self_attn": "pair"})
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    """The projections to queries, keys and values; the same path three times if they are fused."""
    interleaved: bool = False
    """In a fused weight: q, k and v are interleaved per key-value head; else all queries, all keys, all values."""
    q_norm: str = ""
    k_norm: str = ""
    """Norms of queries and keys that have weights of their own for every head, over each head or over all of them."""
    positions: Mapping[Literal["q", "k"], str] = field(default_factory=dict)
    """Further products to the heads' features, of relative positions, if a model has them: what is multiplied by keys
    in place of queries, and by queries in place of keys."""
    slopes: bool = False
    """Whether every head has a bias of its own, an ALiBi slope, which follows from its number and that of all heads."""
    out: str = "self_attn.o_proj"  # the block's output projection, whose input is the heads
    norms_before: tuple[str, ...] = ("input_layernorm",)  # norms whose output is used by this block only
    norms_after: tuple[str, ...] = ()  # norms that are applied to this block's output only
    remembers: Mapping[str, Size] = field(default_factory=lambda: {"self_attn.num_key_value_groups": "heads_per_kv"})
    """Module attributes from which the forward pass reads sizes; `module.config.name` for the module's config."""
    head_dim: str = "self_attn.head_dim"
    """The module attribute with the size of a head; empty if heads cannot have fewer dimensions."""
    scaling: str = "self_attn.scaling"
    """The one with the factor of scores, or `head_dim` again if the forward pass computes the factor from it; empty if
    the factor does not follow from the size of a head."""
    clipped: bool = False
    """Whether queries are clipped, and so cannot be multiplied by a factor: that of scores then stays in its place."""
    turned: str = ""
    """The one with the number of dimensions that rotary positions turn, if the forward pass reads it."""
    from_table: bool = False
    """Whether the block has a table of the sines and cosines of all pairs, which are neighbours, as in GPT-J."""
    latent: bool = False
    """Each head's keys and values are a product (`k` and `v`) of one latent, which is cached in their place."""
    reads: tuple[str, ...] = ()  # what reads the hidden states, if not q, k and v
    per_head: tuple[str, ...] = ()  # weights with one number per query head


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """The FFN block of a layer."""

    modules: Mapping[str, AbsentKind] = field(default_factory=lambda: {"mlp": "value"})
    """The modules of the block, and what each returns."""
    ins: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """The projections to the inner features; the same path twice if gate and up are fused."""
    out: str = "mlp.down_proj"  # the block's output projection, whose input is the inner features
    norms_before: tuple[str, ...] = ("post_attention_layernorm",)  # norms whose output is used by this block only
    norms_after: tuple[str, ...] = ()  # norms that are applied to this block's output only


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The mixture of experts in the FFN blocks that have one; its weights are fused, `[experts, ...]`."""

    block: str = "mlp"  # the module whose output is the block's
    router: str = "mlp.gate"
    module: str = "mlp.experts"  # with gate_up_proj and down_proj, and their biases if there are any
    scores: Scores = "softmax"
    transposed: bool = False  # the inputs of a product come first, and gate and up alternate
    shared: tuple[str, ...] = ()  # products of shared experts that read the hidden states, and what weights them
    shared_out: str = ""  # the shared experts' last product
    count: str = "num_experts"  # names in the config: experts per layer
    dims: str = "moe_intermediate_size"  # dimensions of an expert
    shared_count: str = ""  # number of shared experts, if their dimensions are that many times those of an expert


@dataclass(frozen=True, kw_only=True)
class ConfigNames:
    """The names of the sizes in the family's config."""

    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str | int | None = "num_key_value_heads"
    """None if every query head has its own keys and values; a number if the class has that many in every model."""
    head_dim: str | None = "head_dim"
    """None if the class always divides the hidden size by the heads, and so cannot have fewer heads."""
    like_head_dim: tuple[str, ...] = ()  # other sizes of heads that must be equal to it if heads lose dimensions
    hidden: str = "hidden_size"
    like_hidden: tuple[str, ...] = ()  # other sizes that are equal to the hidden size unless given
    ffn: str | None = "intermediate_size"  # None if the class always has the same multiple of the hidden size
    per_layer: tuple[str, ...] = ("layer_types",)  # lists with one entry per layer, if the config has them
    first_layers: tuple[str, ...] = ()  # numbers of first layers that differ from the others
    dense_layers: str = ""  # the list of layers without experts
    sparse_step: str = ""  # every how many layers there are experts, beside that list

    def key_value_heads(self, config: Any) -> int:
        """The key-value heads of a model with this config object."""
        own = self.kv_heads if isinstance(self.kv_heads, int) else getattr(config, self.kv_heads or self.heads)
        return int(own)


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family that stock transformers has."""

    family: str  # the family's name in tables and messages
    model_types: frozenset[str]  # values of `model_type` in config.json; the weights of all of them have these names
    layers: str = "model.layers"  # path of the list of layers
    part: str = ""
    """The config of the part that is pruned, in the config of a model of several parts; the other parts stay."""
    attention: Attention = field(default_factory=Attention)
    ffn: FeedForward = field(default_factory=FeedForward)
    experts: Experts | None = None  # how FFN blocks with experts are built, if the family has any
    norms_shared: tuple[str, ...] = ()  # norms whose output both blocks use, which are in parallel
    names: ConfigNames = field(default_factory=ConfigNames)
    auto_class: str = "AutoModelForCausalLM"  # the transformers class that builds the model from its config
    stock_heads_except: str = ""  # a config property with which the class cannot have fewer heads, in a few words
    carried: tuple[str, ...] = ()
    """Patterns of keys in the family's files that the model's class may lack: heads of other tasks, which are copied
    unchanged."""
    embedding_times_root: str = ""
    """Path of the last norm, if the class multiplies embeddings by the root of the hidden size, as Gemma does, whose
    norms multiply by 1 + weight."""
    empty_layer_is_identity: bool = True
    """Whether a layer without its two blocks returns its input unchanged, and so can be removed. False if norms
    are on the residual stream itself."""
    first_layer_stays: bool = False
    """Whether the first layer has other modules than the others, so that no other can take its place."""
    heads_stay: bool = False
    """Whether no single head can be removed, since every head has modules of its own."""
    hidden_stays: bool = False
    """Whether the hidden size cannot be pruned, whatever the rules of `cook.families.stream` find."""

    def own_config(self, config: Any) -> Any:
        """The config of the part that is pruned, as an object or as a dictionary, as the model's is."""
        if not self.part:
            return config
        return config.get(self.part, {}) if isinstance(config, Mapping) else getattr(config, self.part)

    def of_layers(self, model: torch.nn.Module, attribute: str) -> Any:
        """The value of a module's attribute in the first layer that has it; None if no layer does."""
        block, _, name = attribute.rpartition(".")
        layers: Any = model.get_submodule(self.layers)
        modules = (module for layer in layers for path, module in layer.named_modules() if path == block)
        return next((getattr(module, name) for module in modules if hasattr(module, name)), None)

    def own_part(self, model: torch.nn.Module) -> torch.nn.Module:
        """The part of a model that is pruned, without its head."""
        return model.get_submodule(self.layers.rpartition(".")[0]) if self.part else model

    def with_fields(self, config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
        """The model's config with these fields of the part that is pruned."""
        if not self.part:
            return {**config, **fields}
        return {**config, self.part: {**self.own_config(config), **fields}}
