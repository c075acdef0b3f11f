"""What a stage reads by path besides its corpus: noted by content when it begins, compared when it is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.base.files import content_hash, read_json, sha256, write_json
from cook.config.distillation import OWN_TEACHER
from cook.data.training_data import changed_files
from cook.recipe.plan import Stage

NOTE = "sources.json"
"""File in the stage's folder."""
MODEL_FILES = ("config.json", "*.safetensors*", "pytorch_model*.bin*")
"""What makes a model of a folder; a tokenizer counts with the data, and the rest changes no weight."""


def check_sources(stage: Stage, resume: str) -> None:
    """Refuses files that were replaced since the stage, or the one that it follows, read or made them.

    Raises:
        UserError: with the files' names.
    """
    before = stage.done_before
    made = read_json(before)["masks"] if before and before.exists() else {}
    for path in filter(None, vars(stage.fixed).values()):
        if path in made and Path(path).is_file() and sha256(path) != made[path]:
            raise UserError(
                f"{path}: not the mask that {stage.after} finished with",
                remedy="restore it: another run has written there. Give each run mask paths of its own",
            )
    own_mask = stage.pattern_mask and Path(stage.pattern_mask).resolve().is_relative_to(
        Path(stage.config.output_dir).resolve()
    )
    begun = any((stage.folder / "checkpoints").glob("step-*")) or (own_mask and Path(str(stage.pattern_mask)).exists())
    if resume != "never" and (begun or resume != "auto") and (changes := changed_sources(stage)):
        raise changed(f"{stage.name}: files have changed since the stage began", changes)


def note_sources(stage: Stage) -> None:
    """Writes down what the stage begins with."""
    note, found = stage.folder / NOTE, _sources(stage)
    if not (note.exists() and read_json(note) == found):
        write_json(note, found)


def changed_sources(stage: Stage) -> list[str]:
    """What has become of the files that the stage began with, one phrase each; a folder that is gone is no change."""
    note = stage.folder / NOTE
    if not note.is_file():
        return []
    noted: Mapping[str, Any] = read_json(note)
    return changed_files({name: seen for name, seen in noted.items() if Path(name).parent.exists()}, _sources(stage))


def changed(what: str, changes: list[str]) -> UserError:
    """The error that lists them."""
    listed = "".join(f"\n    {change}" for change in changes[:20]) + ("\n    …" if len(changes) > 20 else "")
    return UserError(
        f"{what}:{listed}", remedy="restore the files, choose another output_dir, or start over with --resume never"
    )


def _sources(stage: Stage) -> dict[str, list[Any]]:
    """Size and hash by path: the start model, a teacher, and the masks that the stage is given."""
    config, before = stage.config, stage.done_before
    paths: list[Path] = []
    if config.model.path and not (before and before.exists()):
        paths += _model_files(Path(config.model.path))
    if config.distillation and config.distillation.teacher != OWN_TEACHER:
        paths += _model_files(Path(config.distillation.teacher))
    masks = [*vars(stage.fixed).values()]
    masks += [config.pattern.previous_mask] if stage.pattern_mask and config.pattern else []
    paths += [Path(path) for path in masks if path and Path(path).is_file()]
    return {str(path): [path.stat().st_size, content_hash(path)] for path in paths}


def _model_files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted({file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    beside = (path.with_suffix(".json"), path.parent / "config.json")
    return [file for file in (path, *beside) if file.is_file()][:2]
