"""Checks that a schema cannot express: values that must fit together, files on disk, the number of ranks."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass
from typing import Any

from cook.base.errors import UserError
from cook.config import check_inputs, check_moefy, check_scheme, check_training, quantization
from cook.config.declare import default_of
from cook.config.facts import model_facts
from cook.config.types import RunConfig

DEFAULTS: dict[str, Any] = {
    field.name: default for field in dataclasses.fields(RunConfig) if (default := default_of(field)) is not MISSING
}
"""Default values of the sections that the files may omit."""

CHECKS: tuple[Callable[..., Iterable[UserError]], ...] = (
    check_inputs.output_is_safe,
    check_inputs.paths_exist,
    check_training.model_has_a_source,
    check_training.tokenizer_fits,
    check_inputs.data_has_a_source,
    check_inputs.sources_fit_together,
    check_inputs.binary_data_has_its_tokenizer,
    check_training.rows_hold_the_prompt,
    check_training.batch_is_whole,
    check_training.deepspeed_agrees,
    check_training.precision_agrees,
    check_training.checkpoints_can_be_trusted,
    check_training.distillation_does_something,
    check_training.teacher_can_teach,
    check_scheme.mask_is_structured,
    check_scheme.recipe_in_order,
    check_scheme.sections_given,
    check_scheme.masks_given,
    check_scheme.sizes_fit,
    check_scheme.layer_mask_given,
    check_scheme.joint_budget_is_one,
    check_scheme.sizes_are_nested,
    check_scheme.means_fit,
    check_scheme.pattern_given,
    check_scheme.pattern_stands_alone,
    quantization.quantize_stage_fits,
    quantization.quantize_stage_trains,
    quantization.group_divides_targets,
    check_moefy.section_fits_stages,
    check_moefy.experts_fit,
)
"""A check's parameters name the sections that it reads. A check is skipped if one of its sections is invalid."""


@dataclass(frozen=True, kw_only=True)
class Sections:
    """The valid and invalid sections of a configuration."""

    values: dict[str, Any]
    """The fields of RunConfig that the files contain, by name."""
    invalid: frozenset[str]
    """Names of the fields whose section has errors."""


def cross_check(sections: Sections, *, world_size: int | None) -> list[UserError]:
    """Runs every check whose sections are valid, and returns all errors. `world_size` is None if unknown."""
    known = {name: value for name, value in DEFAULTS.items() if name not in sections.invalid}
    known |= sections.values | {"world_size": world_size}
    errors: list[UserError] = []
    if "model" in known:
        try:
            known["facts"] = model_facts(known["model"])
        except UserError as error:
            errors.append(error)
    for check in CHECKS:
        names = inspect.signature(check).parameters
        if known.keys() >= names.keys():
            errors += check(**{name: known[name] for name in names})
    return errors
