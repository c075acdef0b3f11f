"""A first table for a family that cook does not know, guessed from a tiny random model of it.

The model's config is copied with small sizes. Which module feeds which follows from the tensors of one forward pass,
the names of sizes from what changes when a size changes. Names decide only which product makes queries, keys or values.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.pytorch_utils import Conv1D

from cook.base.errors import UserError, library_errors
from cook.families import stock_models
from cook.families.head_dims import head_dims
from cook.families.layout import AbsentKind, Attention, ConfigNames, Family, FeedForward
from cook.families.rotary import turned_dims
from cook.families.stock_models import config_object, plain
from cook.families.stock_space import head_dim_of, heads_of
from cook.models import ragged

CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM")
STANDARD = {"layers": "num_hidden_layers", "heads": "num_attention_heads", "hidden": "hidden_size"}
TINY = {"layers": 2, "heads": 8, "hidden": 64, "kv_heads": 4, "head_dim": 16, "ffn": 20, "vocab": 61}
OTHERS = {"max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "pad_token_id": 0, "bos_token_id": 1}
OTHERS |= {"eos_token_id": 2, "num_labels": 2, "rotary_dim": 4}
QUERY, KEY, VALUE = (
    rf"(^|_)({one}|{long}|w{one})(_?(proj|lin))?$" for one, long in (("q", "query"), ("k", "key"), ("v", "value"))
)
FUSED = r"qkv|c_attn|query_key_value|w_?pack|in_proj"
GATED = r"gate|w1$|wi_0"
IDS = torch.randint(3, TINY["vocab"], (2, 9), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True, kw_only=True)
class Guess:
    """A tiny model's config, and the tables that may describe its family, the likeliest first."""

    config: dict[str, Any]
    tables: tuple[Family, ...]


def guess(config: Mapping[str, Any]) -> Guess:
    """Guesses the table of a model's family.

    Args:
        config: The model's config.json.

    Raises:
        UserError: transformers has no such model, or its layers are not made of attention and FFN blocks.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(
            f"transformers has no models of type {model_type!r}",
            remedy="update transformers; models that run code of their own folder cannot be pruned",
        )
    auto_class = next(
        (name for name in CLASSES if CONFIG_MAPPING[model_type] in getattr(transformers, name)._model_mapping), None
    )
    if auto_class is None:
        raise UserError(
            f"transformers has no language model of type {model_type!r}",
            wanted=" or ".join(CLASSES),
            remedy="for a model of several parts, guess that of its text part",
        )
    names = _names(config_object(config))
    family = Family(
        family=re.sub(r"(Config|Text)+$", "", CONFIG_MAPPING[model_type].__name__),
        model_types=frozenset({model_type}),
        names=names,
        auto_class=auto_class,
    )
    problem: UserError | None = None
    for has_head_dim in (True, False):  # some classes read the size of a head and do not keep to it
        tiny, names = _tiny(family, config, has_head_dim)
        named = replace(family, names=names)
        model = drawn(named, tiny)
        try:
            trace = _Trace(model)
        except UserError as error:
            problem = error
        else:
            tables = _tables(named, model, trace)
            return Guess(config=tiny, tables=tuple(_with_head_dims(table, tiny, model) for table in tables))
    assert problem is not None
    raise problem


def _names(made: Any) -> ConfigNames:
    """The names of sizes that every config has."""
    known = {name: made.attribute_map.get(standard, standard) for name, standard in STANDARD.items()}
    missing = [STANDARD[name] for name, own in known.items() if not isinstance(getattr(made, own, None), int)]
    if missing:
        raise UserError(
            f"the config lacks {', '.join(missing)}",
            wanted="a model whose layers are made of attention and FFN blocks",
            remedy="for a model of several parts, guess that of its text part",
        )
    return ConfigNames(**known)


def _tiny(family: Family, config: Mapping[str, Any], has_head_dim: bool) -> tuple[dict[str, Any], ConfigNames]:
    """The config with small sizes, and the names of the sizes that it has."""
    made = config_object(config)
    fields, names = plain(made), family.names
    before = getattr(made, names.layers)
    per_layer = tuple(n for n, value in fields.items() if isinstance(value, list | tuple) and len(value) == before > 1)
    small = fields | {getattr(names, name): TINY[name] for name in STANDARD} | {"vocab_size": TINY["vocab"]}
    small |= {name: value for name, value in OTHERS.items() if name in fields}
    small |= {name: [fields[name][0], fields[name][-1]] for name in per_layer}
    names = replace(names, per_layer=tuple(dict.fromkeys((*ConfigNames().per_layer, *per_layer))))
    keys = next((name for name in vars(made) if re.search(r"(key_value|kv)_heads$", name)), None)
    small |= {keys: TINY["kv_heads"]} if keys else {}
    small |= {"head_dim": TINY["hidden"] // TINY["heads"]} if "head_dim" in fields else {}
    if hasattr(made, "sliding_window") and made.sliding_window:
        small["sliding_window"] = 5
    try:
        plain_shapes = _shapes(family, small)
    except UserError:  # factors that fit the size of the heads
        small["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
        plain_shapes = _shapes(family, small)
    if keys and _shapes(family, small | {keys: TINY["heads"]}) == plain_shapes:
        keys = None
    wide = small | {"head_dim": TINY["head_dim"]}
    narrow = small | {"head_dim": TINY["hidden"] // TINY["heads"]}
    own_dim = has_head_dim and _shapes(family, wide, strict=False) not in ({}, _shapes(family, narrow, strict=False))
    small = wide if own_dim else small
    inner = None
    for name in vars(made):
        if re.search(r"inter|inner|ffn|d_ff|hidden_dim$", name) and name not in per_layer:
            changed = small | {name: TINY["ffn"]}
            other = _shapes(family, small | {name: 2 * TINY["ffn"]}, strict=False)
            if other and other != _shapes(family, changed, strict=False):
                inner, small = name, changed
                break
    return small, replace(names, kv_heads=keys, head_dim="head_dim" if own_dim else None, ffn=inner)


def _shapes(family: Family, config: Mapping[str, Any], *, strict: bool = True) -> dict[str, tuple[int, ...]]:
    try:
        made = replace(family, names=replace(family.names, kv_heads=None, ffn=None))
        return stock_models.weight_shapes(stock_models.skeleton(made, config))
    except (UserError, ValueError):
        if strict:
            raise
        return {}


def drawn(family: Family, config: Mapping[str, Any]) -> torch.nn.Module:
    """A model of which every weight matters."""
    model = stock_models.build(family, config).eval()
    generator = torch.Generator().manual_seed(0)
    for path, weight in model.named_parameters():
        drawn = 0.3 * torch.randn(weight.shape, generator=generator)
        weight.data = drawn + (1.0 if weight.ndim == 1 and path.endswith("weight") else 0.0)
    return model


class _Trace:
    """The tensors that every module takes and returns in one forward pass, in the order of the calls."""

    def __init__(self, model: torch.nn.Module):
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, Any] = {}
        self.others: dict[str, list[torch.Tensor]] = {}
        self.named: dict[str, list[str]] = {}
        handles = [
            module.register_forward_hook(self._hook(path), with_kwargs=True) for path, module in model.named_modules()
        ]
        with (
            torch.no_grad(),
            library_errors(
                "a tiny model of this config does not run",
                remedy="write the table by hand: documentation, Add a family",
            ),
        ):
            model(input_ids=IDS)
        for handle in handles:
            handle.remove()

    def _hook(self, path: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            given = [x.clone() for x in (*inputs, *named.values()) if isinstance(x, torch.Tensor)]
            if given:
                self.inputs[path], *self.others[path] = given
                self.outputs[path] = output.clone() if isinstance(output, torch.Tensor) else output
                self.named[path] = [name for name, value in named.items() if value is not None]

        return hook

    def result(self, path: str) -> Any:
        output = self.outputs.get(path)
        return output[0] if isinstance(output, tuple) else output

    def kind(self, block: str, out: str) -> AbsentKind:
        """What a block returns whose last product is `out`."""
        last, others = self.result(out), self.others[block]
        same = [x for x in others if x.shape == last.shape and torch.allclose(self.result(block), last + x)]
        if isinstance(self.outputs[block], tuple):
            return "added pair" if same else "pair"
        return "added value" if same else "value"

    def feeds(self, first: str, second: str) -> bool:
        """Whether the output of the first module is the input of the second."""
        a, b = self.result(first), self.inputs.get(second)
        return isinstance(a, torch.Tensor) and b is not None and a.shape == b.shape and torch.equal(a, b)


def _tables(family: Family, model: torch.nn.Module, trace: _Trace) -> tuple[Family, ...]:
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == TINY["layers"] and _products(module[0])
    ]
    if not lists:
        raise UserError("the model has no list of layers", got=type(model).__name__)
    layer = f"{lists[0]}.1"  # the first may differ, as without a norm before it
    products = {p.removeprefix(f"{layer}."): None for p in trace.outputs if p.startswith(f"{layer}.")}
    called = [path for path in products if path in _products(model.get_submodule(layer))]
    inside = [path for path in called if re.search("att", path.split(".")[0])]
    attention = _attention(model, layer, trace, inside)
    ffn = _feed_forward(model, layer, trace, [path for path in called if path not in inside])
    first = {"attention": attention.q, "ffn": ffn.ins[0]}
    norms = [
        path.removeprefix(f"{layer}.")
        for path in trace.outputs
        if path.startswith(f"{layer}.") and "Norm" in type(model.get_submodule(path)).__name__
    ]
    norms = [n for n in norms if not any(n.startswith(f"{m}.") for m in (*attention.modules, *ffn.modules))]
    before = {
        kind: [n for n in norms if trace.feeds(f"{layer}.{n}", f"{layer}.{path}")] for kind, path in first.items()
    }
    stages = [trace.inputs[f"{layer}.{n}"] for n in norms] + [trace.result(layer)]
    last = {"attention": attention.out, "ffn": ffn.out}
    for kind, found in before.items():  # the output of a norm on the stream is also what the block's is added to
        added = trace.result(f"{layer}.{last[kind]}")
        found[:] = [n for n in found if not _is_any(trace.result(f"{layer}.{n}") + added, stages)]
    after = {
        kind: tuple(n for n in norms if trace.feeds(f"{layer}.{table.out}", f"{layer}.{n}"))
        for kind, table in (("attention", attention), ("ffn", ffn))
    }
    shared = [n for n in before["attention"] if n in before["ffn"]]
    own = {kind: tuple(n for n in found if n not in shared) for kind, found in before.items()}
    placed = {*before["attention"], *before["ffn"], *after["attention"], *after["ffn"]}
    family = replace(
        family,
        layers=lists[0],
        attention=replace(attention, norms_before=own["attention"], norms_after=after["attention"]),
        ffn=replace(ffn, norms_before=own["ffn"], norms_after=after["ffn"]),
        norms_shared=tuple(shared),
        embedding_times_root=_last_norm(model, lists[0]),
        first_layer_stays=_names_in(model, f"{lists[0]}.0") != _names_in(model, layer),
        empty_layer_is_identity=placed.issuperset(norms),
    )
    if attention.q != attention.k:
        return (family,)
    inner = trace.inputs[f"{layer}.{attention.out}"].shape[-1]
    if family.names.kv_heads is None and trace.result(f"{layer}.{attention.q}").shape[-1] < 3 * inner:
        family = replace(family, names=replace(family.names, kv_heads=1))
    return family, replace(family, attention=replace(family.attention, interleaved=True))


def _with_head_dims(family: Family, config: Mapping[str, Any], model: torch.nn.Module) -> Family:
    """The table, without the size of heads where it must stay."""
    made, layers = config_object(config), [f"{family.layers}.{number}" for number in range(TINY["layers"])]
    heads = {layer: heads_of(family, head_dim_of(family, made), model, layer) for layer in layers}
    found = {layer: own for layer, own in heads.items() if own is not None}
    turned = turned_dims(made, model)
    if turned is None or head_dims(family, made, model, stock_models.weight_shapes(model), found) is None:
        return replace(family, attention=replace(family.attention, head_dim="", scaling=Attention().scaling))
    if family.names.head_dim:  # the class computes what it turns from the config's size of a head
        return family
    block = next(iter(family.attention.modules))
    remembered = _attribute(model.get_submodule(f"{layers[0]}.{block}"), block, "rot", turned.number)
    return replace(family, attention=replace(family.attention, turned=remembered))


def _names_in(model: torch.nn.Module, layer: str) -> list[str]:
    return [name for name, _ in model.get_submodule(layer).named_parameters()]


def _last_norm(model: torch.nn.Module, layers: str) -> str:
    """The norm after the layers, if embeddings are multiplied by the root of the hidden size."""
    has_root = hasattr(model.get_input_embeddings(), "scalar_embed_scale")  # type: ignore[operator]
    norms = [p for p, module in model.named_modules() if "Norm" in type(module).__name__ and f"{layers}." not in p]
    return norms[-1] if has_root and norms else ""


def _is_any(value: torch.Tensor, others: list[torch.Tensor]) -> bool:
    return any(x.shape == value.shape and torch.allclose(x, value) for x in others)


def _products(layer: torch.nn.Module) -> list[str]:
    return [path for path, module in layer.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]


def _outputs(product: torch.nn.Module) -> int:
    weight = product.get_parameter("weight")
    return int(weight.shape[1 if isinstance(product, Conv1D) else 0])


def _attention(model: torch.nn.Module, layer: str, trace: _Trace, called: list[str]) -> Attention:
    last = {path: path.rpartition(".")[2].lower() for path in called}
    found = [[path for path in called if re.search(rule, last[path])] for rule in (QUERY, KEY, VALUE)]
    fused = [path for path in called if re.search(FUSED, last[path])]
    if len(called) == 4 and all(len(paths) == 1 for paths in found):
        q, k, v = (paths[0] for paths in found)
    elif len(called) == 2 and len(fused) == 1:
        q = k = v = fused[0]
    else:
        raise UserError(
            "the attention block of this model cannot be put into a table",
            wanted="products of queries, keys and values, or one of all, and an output product",
            got=", ".join(called) or "no products in a module with `att` in its name",
        )
    out = called[-1]
    block = q.rpartition(".")[0]
    modules = _modules(trace, layer, block, out)
    norms = {
        path.removeprefix(f"{layer}."): module
        for path, module in model.named_modules()
        if path.startswith(f"{layer}.{block}.")
        and "Norm" in type(module).__name__
        and "weight" in dict(module.named_parameters())
    }
    head_dim = trace.inputs[f"{layer}.{out}"].shape[-1] // TINY["heads"]
    own = [path for path, norm in norms.items() if norm.get_parameter("weight").numel() > head_dim]
    return Attention(
        modules=modules,
        q=q,
        k=k,
        v=v,
        out=out,
        q_norm=next((path for path in own if re.search("q", path.rpartition(".")[2])), ""),
        k_norm=next((path for path in own if re.search("k", path.rpartition(".")[2])), ""),
        slopes=any(name in ragged.BIASES[:2] for name in trace.named.get(f"{layer}.{block}", ())),
        remembers=_remembers(model.get_submodule(f"{layer}.{block}"), block, head_dim),
        head_dim=_attribute(model.get_submodule(f"{layer}.{block}"), block, r"head_(dim|size)$", head_dim),
        scaling=_attribute(model.get_submodule(f"{layer}.{block}"), block, "scal|norm_factor", head_dim**-0.5),
    )


def _attribute(module: torch.nn.Module, path: str, rule: str, value: float) -> str:
    """The path of a number of the module with such a name and this value; empty if there is none."""
    numbers = {name: own for name, own in vars(module).items() if type(own) in (int, float) and re.search(rule, name)}
    return next((f"{path}.{name}" for name, own in numbers.items() if math.isclose(own, value)), "")


def _modules(trace: _Trace, layer: str, block: str, out: str) -> dict[str, AbsentKind]:
    paths = [block] if block and out.startswith(f"{block}.") else [path for path in (block, out) if path]
    return {path: trace.kind(f"{layer}.{path}", f"{layer}.{out}") for path in paths}


def _remembers(module: torch.nn.Module, path: str, head_dim: int) -> dict[str, Any]:
    """Numbers of the module that its forward pass may read."""
    sizes = {TINY["heads"]: "heads", TINY["kv_heads"]: "kv_heads", TINY["heads"] // TINY["kv_heads"]: "heads_per_kv"}
    width = {"split_size": "width", "all_head_size": "width", "inner_dim": "width"}
    text = inspect.getsource(type(module))
    text = text[text.find("def forward") :] + "".join(re.findall(r"def _\w+.*?(?=\n    def |\Z)", text, re.DOTALL))
    found: dict[str, Any] = {}
    for name, value in vars(module).items():
        if type(value) is not int or not re.search(rf"self\.{name}\b", text) and name != "num_key_value_groups":
            continue
        if re.search(r"heads$|(^|_)n_head$", name) and value in sizes:
            found[f"{path}.{name}"] = sizes[value]
        elif "groups" in name:
            found[f"{path}.{name}"] = "heads_per_kv"
        elif name in width and value == TINY["heads"] * head_dim:
            found[f"{path}.{name}"] = width[name]
    names = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads"}
    return found | {f"{path}.config.{n}": size for n, size in names.items() if f"self.config.{n}" in text}


def _feed_forward(model: torch.nn.Module, layer: str, trace: _Trace, called: list[str]) -> FeedForward:
    if len(called) not in (2, 3):
        raise UserError(
            "the FFN block of this model cannot be put into a table",
            wanted="one or two products to the inner features, and one back",
            got=", ".join(called) or "no products",
            remedy="write the table of a mixture of experts by hand: documentation, Add a family",
        )
    *ins, out = called
    ins.sort(key=lambda path: not re.search(GATED, path))
    inner = trace.inputs[f"{layer}.{out}"].shape[-1]
    if len(ins) == 1 and _outputs(model.get_submodule(f"{layer}.{ins[0]}")) == 2 * inner:
        ins = [ins[0], ins[0]]
    parents = {path.rpartition(".")[0] for path in called}
    modules = _modules(trace, layer, ins[0].rpartition(".")[0], out)
    if parents == {""}:
        modules = dict.fromkeys(called, "value")
    return FeedForward(modules=modules, ins=tuple(ins), out=out)


def draft(family: Family) -> str:
    """The table as Python, without what every table has."""
    return _code(family)


def _code(value: Any, indent: str = "") -> str:
    if not dataclasses.is_dataclass(value):
        return f"frozenset({{{', '.join(map(repr, sorted(value)))}}})" if isinstance(value, frozenset) else repr(value)
    lines = []
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if own != default:
            lines.append(f"{indent}    {field.name}={_code(own, indent + '    ')},")
    return "\n".join([f"{type(value).__name__}(", *lines, f"{indent})"]) if lines else f"{type(value).__name__}()"
