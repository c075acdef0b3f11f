"""Checks of the inputs: the corpus with its sources, and the files and folders that a configuration names."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cook.base.errors import UserError
from cook.config.corpus import DataConfig, SourceConfig
from cook.config.distillation import OWN_TEACHER, DistillationConfig
from cook.config.types import CoarseConfig, FineConfig, ModelConfig, TokenizerConfig, TrainingConfig

WITHOUT_FILES = ("python_stdlib", "hub")
TASK_TYPES = ("cpm_live", "downstream")
"""Types whose records themselves mark what the model has to predict."""


def data_has_a_source(data: DataConfig, training: TrainingConfig) -> Iterator[UserError]:
    """Checks that there is a corpus to train on, and held-out data if an evaluation is requested."""
    if data.type is None and not data.sources:
        yield UserError("data: no corpus is given", wanted="data.type with data.paths, or a list in data.sources")
    if data.sources:
        yield from _unused_beside_sources(data)
    elif data.type is not None:
        yield from _source_is_whole("data", data)
    for index, source in enumerate(data.sources):
        yield from _source_is_whole(f"data.sources.{index}", source)
    held_out = bool(data.held_out or data.held_out_paths)
    held_out |= bool(data.sources) and all(source.held_out_paths for source in data.sources)
    if training.eval_rows and not held_out:
        remedy = "set data.held_out above 0, name data.held_out_paths, or set training.eval_rows to 0"
        yield UserError("data.held_out: no data is held out for the evaluation", got=0, remedy=remedy)


def _source_is_whole(where: str, source: DataConfig | SourceConfig) -> Iterator[UserError]:
    if source.type in WITHOUT_FILES and source.paths:
        remedy = 'leave it empty, or set data.type to "text"' if source.type == "python_stdlib" else "use the key name"
        what = f"{where}.paths: the {source.type} corpus has no paths"
        yield UserError(what, got=list(source.paths), remedy=remedy)
    if source.type not in WITHOUT_FILES and not source.paths:
        yield UserError(f"{where}.paths: a {source.type} corpus needs its files", wanted="files, folders or globs")
    if source.type == "hub" and source.name is None:
        yield UserError(f"{where}.name: missing", wanted="the name of a Hub dataset")
    if source.streaming and source.type in TASK_TYPES:
        yield UserError(f"{where}.streaming: {source.type} data is mapped, not streamed", wanted=False)
    if source.streaming and source.type == "python_stdlib":
        yield UserError(f"{where}.streaming: the standard library is small and cannot be streamed", wanted=False)


def binary_data_has_its_tokenizer(data: DataConfig, tokenizer: TokenizerConfig) -> Iterator[UserError]:
    """Checks that binary data has a tokenizer. It consists of ids, so no tokenizer can be trained on it."""
    if tokenizer.path is None and "cpm_live" in (data.type, *(source.type for source in data.sources)):
        wanted = "the tokenizer that the data was made with"
        yield UserError("tokenizer.path: missing, and cpm_live data consists of ids", wanted=wanted)


def _unused_beside_sources(data: DataConfig) -> Iterator[UserError]:
    for key in ("type", "paths", "name", "subset", "streaming", "held_out_paths"):
        if getattr(data, key):
            yield UserError(f"data.{key}: not allowed together with data.sources", remedy="move it into a source")


def sources_fit_together(data: DataConfig) -> Iterator[UserError]:
    """Checks that all sources or none have weights, that all or none are streamed, and that their names differ."""
    sources = data.sources
    weighed = [source.weight is not None for source in sources]
    if any(weighed) and not all(weighed):
        missing = weighed.index(False)
        yield UserError(f"data.sources.{missing}.weight: missing", wanted="a weight for every source, or for none")
    streamed = {source.streaming for source in sources} | ({data.streaming} if not sources else set())
    if len(streamed) > 1:
        yield UserError("data.sources: some are streamed and some are not", wanted="all of them or none")
    if True in streamed and len(sources) > 1 and not all(weighed):
        remedy = "give every source a weight: how many rows a stream has is not known"
        yield UserError("data.sources: streamed sources without weights", remedy=remedy)
    if True in streamed and data.workers:
        remedy = "set it to 0: a stream is read in the training process"
        yield UserError("data.workers: streamed data has no workers", got=data.workers, remedy=remedy)
    names = source_names(data)
    for name, count in Counter(names).items():
        if count > 1:
            what = f"data.sources: {count} sources have the name {name!r}"
            yield UserError(what, wanted="a different name for each source")
    if data.mixing is not None:
        if len(sources) < 2 or not all(weighed):
            yield UserError("data.mixing: there are no sources to mix", wanted="at least two data.sources with weights")
        for name in [name for name in names if name not in data.mixing.reference]:
            yield UserError(f"data.mixing.reference: the loss of the source {name!r} is missing")
        for name in sorted(data.mixing.reference.keys() - set(names)):
            yield UserError(f"data.mixing.reference: there is no source {name!r}", wanted=", ".join(names))


def source_names(data: DataConfig) -> list[str]:
    """Returns the names of the sources in logs."""
    given = [":".join(part for part in (source.name, source.subset) if part) for source in data.sources]
    return [name or f"{data.sources[index].type}-{index}" for index, name in enumerate(given)]


REPOSITORY = Path(__file__).resolve().parents[2]
TRACKED_FOLDERS = (".ci", ".git", ".venv", "config", "cook", "results/bench", "scripts", "tests")
"""Folders of the repository that a run must not write to."""


def mask_paths(coarse: CoarseConfig | None, fine: FineConfig | None) -> dict[str, str]:
    """Returns the mask files that the scheme names, by their keys."""
    named = {"coarse-grained.coarse_mask": coarse.coarse_mask} if coarse is not None else {}
    if fine is not None:
        keys = ("coarse_mask", "heads_mask", "dimff_mask", "experts_mask", "head_dims_mask", "hidden_mask")
        named |= {f"fine-grained.{key}": path for key in keys if (path := getattr(fine, key)) is not None}
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
    corpora: dict[str, DataConfig | SourceConfig] = {"data": data}
    corpora |= {f"data.sources.{number}": source for number, source in enumerate(data.sources)}
    for where, corpus in corpora.items():
        for key in ("paths", "held_out_paths"):
            named += [(f"{where}.{key}.{index}", path) for index, path in enumerate(getattr(corpus, key))]
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
