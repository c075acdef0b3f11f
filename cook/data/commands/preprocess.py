"""Text or JSON lines to a tokenizer, or to binary data as CPM-Ant's preprocessing does it, in parallel.

The input of `preprocess` is cut into parts that depend on the files and on --part-size alone. Every part becomes one
data file, so any number of workers writes the same bytes, and a killed run resumes with the unfinished parts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cook.base.errors import Interrupted, UserError
from cook.base.files import read_json, write_json
from cook.base.pool import in_order
from cook.data.cache import fingerprint_of
from cook.data.commands import common
from cook.data.commands.pieces import (
    COUNTS,
    Part,
    Settings,
    input_files,
    parts_of,
    records_of,
    texts_of,
)
from cook.data.corpus import MIN_REST
from cook.data.cpm_live.meta import FileInfo, write_meta
from cook.data.cpm_live.writer import LiveWriter
from cook.data.reports import LeftOut, Progress
from cook.text.tokenizer import Tokenizer, load_tokenizer

FORMAT = 2
"""Raised whenever the same inputs would give other records."""

UNFINISHED = ".unfinished"


def train_tokenizer(
    inputs: Sequence[str], target: Path, *, format: str | None, text_field: str, vocab_size: int, seed: int
) -> None:
    """Trains a sentencepiece tokenizer as a run without a tokenizer does, and writes `target`.

    Raises:
        UserError: the target exists, or there is no text to read.
    """
    # Imported late: PyTorch comes with it, which the workers of `preprocess` do without.
    from cook.data.prepare import NOT_SAMPLED
    from cook.text.sentencepiece import train_sentencepiece

    common.check_new_file(target)
    left_out = LeftOut()
    texts = texts_of(inputs, format=format, text_field=text_field, left_out=left_out, doing="reading")
    left_out.add(NOT_SAMPLED, train_sentencepiece(texts, target, vocab_size=vocab_size, seed=seed))
    print(f"{target}: {vocab_size} ids")
    for sentence in left_out.sentences("the input"):
        print(sentence)


def preprocess(
    inputs: Sequence[str],
    output: Path,
    *,
    tokenizer: str,
    tokenizer_type: str | None,
    settings: Settings,
    workers: int,
    part_size: int,
) -> None:
    """Writes the records of `inputs` to `output`, or resumes there.

    Args:
        inputs: Files, folders or glob patterns.
        output: A new folder, or one with an unfinished run of the same job.
        tokenizer: Its file or folder.
        tokenizer_type: `hf`, `sentencepiece` or `jieba`; None: the path shows it.
        settings: What the records depend on.
        workers: Processes.
        part_size: Bytes of input per part.

    Raises:
        UserError: a setting is out of its range, there are no documents, or the output holds something else.
        Interrupted: by the user; finished parts are kept.
    """
    _check(settings)
    named = common.tokenizer_type(tokenizer, tokenizer_type), tokenizer
    fingerprint = load_tokenizer(*named).fingerprint
    passed = LeftOut()
    files = input_files(inputs, settings.format, passed)
    parts = parts_of(files, part_size)
    seen = [[name, path.stat().st_size, path.stat().st_mtime_ns] for path, name in files]
    job = fingerprint_of(FORMAT, asdict(settings), fingerprint, seen, part_size)
    folder = _folder(output, job)
    done = [part for part in parts if _finished(folder, part) is not None]
    todo = [part for part in parts if _finished(folder, part) is None]
    if done:
        print(f"resuming: {len(done)} of {len(parts)} parts are done")
    workers = max(1, min(workers, len(todo)))
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers == 1 else "false"
    with Progress("preprocessing", sum(part.size for part in parts)) as progress:
        progress.advance(sum(part.size for part in done))
        jobs = [(part, settings, str(folder)) for part in todo]
        try:
            for part, _ in zip(todo, in_order(write_part, jobs, workers, _load_tokenizer, named), strict=True):
                progress.advance(part.size)
        except KeyboardInterrupt:
            raise Interrupted("finished parts are kept; run the same command to resume") from None
    _finish(folder, parts, settings, passed)


def _check(settings: Settings) -> None:
    if not 0.0 <= settings.masked_share <= 1.0:
        raise UserError("--masked-share is out of range", wanted="0 to 1", got=settings.masked_share)
    if settings.piece < MIN_REST:
        wanted = f"at least {settings.prompt_length + 2 + MIN_REST} with a prompt of {settings.prompt_length}"
        raise UserError("--max-length leaves too little room for a piece", wanted=wanted, got=settings.max_length)


def _folder(folder: Path, job: str) -> Path:
    state = folder / UNFINISHED / "job.json"
    if state.is_file():
        if read_json(state).get("job") != job:
            raise UserError(
                f"--output: {folder} contains an unfinished run with other inputs, settings or tokenizer",
                remedy="use the same inputs, settings and tokenizer to resume, or remove the folder",
            )
        return folder
    folder = common.new_folder(folder)
    write_json(state, {"job": job})
    return folder


def _note_of(folder: Path, part: Part) -> Path:
    return folder / UNFINISHED / f"part-{part.number:05d}.json"


def _finished(folder: Path, part: Part) -> dict[str, Any] | None:
    note = _note_of(folder, part)
    return read_json(note) if note.is_file() else None


_tokenizer: Tokenizer | None = None  # of a worker process; loading it may take seconds


def _load_tokenizer(type: str, path: str) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer(type, path)


def write_part(part: Part, settings: Settings, folder: str) -> None:
    """Writes the data file of one part, then the note that it is done."""
    assert _tokenizer is not None
    counts, left_out = dict.fromkeys(COUNTS, 0), LeftOut()
    path = Path(folder) / f"part-{part.number:05d}"
    with LiveWriter(path, version=settings.version, block_size=settings.block_size) as writer:
        for record in records_of(part, settings, _tokenizer, counts, left_out):
            writer.write(record.numbers())
    counts["records"] = writer.nlines
    if not writer.nlines:
        path.unlink()
    info = asdict(writer.info()) if writer.nlines else None
    write_json(_note_of(Path(folder), part), {"info": info, "counts": counts, "left_out": left_out.record()})


def _finish(folder: Path, parts: list[Part], settings: Settings, left_out: LeftOut) -> None:
    notes = [_finished(folder, part) for part in parts]
    totals = {name: sum(note["counts"][name] for note in notes if note is not None) for name in COUNTS}
    infos = []
    for note in notes:
        assert note is not None, "every part has been written"
        left_out.include(note["left_out"])
        if note["info"] is not None:
            infos.append(FileInfo(**note["info"]))
    if not infos:
        raise UserError(
            f"no document has as many as {MIN_REST} tokens: nothing to write",
            got=f"{totals['documents']} documents; left out: {left_out}",
            remedy="if the lines are not whole documents, try --format text",
        )
    write_meta(folder, settings.version, infos)
    shutil.rmtree(folder / UNFINISHED)
    print(
        f"{folder}: {totals['records']} records of {totals['documents']} documents, {totals['tokens']} tokens in "
        f"{len(infos)} file(s) of version {settings.version}"
    )
    for sentence in left_out.sentences(str(folder)):
        print(sentence)
