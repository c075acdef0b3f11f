"""CPM-Ant's other formats: CPM-Live's JSON, and the folders of the stock Hugging Face class `CpmAntForCausalLM`.

Both are conversions of names and values. CPM-Live's tensors have the names of cook's model; it divides by the model's
own sizes, where cook's model divides by those before pruning. The stock class folds the run-time divisions into the
weights: W / sqrt(dim_in), embeddings / sqrt(dim_model), and stores prompts after the tokens in one table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors, in_parts
from cook.models.cpm_ant import CpmAntConfig

NATIVE_FIELDS = (
    *("vocab_size", "dim_model", "dim_ff", "num_layers", "num_heads", "dim_head", "dropout_p"),
    *("position_bias_num_buckets", "position_bias_max_distance", "eps", "half"),
    *("prompt_types", "prompt_length", "segment_types", "mask_modules"),
)
STOCK_NAMES = {"dim_model": "hidden_size", "num_heads": "num_attention_heads", "num_layers": "num_hidden_layers"}
SHARED_FIELDS = tuple(name for name in NATIVE_FIELDS if name not in ("half", "mask_modules"))
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
STOCK_PREFIX = "cpmant."
LINEAR = re.compile(
    r"encoder\.layers\.(\d+)\.(self_att\.self_attention\.(project_[qkv]|attention_out)|ffn\.ffn\.(w_in\.w_[01]|w_out))"
    r"\.weight"
)
OLDER = re.compile(r"encoder\.layers\.\d+\.ffn\.ffn\.w_in\.w\.weight")
"""The input product of the older FFN."""
UNCHANGED = re.compile(
    r"position_bias\.relative_attention_bias|encoder\.output_layernorm\.weight|encoder\.layers\.(\d+)\."
    r"(self_att\.layernorm_before_attention|ffn\.layernorm_before_ffn)\.weight"
)


def native_config(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Reads CPM-Live's JSON as all fields of its configuration; absent ones have the defaults of CPM-Ant's 10B model.

    Raises:
        UserError: an unknown field, or values that contradict each other.
    """
    unknown = sorted(set(fields) - set(NATIVE_FIELDS))
    if unknown:
        raise UserError(
            "the model's JSON has fields that CPM-Live's configuration does not have",
            wanted=", ".join(NATIVE_FIELDS),
            got=", ".join(unknown),
            remedy="remove them; if this is the config.json of a Hugging Face model, name its folder, and add the "
            "model_type that it lacks",
        )
    config = checked_config(fields)
    return {name: getattr(config, name) for name in NATIVE_FIELDS}


def to_native_config(config: CpmAntConfig) -> dict[str, Any]:
    """CPM-Live's JSON of a model, with every field; a UserError if its layers differ: the format cannot express it."""
    _refuse_ragged(config, "CPM-Live's configuration")
    return {name: getattr(config, name) for name in NATIVE_FIELDS}


def from_stock(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Converts config.json and tensors of a stock Hugging Face CpmAnt model to cook's model.

    Returns:
        Fields for `CpmAntConfig`, and tensors under CPM-Live's names, computed on access.

    Raises:
        UserError: another model's config, or tensors that are missing, unexpected, or have another shape.
    """
    if config.get("model_type") != "cpmant":
        raise UserError("not a stock CpmAnt model", wanted="model_type cpmant", got=config.get("model_type"))
    stock_names = {name: STOCK_NAMES.get(name, name) for name in SHARED_FIELDS}
    fields = {name: config[stock] for name, stock in stock_names.items() if stock in config}
    fields |= {name: config[name] for name in TOKEN_IDS if config.get(name) is not None}
    checked = checked_config(fields)
    makers = {name: _native_maker(name, checked, tensors) for name in _native_names(checked)}
    wanted = {f"{STOCK_PREFIX}{name}" for name in makers if not name.startswith("prompt_embedding")}
    missing, extra = sorted(wanted - set(tensors)), sorted(set(tensors) - wanted - {"lm_head.weight"})
    if missing or extra:
        raise UserError(
            "the tensors do not fit the config of a stock CpmAnt model",
            wanted=f"{len(wanted)} tensors, missing: {_some(missing)}",
            got=f"{len(tensors)} tensors, unexpected: {_some(extra)}",
        )
    return fields, LazyTensors(makers)


def to_stock(config: CpmAntConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Converts cook's model to the config and tensors of the stock Hugging Face class.

    Returns:
        The fields of a stock config.json, and the stock class's tensors, computed on access. They include the output
        projection, which is a copy of the token embedding.

    Raises:
        UserError: the model is ragged, lacks blocks, or has the older FFN, which the stock class does not support.
    """
    _refuse_ragged(config, "the stock CpmAnt class")
    removed = sum(not config.has_attention(i) + (not config.has_ffn(i)) for i in range(config.num_layers))
    if removed or not config.gated_ffn:
        raise UserError(
            "the stock CpmAnt class cannot load this model",
            wanted="every block present, gated FFNs",
            got=f"{removed} blocks removed, {'gated' if config.gated_ffn else 'ungated'} FFNs",
            remedy="export it as a folder with a modeling file",
        )
    fields = {STOCK_NAMES.get(name, name): getattr(config, name) for name in SHARED_FIELDS}
    fields |= {name: getattr(config, name) for name in TOKEN_IDS if getattr(config, name) is not None}
    fields |= {"model_type": "cpmant", "architectures": ["CpmAntForCausalLM"], "tie_word_embeddings": False}
    root, tensors = math.sqrt(config.dim_model), by_own_sizes(config, tensors)
    names = [name for name in _native_names(config) if not name.startswith("prompt_embedding")]
    makers = {STOCK_PREFIX + name: _stock_maker(name, root, tensors) for name in names}
    makers["lm_head.weight"] = lambda: _scaled(tensors["input_embedding.weight"], 1 / root)
    return fields, LazyTensors(makers)


def by_own_sizes(config: CpmAntConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights, computed on access, of the same model when it divides by the roots of its own sizes."""
    if config.unpruned is None:
        return tensors
    return LazyTensors({name: partial(_by_own_sizes, name, config, tensors) for name in tensors})


def _by_own_sizes(name: str, config: CpmAntConfig, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor, before = tensors[name], config.sizes_before()
    factor, found = 1.0, LINEAR.fullmatch(name)
    if name.endswith("attention_out.weight"):
        assert found
        factor = tensor.shape[1] / (before["heads"][int(found[1])] * before["dim_head"])
    elif name.endswith("w_out.weight"):
        assert found
        factor = tensor.shape[1] / before["dim_ff"][int(found[1])]
    elif found or OLDER.fullmatch(name) or name.endswith("_embedding.weight"):
        factor = config.dim_model / before["dim_model"]
    if name.endswith("project_q.weight"):
        factor *= config.dim_head / before["dim_head"]
    return tensor if factor == 1 else in_parts(lambda part: part.double() * math.sqrt(factor), tensor)


def checked_config(fields: Mapping[str, Any]) -> CpmAntConfig:
    """The config object of these fields; raises a UserError if they contradict each other."""
    try:
        return CpmAntConfig(**fields)
    except (TypeError, ValueError) as error:
        raise UserError(f"the model's config contradicts itself: {error}") from None


def _refuse_ragged(config: CpmAntConfig, target: str) -> None:
    layers = range(config.num_layers)
    heads = any(config.has_attention(i) and len(config.heads_of(i)) < config.num_heads for i in layers)
    dims = any(config.has_ffn(i) and config.dim_ff_of(i) != config.dim_ff for i in layers)
    if heads or dims:
        raise UserError(
            f"{target} cannot load this model: it needs equal numbers of heads and dims in all blocks",
            wanted=f"{config.num_heads} heads and {config.dim_ff} dims in every block",
            got=" and ".join(["layers with different heads"] * heads + ["layers with different dims"] * dims),
            remedy="export it as a folder with a modeling file",
        )


def _native_names(config: CpmAntConfig) -> list[str]:
    """Names of all tensors of a model without removed blocks."""
    attention = ("project_q", "project_k", "project_v", "attention_out")
    layer = [
        *(f"self_att.self_attention.{name}.weight" for name in attention),
        *(f"ffn.ffn.{name}.weight" for name in ("w_in.w_0", "w_in.w_1", "w_out")),
        "self_att.layernorm_before_attention.weight",
        "ffn.layernorm_before_ffn.weight",
    ]
    names = [f"encoder.layers.{index}.{name}" for index in range(config.num_layers) for name in layer]
    tables = [f"{name}_embedding.weight" for name in ("prompt", "segment", "input")]
    return [*names, "encoder.output_layernorm.weight", *tables, "position_bias.relative_attention_bias"]


def _native_maker(name: str, config: CpmAntConfig, stock: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    root = math.sqrt(config.dim_model)
    if name == "input_embedding.weight":
        return lambda: _scaled(_tokens(config, stock), root)
    if name == "prompt_embedding.weight":
        return lambda: _scaled(stock[STOCK_PREFIX + "input_embedding.weight"][config.vocab_size :], root)
    if name == "segment_embedding.weight":
        return lambda: _scaled(stock[STOCK_PREFIX + name], root)
    if LINEAR.fullmatch(name):
        return lambda: _scaled_linear(stock[STOCK_PREFIX + name], 1)
    assert UNCHANGED.fullmatch(name), name
    return lambda: stock[STOCK_PREFIX + name]


def _stock_maker(name: str, root: float, native: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    if name == "input_embedding.weight":
        return lambda: _scaled(torch.cat([native[name], native["prompt_embedding.weight"]]), 1 / root)
    if name == "segment_embedding.weight":
        return lambda: _scaled(native[name], 1 / root)
    if LINEAR.fullmatch(name):
        return lambda: _scaled_linear(native[name], -1)
    assert UNCHANGED.fullmatch(name), name
    return lambda: native[name]


def _tokens(config: CpmAntConfig, stock: Mapping[str, Tensor]) -> Tensor:
    """The token rows of the stock embedding, which must equal its output projection."""
    table = stock[STOCK_PREFIX + "input_embedding.weight"]
    rows = config.vocab_size + config.prompt_types * config.prompt_length
    if len(table) != rows:
        raise UserError("the stock embedding has another size", wanted=f"{rows} rows", got=f"{len(table)} rows")
    tokens = table[: config.vocab_size]
    head = stock["lm_head.weight"] if "lm_head.weight" in stock else tokens
    if head is not tokens and not head.is_meta:
        distance = (head.float() - tokens.float()).abs().max()
        if distance > 1e-3 * tokens.float().abs().max():
            raise UserError(
                "the output projection differs from the token embedding, to which CPM-Ant ties it",
                wanted="lm_head.weight equal to the first vocab_size rows of cpmant.input_embedding.weight",
                got=f"a difference of {distance:.3g}",
            )
    return tokens


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """Multiplies in fp32, so that half precision is rounded once."""
    return in_parts(lambda part: part.float() * factor, tensor)


def _scaled_linear(weight: Tensor, sign: int) -> Tensor:
    return _scaled(weight, math.sqrt(weight.shape[1]) ** sign)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "none"
