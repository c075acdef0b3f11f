"""What binary data holds: files, records, tasks, lengths, a few samples. Every record is read and checked."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cook.base.errors import UserError
from cook.data.cpm_live import records as tasks
from cook.data.cpm_live.dataset import LiveDataset, open_live
from cook.data.cpm_live.meta import read_meta
from cook.text.tokenizer import Tokenizer

TASK_NAMES = {
    tasks.MASKED_LM: "masked LM",
    tasks.LM: "LM",
    tasks.CONTEXT: "context",
    tasks.GENERATE: "generation",
    tasks.GENERATE_SECOND: "generation",
    tasks.TOLD: "target",
    tasks.WRONG_CHOICE: "wrong option",
    tasks.RIGHT_CHOICE: "right option",
}
BINS = 10
BAR = 40
SHOWN_CHARS = 200


def inspect(folders: Sequence[Path], *, tokenizer: Tokenizer | None, samples: int, workers: int) -> dict[str, Any]:
    """The facts of all folders together, and `samples` records; with a tokenizer, their text.

    Raises:
        UserError: the data is damaged, or of another tokenizer.
    """
    metas = [read_meta(folder) for folder in folders]
    with tempfile.TemporaryDirectory(prefix="cook-inspect-") as cache:
        data = open_live([str(folder) for folder in folders], Path(cache), workers)
        files = [
            {"file": str(meta.folder / file.file_name), "version": meta.version, "blocks": file.num_blocks}
            | {"block_size": file.block_size, "records": file.nlines, "masked": file.mask}
            for meta in metas
            for file in meta.files
        ]
        facts = {"files": files, **describe(data)}
        chosen = np.unique(np.linspace(0, max(len(data) - 1, 0), samples).astype(int)).tolist()
        facts["samples"] = [sample(data, number, tokenizer) for number in chosen if number < len(data)]
    if tokenizer is not None and data.largest_token >= tokenizer.vocab_size:
        raise UserError(
            "a token is outside of the tokenizer's vocabulary",
            wanted=f"below {tokenizer.vocab_size}",
            got=data.largest_token,
            remedy="name the tokenizer with which the data was made",
        )
    return facts


def describe(data: LiveDataset) -> dict[str, Any]:
    """Counts over all records, and a histogram of their lengths in tokens."""
    lengths = np.asarray(data.column["tokens"])
    counts, edges = np.histogram(lengths, BINS) if len(lengths) else (np.zeros(0, int), np.zeros(1))
    segment_tasks = Counter(np.asarray(data.column["segment_task"]).tolist())
    return {
        "records": len(data),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "largest_token": data.largest_token,
        "segments": len(data.column["segment_task"]),
        "segment_tasks": {TASK_NAMES[task]: count for task, count in sorted(segment_tasks.items())},
        "prompts": dict(sorted(Counter(np.asarray(data.column["task"]).tolist()).items())),
        "lengths": {
            name: float(function(lengths)) if len(lengths) else 0.0
            for name, function in (("min", np.min), ("median", np.median), ("mean", np.mean), ("max", np.max))
        },
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        "digest": data.fingerprint,
    }


def sample(data: LiveDataset, number: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """One record: where it is, its segments, its text or tokens."""
    record = data.record(number)
    shown: dict[str, Any] = {
        "record": number,
        "place": data.place(number),
        "task": record.task,
        "segments": [list(segment) for segment in record.segments],
    }
    if tokenizer is None or (len(record.tokens) and record.tokens.max() >= tokenizer.vocab_size):
        return shown | {"tokens": record.tokens.tolist()}
    return shown | {"text": tokenizer.decode(record.tokens.tolist())}


def show(facts: dict[str, Any]) -> None:
    """Prints the facts for a reader."""
    for file in facts["files"]:
        masked = ", masked" if file["masked"] else ""
        size = f"{file['blocks']} block(s) of {file['block_size']} bytes"
        print(f"{file['file']}: version {file['version']}, {size}, {file['records']} records{masked}")
    print(f"\nrecords  {facts['records']:>14,}")
    print(f"tokens   {facts['tokens']:>14,}   (largest id {facts['largest_token']})")
    for name, count in facts["segment_tasks"].items():
        print(f"  {name:<16} {count:>12,} segments")
    print("prompts  " + ", ".join(f"task {task}: {count:,}" for task, count in facts["prompts"].items()))
    lengths = facts["lengths"]
    print("lengths  " + ", ".join(f"{name} {value:,.0f}" for name, value in lengths.items()) + " tokens")
    edges, counts = facts["histogram"]["edges"], facts["histogram"]["counts"]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        bar = "#" * -(-BAR * count // max(counts))
        print(f"  {low:>7,.0f} – {high:>7,.0f} {count:>12,} {bar}")
    for shown in facts["samples"]:
        print(f"\nrecord {shown['record']} ({shown['place']}), task {shown['task']}, segments {shown['segments']}")
        text = shown["text"] if "text" in shown else " ".join(map(str, shown["tokens"]))
        text = text.replace("\n", "\\n")
        print(f"  {text[:SHOWN_CHARS]}{'…' if len(text) > SHOWN_CHARS else ''}")
    print(f"\nwhole: every record was read, the counts are those of meta.bin; content {facts['digest'][:16]}")
