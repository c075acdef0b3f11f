"""Checks of the files and folders that a configuration names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from cook.base.errors import UserError
from cook.config.corpus import DataConfig
from cook.config.distillation import OWN_TEACHER, DistillationConfig
from cook.config.types import CoarseConfig, FineConfig, ModelConfig, TokenizerConfig

REPOSITORY = Path(__file__).resolve().parents[2]
TRACKED_FOLDERS = (".ci", ".git", ".venv", "config", "cook", "results/bench", "scripts", "tests")
"""Folders of the repository that a run must not write to."""


def mask_paths(coarse: CoarseConfig | None, fine: FineConfig | None) -> dict[str, str]:
    """Returns the mask files that the scheme names, by their keys."""
    named = {"coarse-grained.coarse_mask": coarse.coarse_mask} if coarse is not None else {}
    if fine is not None:
        inner = {"coarse_mask": fine.coarse_mask, "heads_mask": fine.heads_mask, "dimff_mask": fine.dimff_mask}
        named |= {f"fine-grained.{key}": path for key, path in inner.items() if path is not None}
    return named


def output_is_safe(
    output_dir: str, data: DataConfig, coarse: CoarseConfig | None, fine: FineConfig | None
) -> Iterator[UserError]:
    """Checks that the run writes neither to the file system's root nor to the repository or its tracked folders."""
    for key, path in {"output_dir": output_dir, "data.cache_dir": data.cache_dir}.items():
        if path is not None:
            yield from refused_folder(key, path, str(path))
    for key, path in mask_paths(coarse, fine).items():
        yield from refused_folder(key, path, os.path.dirname(path) or ".")


def refused_folder(key: str, path: str, folder: str) -> Iterator[UserError]:
    """Yields an error for each reason why a run must not write to `folder`."""
    try:
        real = Path(os.path.realpath(folder))
    except (OSError, ValueError) as error:
        yield UserError(f"{key}: not a usable path: {error}", got=path)
        return
    if real == REPOSITORY or real in REPOSITORY.parents:
        yield UserError(f"{key}: a run must not write to this folder", wanted="a separate folder", got=path)
    for tracked in TRACKED_FOLDERS:
        if real == REPOSITORY / tracked or REPOSITORY / tracked in real.parents:
            remedy = "choose a folder below results/ or outside the repository"
            yield UserError(f"{key}: {tracked}/ is a folder of the program itself", got=path, remedy=remedy)
    if os.path.lexists(real) and not os.path.isdir(real):
        yield UserError(f"{key}: this path is a file", wanted="a folder", got=path)


def paths_exist(
    output_dir: str,
    model: ModelConfig,
    tokenizer: TokenizerConfig,
    data: DataConfig,
    distillation: DistillationConfig | None,
) -> Iterator[UserError]:
    """Checks that the inputs exist. One error lists all missing paths; a path of the wrong kind has its own error."""
    named = [("model.path", model.path), ("tokenizer.path", tokenizer.path)]
    named += [(f"data.paths.{index}", path) for index, path in enumerate(data.paths)]
    named += [(f"data.held_out_paths.{index}", path) for index, path in enumerate(data.held_out_paths)]
    for number, source in enumerate(data.sources):
        for key in ("paths", "held_out_paths"):
            named += [(f"data.sources.{number}.{key}.{i}", path) for i, path in enumerate(getattr(source, key))]
    teacher = distillation.teacher if distillation is not None else OWN_TEACHER
    if teacher != OWN_TEACHER and not _is_inside(teacher, output_dir):
        named.append(("distillation.teacher", teacher))  # a folder inside output_dir may be written by an earlier stage
    missing = [(key, path) for key, path in named if path is not None and not _found(path, key.startswith("data."))]
    if missing:
        listed = "".join(f"\n    {key}: {path}" for key, path in missing)
        yield UserError(
            f"{len(missing)} path(s) do not exist:{listed}",
            remedy="create these files or correct the paths; relative paths start at the current working directory",
        )
    gone = {key for key, _ in missing}
    if model.path is not None and "model.path" not in gone:
        yield from _wrong_model(model.path)
    if tokenizer.path is not None and "tokenizer.path" not in gone:
        if tokenizer.type == "sentencepiece" and not os.path.isfile(tokenizer.path):
            yield UserError("tokenizer.path: not a file", wanted="a sentencepiece .model file", got=tokenizer.path)
        if tokenizer.type == "jieba" and not os.path.isfile(tokenizer.path):
            yield UserError("tokenizer.path: not a file", wanted="CPM-Ant's vocab.txt", got=tokenizer.path)
        if tokenizer.type == "hf" and not os.path.isdir(tokenizer.path):
            yield UserError("tokenizer.path: not a folder", wanted="a Hugging Face tokenizer", got=tokenizer.path)


def _wrong_model(path: str) -> Iterator[UserError]:
    if os.path.isdir(path):
        if not os.path.isfile(os.path.join(path, "config.json")):
            yield UserError("model.path: the folder has no config.json", wanted="a Hugging Face model folder", got=path)
    elif not path.endswith((".pt", ".bin")):
        yield UserError("model.path: not a model", wanted="a Hugging Face folder or a CPM-Live .pt file", got=path)


def _found(path: str, is_pattern: bool) -> bool:
    try:
        if os.path.exists(path):
            return True
        return is_pattern and glob.has_magic(path) and next(glob.iglob(path, recursive=True), None) is not None
    except (OSError, ValueError):
        return False  # not a possible file name


def _is_inside(path: str, folder: str) -> bool:
    try:
        return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents
    except (OSError, ValueError):
        return False
