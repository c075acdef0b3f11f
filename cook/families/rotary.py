"""Rotary positions of stock models that lose head dimensions.

Pair i of a head turns with a frequency that follows from its number in the whole head. A stock class computes it from
head_dim, and so gives other frequencies to a model whose heads have fewer pairs. But one of the types of rotary
positions in transformers, `longrope`, divides the frequency of each pair by a factor from the config. The factors
written here make every pair keep its frequency, in a stock class. With the base 1 nothing but a factor is rounded:
frequencies that were computed as 1 / base^(2i/n) are the same to the last bit, and others at most one bit apart.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig

HALVES, NEIGHBOURS = (-2.0, -3.0, 0.0, 1.0), (-1.0, 0.0, -3.0, 2.0)
"""What classes make of 0, 1, 2, 3, by the pairs that they turn."""
SCALED = ("llama_4_scaling_beta", "original_max_position_embeddings")
"""By what attention multiplies queries of late positions, if there is a factor."""
NEAREST = 8
"""Floating-point numbers around a factor among which the one that gives the exact frequency is looked for."""


class Turned(NamedTuple):
    """The dimensions of a head that rotary positions turn in pairs: the first `number` ones."""

    number: int
    neighbours: bool = False
    """Whether pair i is dims 2i and 2i + 1; else it is i and i + number/2."""


def turned_dims(config: PreTrainedConfig, model: torch.nn.Module) -> Turned | None:
    """What rotary positions turn, no dims if there are none; None if frequencies change at run time, or differ in
    number, or if the class turns other pairs than those of `Turned`.
    """
    module = _module(model)
    turns = _turns(model)
    if module is None:
        return None if turns else Turned(0)
    four = torch.arange(4.0, device="cpu")
    results = {tuple(turn(four).tolist()) for turn in turns}
    if len(results) != 1 or not results <= {HALVES, NEIGHBOURS}:
        return None
    types = [getattr(module, "rope_type", "")]
    types = [*types[0].values()] if isinstance(types[0], dict) else types
    if any("dynamic" in each for each in types):
        return None
    if hasattr(module, "mrope_section") and not _has_whole_sections(module):
        return None
    if any(parameters.get("short_factor") != parameters.get("long_factor") for _, parameters in _parameters(config)):
        return None
    numbers = {2 * len(getattr(module, f"{prefix}inv_freq", ())) for prefix, _ in _parameters(config)}
    return Turned(numbers.pop(), results == {NEIGHBOURS}) if len(numbers) == 1 else None


def with_pairs(config: PreTrainedConfig, model: torch.nn.Module, kept: Sequence[int], head_dim: int) -> dict[str, Any]:
    """The changed fields of a config with which the pairs that stay turn as before; empty without rotary positions.

    Args:
        config: The whole model's config.
        model: The whole model, without weights.
        kept: The pairs that stay, by number.
        head_dim: Dimensions per head of the smaller model.
    """
    module = _module(model)
    if module is None:
        return {}
    with torch.device("cpu"):
        real: Any = type(module)(config)
    of_types = {}
    for prefix, before in _parameters(config):
        # longrope takes other factors beyond the original length, which are the same here; Ministral 3's attention
        # reads it too.
        scaled = {name: before[name] for name in SCALED if "llama_4_scaling_beta" in before}
        parameters = {
            "rope_type": "longrope",
            "rope_theta": 1.0,
            "original_max_position_embeddings": config.max_position_embeddings,
            **scaled,
            "factor": 1.0,  # unused, since the next one is given; transformers warns if it is missing
            "attention_factor": float(getattr(real, f"{prefix}attention_scaling")),
        }
        if hasattr(real, "mrope_section"):
            ends = zip(real.mrope_section, accumulate(real.mrope_section), strict=True)
            parameters["mrope_section"] = [sum(end - size <= pair < end for pair in kept) for size, end in ends]
        if 2 * len(kept) < head_dim or before.get("partial_rotary_factor") is not None:
            # Classes round the product of both down.
            parameters["partial_rotary_factor"] = min(1.0, (2 * len(kept) + 0.5) / head_dim)
        wanted = getattr(real, f"{prefix}inv_freq")[list(kept)]
        parameters["short_factor"] = parameters["long_factor"] = factors(wanted)
        of_types[prefix.removesuffix("_")] = parameters
    return {"rope_parameters": of_types.get("", of_types), "head_dim": head_dim}


def without_factors(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary positions of a config without factors, whose number would have to be that of the pairs."""
    if any(isinstance(own, Mapping) for own in parameters.values()):
        return {name: without_factors(own) for name, own in parameters.items() if own}
    given = {name: parameters[name] for name in ("rope_theta", "partial_rotary_factor") if name in parameters}
    return {"rope_type": "default"} | given


def factors(wanted: torch.Tensor) -> list[float]:
    """Factors f for which longrope's frequencies with the base 1, 1 / f, are `wanted`, float32 `[pairs]`."""
    first = (1.0 / wanted.double()).float()
    tried = [first]
    for towards in (torch.inf, -torch.inf):
        each = first
        for _ in range(NEAREST):
            each = torch.nextafter(each, torch.full_like(each, towards))
            tried.append(each)
    candidates = torch.stack(tried)
    apart = (1.0 / candidates - wanted).abs()
    return candidates.gather(0, apart.argmin(0)[None])[0].tolist() if len(wanted) else []


def _turns(model: torch.nn.Module) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    """The functions that turn pairs by a right angle, in the files of the model's modules."""

    def by_angle(apply: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return apply(x, x.new_zeros(len(x) // 2), x.new_ones(len(x) // 2))

    found: list[Callable[[torch.Tensor], torch.Tensor]] = []
    for file in {sys.modules[type(each).__module__] for each in model.modules()}:
        found += [turn for name, turn in vars(file).items() if name.startswith("rotate_")]
        if apply := vars(file).get("_apply_rotary_emb"):  # GPT-OSS, with the cosine and the sine of each pair
            found.append(partial(by_angle, apply))
    return found


def _has_whole_sections(module: Any) -> bool:
    """Whether the pairs that turn by one of an image's three positions are consecutive, as in Qwen2-VL."""
    sizes, recomposed = module.mrope_section, getattr(module, "recomposition_frequencies", None)
    positions = torch.arange(3.0, device="cpu").view(3, 1, 1, 1).expand(3, 1, 1, sum(sizes))
    wanted = [number % 3 for number, size in enumerate(sizes) for _ in range(size)]
    return recomposed is not None and recomposed(positions).flatten().tolist() == wanted * 2


def _module(model: torch.nn.Module) -> Any:
    return next((module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")), None)


def _parameters(config: PreTrainedConfig) -> list[tuple[str, dict[str, Any]]]:
    """The parameters of each type of layer that has its own, with the prefix of its frequencies; else one entry."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = {name: own for name, own in parameters.items() if isinstance(own, dict)}
    used = set(getattr(config, "layer_types", None) or nested)
    return [(f"{name}_", own) for name, own in nested.items() if name in used] if nested else [("", parameters)]
