"""The plan of a stage as the runner reads it, and the files that the stage reads besides its corpus.

They are hashed when the stage begins, and compared when it is resumed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from cook.base.errors import UserError
from cook.base.files import content_hash, read_json, sha256, write_json
from cook.data.training_data import changed_files

DONE = "done.json"
"""The file that a finished stage writes: its inputs and its results."""

NOTE = "sources.json"
"""Name of the file in the stage's folder."""
MODEL_FILES = ("config.json", "*.safetensors*", "pytorch_model*.bin*")
"""The files that define a model; the tokenizer counts as data, and other files change no weight."""


class PlannedStage(Protocol):
    """The plan of a stage, as the runner reads it."""

    @property
    def name(self) -> str: ...
    @property
    def folder(self) -> Path:
        """The folder of everything that the stage writes."""

    @property
    def done(self) -> Path:
        """The file that the stage writes when it has finished."""

    @property
    def after(self) -> str | None:
        """The name of the stage that this stage starts from."""

    @property
    def done_before(self) -> Path | None:
        """The file `done` of that stage."""

    @property
    def redo(self) -> str:
        """The options of the command that runs the stage from its beginning."""

    def fingerprint(self) -> str:
        """Hash of the settings that determine the stage's outcome."""

    def source_files(self) -> list[Path]:
        """The files that the stage reads besides its corpus."""

    def inherited_masks(self) -> list[str]:
        """The mask files that the stage reads and keeps."""

    def traces(self) -> list[Path]:
        """Files, besides checkpoints, that exist once the stage has begun."""


def check_sources(stage: PlannedStage, resume: str) -> None:
    """Checks that no file was replaced since this stage or the previous one read or wrote it.

    Raises:
        UserError: lists the changed files.
    """
    before = stage.done_before
    made = read_json(before)["masks"] if before and before.exists() else {}
    for path in stage.inherited_masks():
        if path in made and Path(path).is_file() and sha256(path) != made[path]:
            raise UserError(
                f"{path}: this is not the mask that {stage.after} wrote",
                remedy="restore it: another run has overwritten it. Give each run its own mask paths",
            )
    begun = any((stage.folder / "checkpoints").glob("step-*")) or any(path.exists() for path in stage.traces())
    if resume != "never" and (begun or resume != "auto") and (changes := changed_sources(stage)):
        raise changed(f"{stage.name}: files have changed since the stage began", changes)


def check_masks(stage: PlannedStage) -> None:
    """Checks that no mask was overwritten since the stage finished.

    Raises:
        UserError: a mask file is not the one that the stage was trained with.
    """
    for path, digest in read_json(stage.done)["masks"].items():
        if not Path(path).is_file() or sha256(path) != digest:
            raise UserError(
                f"{path}: this is not the mask that {stage.name} was trained with",
                wanted=f"sha256 {digest}",
                remedy="another run has overwritten it: give each run its own mask paths, and redo the stage",
            )


def note_sources(stage: PlannedStage) -> None:
    """Records the files that the stage begins with."""
    note, found = stage.folder / NOTE, _sources(stage)
    if not (note.exists() and read_json(note) == found):
        write_json(note, found)


def changed_sources(stage: PlannedStage) -> list[str]:
    """Changes of the files that the stage began with, one phrase per file; a missing folder is no change."""
    note = stage.folder / NOTE
    if not note.is_file():
        return []
    noted: Mapping[str, Any] = read_json(note)
    return changed_files({name: seen for name, seen in noted.items() if Path(name).parent.exists()}, _sources(stage))


def changed(what: str, changes: list[str]) -> UserError:
    """The error that lists changed files."""
    listed = "".join(f"\n    {change}" for change in changes[:20]) + ("\n    …" if len(changes) > 20 else "")
    return UserError(
        f"{what}:{listed}", remedy="restore the files, choose another output_dir, or start over with --resume never"
    )


def _sources(stage: PlannedStage) -> dict[str, list[Any]]:
    """Size and hash by path."""
    return {str(path): [path.stat().st_size, content_hash(path)] for path in stage.source_files() if path.is_file()}


def model_files(path: Path) -> list[Path]:
    """The files of a model, of a folder or a single file, that determine its weights."""
    if path.is_dir():
        return sorted({file for pattern in MODEL_FILES for file in path.glob(pattern) if file.is_file()})
    beside = (path.with_suffix(".json"), path.parent / "config.json")
    return [file for file in (path, *beside) if file.is_file()][:2]
