"""Checks of pattern pruning: the settings it needs, and the stages it can be combined with."""

from __future__ import annotations

import os
from collections.abc import Iterator

from cook.base.errors import UserError
from cook.config.check_paths import refused_folder
from cook.config.types import PatternConfig, PruningConfig, StageEntry, method_of


def uses_pattern(pruning: PruningConfig, stages: tuple[StageEntry, ...]) -> bool:
    """Returns whether the recipe contains a pattern stage, or the files describe one."""
    return method_of(pruning) == "pattern" or any(entry.name == "pattern" for entry in stages)


def pattern_given(
    pruning: PruningConfig, stages: tuple[StageEntry, ...], pattern: PatternConfig | None
) -> Iterator[UserError]:
    """Checks that a pattern stage has its section and its mask file."""
    if not uses_pattern(pruning, stages):
        return
    if pattern is None and pruning.mask_method not in ("m4n2_1d", "m4n2_2d"):
        yield UserError("pattern: missing", wanted="a section with the pattern's type and sparsity")
    path = pruning.pruning_mask_path
    if path is None or not path.endswith(".safetensors"):
        wanted = "a path that ends in .safetensors; the mask is read from it if it exists, else written to it"
        yield UserError("pruning.pruning_mask_path: a pattern needs a mask file", wanted=wanted, got=path)
    else:
        yield from refused_folder("pruning.pruning_mask_path", path, os.path.dirname(path) or ".")
    if pattern is not None and pattern.previous_mask is not None:
        if not os.path.isfile(pattern.previous_mask):
            yield UserError("pattern.previous_mask: there is no such file", got=pattern.previous_mask)
        elif path is not None and os.path.realpath(path) == os.path.realpath(pattern.previous_mask):
            yield UserError("pattern.previous_mask: this stage writes the same file", wanted="another file", got=path)


def pattern_stands_alone(stages: tuple[StageEntry, ...]) -> Iterator[UserError]:
    """Checks that a recipe does not combine gates and patterns, which would need masks of both kinds at once."""
    names = [entry.name for entry in stages]
    others = [name for name in names if name not in ("pretrain", "pattern")]
    if "pattern" in names and others:
        yield UserError(
            "stages: pattern cannot be combined with stages that learn gates",
            wanted="pretrain and pattern only",
            got=", ".join(names),
            remedy="make the smaller model first, and prune its weights in a second run",
        )
