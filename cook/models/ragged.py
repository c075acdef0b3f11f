"""Stock transformers models whose layers differ: missing blocks, and different numbers of heads or FFN dims per layer.

The file needs only torch, transformers (>= 5) and cook_experts.py, and works for any model family. An exported model
contains a copy of both, so that `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` works anywhere.
It builds the stock model `stock_type` and then changes it as described by `structure`:

    shapes      {weight: shape}           weights whose shape differs from the stock model
    attributes  {module: {name: number}}  attributes of modules that depend on those shapes; `config.name` sets the
                                          module's own copy of the config
    absent      {module: kind}            modules that add nothing: "pair" for the output of an attention block, or
                                          "value"; with "added", they return the residual, their second argument; with
                                          "full", a tensor of its own that the layer may change
    constant    {module: weight}          absent modules of which only the last bias remains, and that bias
    identity    [module, ...]             norms that are no longer needed
    spread      {module: [[own, wide]]}   products whose output parts are filled up with zeros, from `own` features to
                                          `wide`: the query heads of key-value heads that have fewer than others
    gathered    {module: [[own, wide]]}   products that take such parts as inputs, and skip what was filled up
    rebuilt     {module: {field: number}} routers, experts and attention with weights of single heads, which are built
                                          from a config with these sizes
    slopes      {module: {of, heads}}     attention blocks whose biases by head are those of `heads` among `of` heads
    pairs       {module: [number, ...]}   attention blocks with a table of the sines and cosines of all pairs, and the
                                          pairs that are left
    uneven_keys true|false                whether some attention block has other key-value heads than the config
    head_dim    number                    dimensions of a head, if the stock class computes another number
    experts     {router: {...}}           FFN blocks that are mixtures of experts, as `add_experts` takes them
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, Cache, PreTrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.pytorch_utils import Conv1D

from .cook_experts import add_experts

MODEL_TYPE = "cook_ragged"
OWN_FIELDS = ("stock_type", "stock_class", "structure")
DRAWS = PreTrainedModel.init_weights
"""The method that transformers replaces while models are built whose weights are read afterwards."""
PARTS = "parts"
"""Attribute of a module in `spread` or `gathered`: the list of its parts."""
SLOPES = "slopes"
"""Attribute of a module in `slopes`."""
PAIRS = "pairs"
"""Attribute of a module in `pairs`."""
BIASES = ("alibi", "position_bias", "attention_mask")
"""Arguments of attention blocks that can have a part per head."""


def _spread(module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
    pieces = output.flatten(2).split([own for own, _ in module.parts], -1)
    filled = [nn.functional.pad(x, (0, wide - own)) for x, (own, wide) in zip(pieces, module.parts, strict=True)]
    flat = torch.cat(filled, -1)
    return flat if output.ndim == 3 else flat.unflatten(-1, (-1, output.shape[-1]))


def _gathered(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    pieces = inputs[0].split([wide for _, wide in module.parts], -1)
    own = torch.cat([x[..., :own] for x, (own, _) in zip(pieces, module.parts, strict=True)], -1)
    return (own, *inputs[1:])


def _own_slopes(module: Any, inputs: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    of, heads = module.slopes["of"], module.slopes["heads"]

    def own(bias: Any) -> Any:
        if isinstance(bias, torch.Tensor) and bias.ndim == 3:  # (batch × heads, …) or (heads, …)
            return bias.unflatten(0, (-1, of))[:, heads].flatten(0, 1)
        return bias[:, heads] if isinstance(bias, torch.Tensor) and bias.shape[1] == of else bias

    return inputs, {name: own(value) if name in BIASES else value for name, value in named.items()}


def _of_own_pairs(module: Any, positions: torch.Tensor) -> torch.Tensor:
    table = type(module)._get_embed_positions(module, positions)  # all sines, then all cosines
    sines, cosines = table.chunk(2, -1)
    return torch.cat([sines[..., module.pairs], cosines[..., module.pairs]], -1)


class Absent(nn.Module):
    """Replaces a removed block. Its output is zero, or the remaining bias of the block's last matrix product.

    A removed attention block still counts positions in the cache, from which the model derives its positions.
    """

    def __init__(self, kind: str, layer: int | None):
        super().__init__()
        self.kind, self.layer, self.bias_path = kind, layer, ""

    def keep_bias(self, path: str, bias: nn.Parameter) -> None:
        """Registers `bias` as the parameter `path`, relative to this module."""
        *parents, name = path.split(".")
        owner: nn.Module = self
        for parent in parents:
            owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        owner.register_parameter(name, bias)
        self.bias_path = path

    def forward(self, *inputs: Any, **named: Any) -> Any:
        hidden = inputs[0] if inputs else named["hidden_states"]
        # A zero without axes is added to all positions at no cost.
        value = self.get_parameter(self.bias_path) if self.bias_path else hidden.new_zeros(())
        if self.kind.startswith("added"):
            value = value + inputs[1]
        elif self.kind.startswith("full"):
            value = value + torch.zeros_like(hidden)
        if self.kind.endswith("value"):
            return value
        cache = next((x for x in (*inputs, *named.values()) if isinstance(x, Cache)), None)
        if cache is not None and self.layer is not None:
            counter = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
            cache.update(counter, counter, self.layer)
        return value, None


def reshape_modules(model: PreTrainedModel, structure: dict[str, Any]) -> None:
    """Changes a newly built stock model as described by `structure`."""
    shapes = structure["shapes"] | _tied_embeddings(model, structure["shapes"])
    for path, sizes in structure.get("rebuilt", {}).items():
        config: Any = copy.copy(model.config)
        for name, value in sizes.items():
            setattr(config, name, value)
        old: Any = model.get_submodule(path)
        number = [old.layer_idx] if hasattr(old, "layer_idx") else []
        model.set_submodule(path, type(old)(config, *number))
        _draw(model, path)
    for path, shape in shapes.items():
        name, _, kind = path.rpartition(".")
        # The size of a bias follows from its weight, unless that was removed with its block.
        if kind == "weight" or f"{name}.weight" not in shapes:
            old = model.get_submodule(name)
            model.set_submodule(name, _of_shape(old, shape if kind == "weight" else [*shape, 1][:: _step(old)]))
            _draw(model, name)
    if any(isinstance(model.get_submodule(path.rpartition(".")[0]), nn.Embedding) for path in shapes):
        model.tie_weights()
    # Hooks, since they run before those of gates: a gate sees the heads that there are. Attention in between sees equal
    # groups, as the stock class and its cache expect: a head of zeros costs a little time and no memory in the cache.
    for path, parts in structure.get("spread", {}).items():
        setattr(model.get_submodule(path), PARTS, parts)
        model.get_submodule(path).register_forward_hook(_spread)
    for path, parts in structure.get("gathered", {}).items():
        setattr(model.get_submodule(path), PARTS, parts)
        model.get_submodule(path).register_forward_pre_hook(_gathered)
    for path, slopes in structure.get("slopes", {}).items():
        setattr(model.get_submodule(path), SLOPES, slopes)
        model.get_submodule(path).register_forward_pre_hook(_own_slopes, with_kwargs=True)
    for path, pairs in structure.get("pairs", {}).items():
        block: Any = model.get_submodule(path)
        setattr(block, PAIRS, pairs)
        block._get_embed_positions = types.MethodType(_of_own_pairs, block)
    for path, values in structure["attributes"].items():
        module = model.get_submodule(path)
        own = {name.removeprefix("config."): value for name, value in values.items() if name.startswith("config.")}
        if own:
            module.config = copy.copy(module.config)
            for name, value in own.items():
                setattr(module.config, name, value)
        for name, value in values.items():
            if not name.startswith("config."):
                setattr(module, name, value)
    for path, kind in structure["absent"].items():
        old_module = model.get_submodule(path)
        absent = Absent(kind, getattr(old_module, "layer_idx", None))
        if path in structure["constant"]:
            bias = structure["constant"][path]
            absent.keep_bias(bias.removeprefix(f"{path}."), model.get_parameter(bias))
        model.set_submodule(path, absent)
    for path in structure["identity"]:
        model.set_submodule(path, nn.Identity())
    add_experts(model, structure.get("experts", {}))


def _draw(model: PreTrainedModel, path: str) -> None:
    """Draws the weights of a module, unless transformers builds the model without any (`no_init_weights`)."""
    if PreTrainedModel.init_weights is DRAWS:
        model._init_weights(model.get_submodule(path))


def _tied_embeddings(model: PreTrainedModel, shapes: dict[str, Any]) -> dict[str, Any]:
    """The shapes of embeddings that are tied to a weight in `shapes`, which has the name of the output projection."""
    tied = model.all_tied_weights_keys
    return {tied[path]: shape for path, shape in shapes.items() if path in tied and tied[path] not in shapes}


def _step(product: nn.Module) -> int:
    """1 if the outputs of a product are the first dimension of its weight, -1 if they are the last."""
    return -1 if isinstance(product, Conv1D) else 1


def _of_shape(old: nn.Module, shape: list[int]) -> nn.Module:
    # A new module instead of a new weight in the old one, so that ZeRO-3, which hooks the construction, sees it too.
    made: Any = type(old)
    if isinstance(old, nn.Linear):
        return nn.Linear(shape[1], shape[0], bias=old.bias is not None)
    if isinstance(old, nn.LayerNorm):
        norm: nn.Module = made(shape[0], eps=old.eps, bias=old.bias is not None)
        return norm
    if made.__name__.endswith("Norm"):
        size = shape[0] if len(shape) == 1 else tuple(shape)  # Cohere's norms per head
        norm = made(size, eps=getattr(old, "variance_epsilon", None) or old.eps)
        return norm
    if isinstance(old, nn.Embedding):
        table: Any = old
        if made is nn.Embedding:
            table = made(shape[0], shape[1], padding_idx=old.padding_idx)
        elif hasattr(table, "scalar_embed_scale"):  # Gemma's embeddings are multiplied by the root of the hidden size
            scale = table.scalar_embed_scale * (shape[1] / old.embedding_dim) ** 0.5
            table = made(shape[0], shape[1], old.padding_idx, embed_scale=scale)
        else:  # OPT's positions begin at an offset
            table = made(shape[0] - table.offset, shape[1])
        return table
    assert isinstance(old, Conv1D), f"a weight of {type(old).__name__} has another shape"
    return Conv1D(shape[1], shape[0])


@functools.cache
def _stock_config(stock_type: str) -> Any:
    """The stock config class, with a `head_dim` that can be set: Falcon's computes it and takes no other."""
    stock: Any = CONFIG_MAPPING[stock_type]
    is_computed = isinstance(inspect.getattr_static(stock, "head_dim", None), property)
    return type(stock.__name__, (stock,), {"head_dim": None}) if is_computed else stock


@functools.cache
def config_class(stock_type: str) -> type[PreTrainedConfig]:
    """Returns a config class derived from the stock one of that type. `OWN_FIELDS` are its additional fields."""

    def __reduce__(self: PreTrainedConfig) -> tuple[Any, ...]:
        return _new_config, (stock_type,), self.__dict__

    stock: Any = _stock_config(stock_type)
    # Phi-3's own check wants as many factors of rotary positions as a head has pairs by the stock sizes.
    own_checks = {"validate_rope": PreTrainedConfig.validate_rope}

    def validate(self: PreTrainedConfig) -> None:
        for check in getattr(stock, "__class_validators__", ()):
            own_checks.get(check.__name__, check)(self)

    body = {"model_type": MODEL_TYPE, "__module__": __name__, "__reduce__": __reduce__, "validate": validate}
    made: Any = type("RaggedConfig", (stock,), body | own_checks)
    made.register_for_auto_class()  # a model that was made in memory is saved with this file
    return made


def model_class(config: PreTrainedConfig, factory: type[RaggedModel] | None = None) -> type[PreTrainedModel]:
    """Returns a class derived from the stock one for `config`, which reshapes itself after construction.

    Args:
        config: A config of `config_class`.
        factory: The class that `auto_map` names for it. None: the class for `config.stock_class`.
    """
    factory = factory or RaggedModel
    return _model_class(config.stock_type, factory.auto_class or config.stock_class, factory.__name__)


@functools.cache
def _model_class(stock_type: str, auto_class: str, name: str) -> type[PreTrainedModel]:
    stock = getattr(transformers, auto_class)._model_mapping[CONFIG_MAPPING[stock_type]]

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *inputs: Any, **named: Any) -> None:
        with _as_stock(config):
            stock.__init__(self, config, *inputs, **named)
        # transformers took it from the name of this class.
        self.loss_type = _loss_type(stock.__name__)  # type: ignore[assignment]
        structure = config.structure
        if auto_class == "AutoModel":  # paths are relative to the base model, without the head of `stock_class`
            structure = _without_prefix(structure, f"{stock.base_model_prefix}.")
        reshape_modules(self, structure)

    def init_continuous_batching(self: PreTrainedModel, *inputs: Any, **named: Any) -> Any:
        if self.config.structure.get("uneven_keys"):
            raise ValueError(
                "continuous batching keeps a cache of one size for all layers, and the layers of this model have "
                "different numbers of key-value heads: use generate()"
            )
        return stock.init_continuous_batching(self, *inputs, **named)

    def save_pretrained(self: PreTrainedModel, *inputs: Any, **named: Any) -> Any:
        self.config.auto_map = auto_map(self.config, __name__.rpartition(".")[2])
        return stock.save_pretrained(self, *inputs, **named)

    def __reduce__(self: PreTrainedModel) -> tuple[Any, ...]:
        return _new_model, (stock_type, auto_class, name), self.__dict__

    # The name and module are those in `auto_map`, so that a model that is saved again can be loaded.
    body = {"config_class": config_class(stock_type), "__module__": __name__}
    body |= {"__init__": __init__, "__reduce__": __reduce__, "save_pretrained": save_pretrained}
    if hasattr(stock, "init_continuous_batching"):
        body["init_continuous_batching"] = init_continuous_batching
    made: Any = type(name, (stock,), body)
    made.register_for_auto_class(auto_class)
    return made


@contextmanager
def _as_stock(config: PreTrainedConfig) -> Iterator[None]:
    """Lets a config be of its stock class, which classes with a head use to build the model inside of them."""
    own, names = type(config), config.__dict__.pop("auto_map", None)
    config.__class__ = _stock_config(config.stock_type)
    try:
        yield
    finally:
        config.__class__ = own
        if names is not None:
            config.auto_map = names


def _loss_type(name: str) -> str | None:
    """The loss that transformers takes for a class of this name."""
    return next((each for each in (name, *re.findall("|".join(LOSS_MAPPING), name)) if each in LOSS_MAPPING), None)


def auto_map(config: PreTrainedConfig, module: str) -> dict[str, str]:
    """The classes in this file by the auto classes of transformers that load them.

    Args:
        config: A config of `config_class`.
        module: The file's name in the model's folder, without its ending.
    """
    names = {"AutoConfig": f"{module}.{RaggedConfig.__name__}"}
    for factory in FACTORIES:
        name = factory.auto_class or config.stock_class
        if CONFIG_MAPPING[config.stock_type] in getattr(transformers, name)._model_mapping:
            names.setdefault(name, f"{module}.{factory.__name__}")
    return names


def _without_prefix(structure: dict[str, Any], prefix: str) -> dict[str, Any]:
    """Returns `structure` with all paths relative to the module `prefix`."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name.removeprefix(prefix): short(part) for name, part in value.items()}
        if isinstance(value, list):
            return [short(part) for part in value]
        return value.removeprefix(prefix) if isinstance(value, str) else value

    return short(structure)


def _new_config(stock_type: str) -> PreTrainedConfig:
    made = config_class(stock_type)
    return made.__new__(made)


def _new_model(stock_type: str, auto_class: str, name: str) -> PreTrainedModel:
    made = _model_class(stock_type, auto_class, name)
    return made.__new__(made)


class RaggedConfig(PreTrainedConfig):
    """The config class that `auto_map` names. Creates configs that derive from the stock one."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return config_class(config_dict["stock_type"]).from_dict(config_dict, **kwargs)


class RaggedModel(PreTrainedModel):
    """The model class that `auto_map` names. Creates models of a class that derives from the stock one."""

    config_class = RaggedConfig
    auto_class: str | None = None
    """The transformers auto class that loads it. None: the config's `stock_class`."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Any, *inputs: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        config = RaggedConfig.from_pretrained(folder) if config is None else config
        return model_class(config, cls).from_pretrained(folder, *inputs, config=config, **kwargs)

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return model_class(config, cls)._from_config(config, **kwargs)


class RaggedBase(RaggedModel):
    """The model without a head."""

    auto_class = "AutoModel"


class RaggedClassifier(RaggedModel):
    """The model with a classification head for texts, newly initialised if the folder has none."""

    auto_class = "AutoModelForSequenceClassification"


FACTORIES = (RaggedModel, RaggedBase, RaggedClassifier)
