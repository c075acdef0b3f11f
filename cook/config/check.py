"""Checks that no schema can express: values that must fit one another, the files on the disk, the number of ranks."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from dataclasses import MISSING, dataclass
from typing import Any

from cook.base.errors import UserError
from cook.config import check_data, check_distillation, check_paths, check_pattern, check_scheme, check_training
from cook.config.declare import default_of
from cook.config.facts import model_facts
from cook.config.types import RunConfig

DEFAULTS: dict[str, Any] = {
    field.name: default for field in dataclasses.fields(RunConfig) if (default := default_of(field)) is not MISSING
}
"""Sections that the files may leave out."""

CHECKS: tuple[Callable[..., Iterable[UserError]], ...] = (
    check_paths.output_is_safe,
    check_paths.paths_exist,
    check_training.model_has_a_source,
    check_training.tokenizer_fits,
    check_data.data_has_a_source,
    check_data.sources_fit_together,
    check_data.binary_data_has_its_tokenizer,
    check_training.rows_hold_the_prompt,
    check_training.batch_is_whole,
    check_training.deepspeed_agrees,
    check_training.precision_agrees,
    check_training.checkpoints_can_be_trusted,
    check_distillation.distillation_does_something,
    check_distillation.teacher_can_teach,
    check_scheme.mask_is_structured,
    check_scheme.recipe_in_order,
    check_scheme.sections_given,
    check_scheme.masks_given,
    check_scheme.sizes_fit,
    check_scheme.layer_mask_given,
    check_scheme.joint_budget_is_one,
    check_pattern.pattern_given,
    check_pattern.pattern_stands_alone,
)
"""Each names the sections that it reads by its parameters, and is left out if one of them is broken."""


@dataclass(frozen=True, kw_only=True)
class Sections:
    """What could be built of a configuration, and what could not."""

    values: dict[str, Any]
    """Fields of RunConfig by name, those that the files give."""

    invalid: frozenset[str]
    """Fields whose section has mistakes."""


def cross_check(sections: Sections, *, world_size: int | None) -> list[UserError]:
    """Runs every check whose sections are sound.

    Args:
        sections: The parts of the configuration.
        world_size: Number of ranks, None if unknown.
    """
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
