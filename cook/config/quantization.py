"""The `quantization` section of `bmcook.json`: which matrices are stored in few bits, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from cook.base.errors import UserError
from cook.config.declare import Limits, Size

if TYPE_CHECKING:
    from cook.config.types import FineConfig, JointConfig, StageEntry, TrainingConfig

SchemeName = Literal["int8", "int8_weight", "int4", "fp8"]
"""See `QuantizationConfig.scheme`."""
ModuleSuffix = Annotated[
    str, Limits(title="the end of a module's name, such as self_attn.q_proj", pattern="^[A-Za-z0-9_.]+$")
]


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """The stage `quantize`: training with fake quantization, after all other stages of a recipe."""

    is_quant: bool
    """False: the section is not used."""
    scheme: SchemeName = "int8"
    """`int8`: 8-bit weights with one scale per output row, and 8-bit inputs with a scale and a zero point per token,
    computed while the model runs. `int8_weight`: the same weights, inputs in floating point. `int4`: 4-bit weights
    with one scale per `group_size` inputs. `fp8`: 8-bit floating-point weights and inputs; needs a GPU with FP8 units
    (CUDA compute capability 8.9)."""
    group_size: Annotated[int, Limits(minimum=8, maximum=1024, multipleOf=8)] = 32
    """`int4`: consecutive inputs of a row that share a scale. It must divide the input size of every quantized
    matrix. GGUF files need 32 or a multiple of it."""
    quantized_module: Annotated[tuple[ModuleSuffix, ...], Limits(maxItems=10**4)] = ()
    """Ends of the names of the linear modules to quantize. Empty: all of them. Embeddings, norms and products inside
    attention stay in floating point, also an output projection that is tied to the embedding; but see `embeddings`."""
    embeddings: bool = False
    """The token embedding is stored in 8 bits too, with one scale per row, whatever the scheme; also an output
    projection that is tied to it."""
    steps: Size | None = None
    """Steps of the stage. None: `training.steps`. The stage's own entry under `stages` overrides both."""


def quantize_stage_fits(
    stages: tuple[StageEntry, ...], quantization: QuantizationConfig | None, joint: JointConfig | None
) -> Iterator[UserError]:
    """Checks that the stage `quantize` has its section, and the section its stage; that the stage comes last and makes
    one model.
    """
    names = [entry.name for entry in stages]
    is_quant = quantization is not None and quantization.is_quant
    if "quantize" not in names:
        if is_quant and names:
            remedy = 'add {"name": "quantize"} after the other stages, or set quantization.is_quant to false'
            yield UserError("quantization: the recipe has no stage quantize", got=", ".join(names), remedy=remedy)
        return
    if not is_quant:
        wanted = 'a section such as {"is_quant": true, "scheme": "int8"}'
        problem = "missing, and the recipe has a stage quantize" if quantization is None else "is_quant is false"
        yield UserError(f"quantization: {problem}", wanted=wanted)
    after = [name for name in names[names.index("quantize") + 1 :] if name not in ("random_baseline", "quantize")]
    if after:
        yield UserError("stages: quantize must come after the other stages", got=", ".join(names))
    if joint is not None and joint.sizes and any(name.startswith("joint") for name in names):
        yield UserError(
            "stages: quantize makes one model, and the scheme has several sizes",
            got=f"{len(joint.sizes)} shares",
            remedy="give one share, or write each size with do_prune.py and quantize it with cook quantize",
        )


def quantize_stage_trains(
    stages: tuple[StageEntry, ...], training: TrainingConfig, quantization: QuantizationConfig | None
) -> Iterator[UserError]:
    """Checks that the stage `quantize` trains the weights of the model without the removed units."""
    own = next((entry.training for entry in stages if entry.name == "quantize"), None)
    if own is None and not (not stages and quantization is not None and quantization.is_quant):
        return
    reasons = {
        "train_weights": "the stage learns nothing else",
        "remove_masked": "the scale of a row must not depend on units that are removed later",
    }
    for key, reason in reasons.items():
        if not (own or {}).get(key, getattr(training, key)):
            where = f"stages.quantize.training.{key}" if own and key in own else f"training.{key}"
            remedy = f'set it to true in the entry of the stage quantize: "training": {{"{key}": true}}'
            yield UserError(f"{where}: quantize needs true, since {reason}", got=False, remedy=remedy)


def group_divides_targets(
    stages: tuple[StageEntry, ...],
    quantization: QuantizationConfig | None,
    fine: FineConfig | None,
    joint: JointConfig | None,
) -> Iterator[UserError]:
    """Checks that the group size of 4-bit weights divides the sizes that the recipe prunes to."""
    names = [entry.name for entry in stages]
    if quantization is None or quantization.scheme != "int4" or quantization.quantized_module or fine is None:
        return
    if "quantize" not in names:
        return
    is_global = fine.scope == "global" or (joint is not None and joint.scope == "global")
    for words, key in ((("ffn", "joint"), "target_dimff"), (("hidden", "joint"), "target_hidden")):
        key = "round_to" if is_global else key
        size = getattr(fine, key)
        if any(name.startswith(words) for name in names) and size is not None and size % quantization.group_size:
            yield UserError(
                f"quantization.group_size: does not divide fine-grained.{key}",
                wanted=f"a multiple of {quantization.group_size}",
                got=size,
                remedy=f"change fine-grained.{key} or the group size, or list the modules to quantize",
            )
            return
