"""Quantized weights: the linear modules of a model and its token embedding, their scales, and the rounding.

Everything that is written to a file is rounded here, and training rounds with the same scales: an export has the bits
that training has used.

Shape suffixes: N outputs of a linear module, K inputs, G groups of inputs that share a scale (1: the whole row).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers.pytorch_utils import Conv1D

from cook.base.errors import UserError, UserErrors
from cook.config.quantization import QuantizationConfig, SchemeName

FLOAT8 = torch.float8_e4m3fn
SMALLEST, LARGEST = 2.0**-24, 65504.0
"""The range of positive numbers of float16, in which GGUF files store scales."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How weights, and perhaps inputs, are rounded."""

    name: SchemeName
    bits: int
    group_size: int | None = None
    """Consecutive inputs that share a scale; None: the whole row."""
    inputs: bool = False
    """Whether inputs are rounded too, with a scale per token."""

    @property
    def is_float(self) -> bool:
        return self.name == "fp8"

    @property
    def dtype(self) -> torch.dtype:
        """torch's type of the weights."""
        return FLOAT8 if self.is_float else getattr(torch, f"int{self.bits}")

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest integer of a weight."""
        return -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1


def scheme_of(name: SchemeName, group_size: int = QuantizationConfig.group_size) -> Scheme:
    """The scheme of a name in the section `quantization`."""
    if name == "int4":
        return Scheme(name=name, bits=4, group_size=group_size)
    return Scheme(name=name, bits=8, inputs=name != "int8_weight")


EMBEDDING_SCHEME = scheme_of("int8_weight")
"""8 bits with a scale per row; ids are no numbers to round, and the inputs of a tied output projection stay as well."""


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A linear module whose weight can be quantized, or the token embedding: a row per token."""

    outputs: int
    inputs: int
    is_transposed: bool = False
    """Whether the weight is stored as [inputs, outputs], as in GPT-2."""
    divides: bool = False
    """Whether the module divides by the square root of its input size when it runs, as in CPM-Ant."""
    is_embedding: bool = False
    """Whether it is the token embedding, perhaps with output projections that are tied to it."""
    has_buffers: bool = False
    """Whether the embedding has more than its weight, as Gemma's has a factor."""

    def scheme(self, chosen: Scheme) -> Scheme:
        """How this weight is rounded where `chosen` is the scheme of the linear modules."""
        return EMBEDDING_SCHEME if self.is_embedding else chosen

    def rows(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as [outputs, inputs]."""
        return weight.t() if self.is_transposed else weight


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """A weight in few bits: `values` times the scale of their group."""

    values_NK: torch.Tensor
    """int8, also for 4-bit integers; or float8."""
    scale_NG: torch.Tensor
    """fp32; of integer schemes exactly representable in float16."""

    def dequantized(self) -> torch.Tensor:
        """The weight as fp32, `[N, K]`."""
        rows, groups = self.scale_NG.shape
        values = self.values_NK.float().view(rows, groups, -1)
        return (values * self.scale_NG[:, :, None]).view(rows, -1)


def scales(weight_NK: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The scales of a weight, fp32, `[N, G]`: that of a group is its largest magnitude / half the range of integers.

    This is torchao's symmetric mapping, with scales rounded to float16. So GGUF files hold them exactly.
    """
    rows = weight_NK.shape[0]
    largest = weight_NK.detach().float().reshape(rows, -1, scheme.group_size or weight_NK.shape[1]).abs().amax(-1)
    if scheme.is_float:
        return largest.clamp(min=1e-12) / torch.finfo(FLOAT8).max
    low, high = scheme.bounds
    return (largest / ((high - low) / 2)).clamp(SMALLEST, LARGEST).half().float()


def quantized(weight_NK: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """Rounds a weight, of any floating type, to the scheme's numbers."""
    scale = scales(weight_NK, scheme)
    grouped = weight_NK.detach().float().reshape(*scale.shape, -1)
    if scheme.is_float:
        largest = torch.finfo(FLOAT8).max
        values = (grouped / scale[:, :, None]).clamp(-largest, largest).to(FLOAT8)
    else:
        # Times the reciprocal, as torchao's fake quantization: a division would round a few weights differently.
        values = (grouped * (1.0 / scale)[:, :, None]).round().clamp(*scheme.bounds).to(torch.int8)
    return QuantizedWeight(values_NK=values.reshape(weight_NK.shape), scale_NG=scale)


def linear_modules(model: torch.nn.Module) -> dict[str, Matrix]:
    """The linear modules of a model, which may be on the meta device, by path.

    Modules that share their weight with an embedding are left out.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    found = {}
    for path, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or id(weight) in embeddings:
            continue
        is_transposed, divides = isinstance(module, Conv1D), hasattr(module, "fan_in")
        if isinstance(module, torch.nn.Linear) or is_transposed or divides:
            outputs, inputs = reversed(weight.shape) if is_transposed else weight.shape
            found[path] = Matrix(outputs=outputs, inputs=inputs, is_transposed=is_transposed, divides=divides)
    return found


def token_embedding(model: torch.nn.Module) -> dict[str, Matrix]:
    """The token embedding of a model, which may be on the meta device, by path: the first that has its weight.

    Raises:
        UserError: the model has none.
    """
    find = getattr(model, "get_input_embeddings", None)
    try:
        table = find() if find else None
    except NotImplementedError:
        table = None
    if not isinstance(table, torch.nn.Embedding):
        raise UserError(
            "quantization.embeddings: the model has no token embedding",
            got=type(model).__name__,
            remedy="set it to false, or leave out --embeddings",
        )
    rows, inputs = table.weight.shape
    matrix = Matrix(
        outputs=rows,
        inputs=inputs,
        divides=hasattr(table, "fan_in"),
        is_embedding=True,
        has_buffers=any(True for _ in table.buffers()),
    )
    return {next(path for path, module in model.named_modules() if _has(module, table.weight)): matrix}


def sharing(model: torch.nn.Module, path: str) -> list[torch.nn.Module]:
    """The modules of a model that have the weight of the module at `path`, which is one of them."""
    weight = model.get_submodule(path)._parameters["weight"]
    return [module for module in model.modules() if _has(module, weight)]


def _has(module: torch.nn.Module, weight: torch.Tensor | None) -> bool:
    return module._parameters.get("weight") is weight


def chosen_modules(
    model: torch.nn.Module,
    scheme: Scheme,
    suffixes: Sequence[str] = (),
    aliases: Mapping[str, tuple[str, ...]] | None = None,
    *,
    embeddings: bool = False,
) -> dict[str, Matrix]:
    """The linear modules to quantize: those whose names end like one of `suffixes`; without any, all of them.

    Args:
        model: The model, which may be on the meta device.
        scheme: The scheme.
        suffixes: Ends of names, with or without `.weight`.
        aliases: Suffixes of weights that stand for others, as in `pruned_module`.
        embeddings: Whether to add the token embedding.

    Raises:
        UserErrors: a suffix names no linear module, the group size does not divide an input size, or there is no token
            embedding; all at once.
    """
    known, errors = linear_modules(model), list[UserError]()
    names = list(known) if not suffixes else list[str]()
    for suffix in suffixes:
        spelled = (aliases or {}).get(f"{suffix.removesuffix('.weight')}.weight", (suffix,))
        ends = tuple(end.removesuffix(".weight") for end in spelled)
        matches = [path for path in known if path.endswith(ends)]
        names += matches
        if not matches:
            near = difflib.get_close_matches(suffix, [_without_layer(path) for path in known], n=1, cutoff=0.5)
            ends_known = sorted({_without_layer(path) for path in known})
            remedy = f"did you mean {near[0]!r}?" if near else None
            what = f"quantization.quantized_module: no linear module's name ends with {suffix!r}"
            errors.append(UserError(what, wanted=", ".join(ends_known[:12]), remedy=remedy))
    found = {path: known[path] for path in known if path in set(names)}
    group = scheme.group_size
    odd = {path: matrix.inputs for path, matrix in found.items() if group and matrix.inputs % group}
    if odd:
        path, inputs = next(iter(odd.items()))
        errors.append(
            UserError(
                f"quantization.group_size: {group} does not divide the inputs of {len(odd)} modules, such as {path}",
                got=f"{inputs} inputs",
                remedy="prune to a multiple of the group size (fine-grained.round_to), set another group_size, or list "
                "the other modules in quantized_module",
            )
        )
    table = dict[str, Matrix]()
    if embeddings:
        try:
            table = token_embedding(model)
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserErrors("the model cannot be quantized in this way", errors)
    return found | table


def described(name: SchemeName, matrices: Mapping[str, Matrix]) -> str:
    """What is rounded, in words."""
    tables = sum(matrix.is_embedding for matrix in matrices.values())
    return f"{len(matrices) - tables} modules as {name}" + (", the token embedding in 8 bits" if tables else "")


def _without_layer(path: str) -> str:
    """The part of a module's path after its layer number."""
    parts = path.split(".")
    numbers = [place for place, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] + 1 :]) if numbers else path
