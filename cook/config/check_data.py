"""Checks of the corpus: each source by itself, and several sources together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from cook.base.errors import UserError
from cook.config.corpus import DataConfig, SourceConfig
from cook.config.types import TokenizerConfig, TrainingConfig

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
            yield UserError(
                f"data.sources: {count} sources have the name {name!r}", wanted="a different name for each source"
            )
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
