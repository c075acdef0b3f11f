"""Programs other than transformers that read model folders, and what they get wrong in pruned models.

A stock folder contains everything that its class needs, but some programs compute a size that the config states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cook.families.stock_models import config_object, is_ragged
from cook.pruning.family import ModelConfig


def _has_own_head_size(config: ModelConfig) -> bool:
    """Whether the head size differs from hidden size / heads, as after removing heads."""
    return bool(config["hidden_size"] != config["head_dim"] * config["num_attention_heads"])


def _has_own_layer_types(config: ModelConfig) -> bool:
    """Whether windowed and full layers are in another order than the family's, as after removing layers."""
    rest = {name: value for name, value in config.items() if name != "layer_types"}
    return bool(config["layer_types"] != config_object(rest).layer_types)


def _has_own_frequencies(config: ModelConfig) -> bool:
    """Whether the frequencies of rotary positions are given by factors, as after removing head dimensions."""
    parameters = config.get("rope_parameters") or {}
    each = [own for own in (parameters, *parameters.values()) if isinstance(own, dict)]
    return any(own.get("rope_type") == "longrope" and own["short_factor"] == own["long_factor"] for own in each)


@dataclass(frozen=True, kw_only=True)
class Misreading:
    """An assumption of a program that a pruned model of these families can violate."""

    consumer: str  # the program, with the version that was run or read
    model_types: frozenset[str]  # families, by the `model_type` of config.json
    applies: Callable[[ModelConfig], bool]  # whether a model with this config violates the assumption
    assumes: str  # the assumption
    effect: str  # the consequence
    was_run: bool = False  # True: a test runs the program. False: its source was read


@dataclass(frozen=True, kw_only=True)
class HeadSizeMisreading(Misreading):
    """An assumption about the size of heads."""

    applies: Callable[[ModelConfig], bool] = _has_own_head_size
    assumes: str = "head_dim = hidden_size / num_attention_heads"


MISREADINGS = (
    HeadSizeMisreading(
        consumer="CTranslate2 4.8",
        model_types=frozenset({"llama", "qwen2"}),
        effect="it converts the model, then either fails when it runs or returns wrong results without an error",
        was_run=True,
    ),
    HeadSizeMisreading(
        consumer="vLLM",
        model_types=frozenset({"qwen2"}),
        effect="the weights do not fit the layers that it builds",
    ),
    HeadSizeMisreading(
        consumer="llama.cpp",
        model_types=frozenset({"phi3"}),
        effect="its converter writes a wrong number of rotary dims, and the weights do not fit when it loads the file",
    ),
    Misreading(
        consumer="llama.cpp",
        model_types=frozenset({"gemma2", "gemma3_text"}),
        applies=_has_own_layer_types,
        assumes="windowed and full attention alternate as in the published models",
        effect="it returns wrong results without an error (of Gemma 2 on texts longer than the window)",
    ),
    Misreading(
        consumer="A program that ignores the factors of `longrope` in models of this family",
        model_types=frozenset({"llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text"}),
        applies=_has_own_frequencies,
        assumes="that head_dim determines the frequencies of rotary positions",
        effect="it returns wrong results without an error. Only transformers was tried",
    ),
)
"""CTranslate2 reads `head_dim` of Mistral, Qwen3, Gemma 2 and Gemma 3, and does not read Phi-3 and GPT-NeoX as
transformers 5 loads them. Of vLLM and llama.cpp no other misreading is known; not every family's source was read.
ONNX Runtime runs graphs that torch exports from the model itself, so nothing can be misread."""
RAGGED = "only transformers with trust_remote_code=True loads it; CTranslate2, vLLM and llama.cpp lack this model type"


def misread_by(config: ModelConfig) -> list[str]:
    """One sentence per program that would misread a model with this config, for messages and model cards."""
    if is_ragged(config):
        return [RAGGED]
    return [
        f"{m.consumer} assumes {m.assumes}, which does not hold here: {m.effect}"
        for m in MISREADINGS
        if config.get("model_type") in m.model_types and m.applies(config)
    ]
