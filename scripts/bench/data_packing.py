"""Tokenising, and building and packing of CPM-Ant's tasks, against the same work written with plain HF datasets.

    python scripts/bench/data_packing.py [--text FILE ...]

One core. Tokenising: cook's `encode_batch` over groups of documents, against `datasets` `map(batched=True)` with the
same tokenizer. Packing: from records on the disk to the first epoch's batches of tensors: what is hidden is drawn,
targets, prompts, segments and spans are built, samples are put into rows first fit. Against: a table of the same
records, one `map` that builds a sample, one batched `map` that groups samples into rows, batches read in torch format.
Later epochs: cook draws and builds anew; the table reads what it has stored, always the same draws.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import publish

PROMPT = 32
KEYS = ("input", "context", "position", "segment", "span", "targets")
PADDING = {"input": 0, "context": False, "position": 0, "segment": 0, "span": -1, "targets": -100}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def documents(paths: list[str], limit: int) -> list[str]:
    from cook.data.corpus import open_corpus

    texts, size = [], 0
    for document in open_corpus("text" if paths else "python_stdlib", paths).documents():
        texts.append(document.text[: limit - size])
        size += len(texts[-1])
        if size >= limit:
            break
    return texts


def tokenise_cook(tokenizer: Any, texts: list[str]) -> int:
    from cook.data.corpus import grouped

    count = 0
    for group in grouped(texts, len):
        for ids in tokenizer.encode_batch(group):
            count += len(ids.astype(np.uint16).tobytes()) // 2
    return count


def tokenise_table(tokenizer: Any, texts: list[str]) -> int:
    from datasets import Dataset

    table = Dataset.from_dict({"text": texts})
    table = table.map(
        lambda batch: {"ids": [tokenizer.encode(text) for text in batch["text"]]}, batched=True, remove_columns=["text"]
    )
    return sum(len(ids) for ids in table.with_format("numpy")["ids"])


def build_sample(record: dict[str, Any]) -> dict[str, Any]:
    """A sample as CPM-Ant builds it, written plainly."""
    task, tokens = record["task"], np.array(record["tokens"])
    count = random.randint(1, len(tokens) - 1)
    context = np.full(len(tokens), True)
    if task == 1:
        context[np.random.choice(len(tokens) - 1, count, replace=False) + 1] = False
    else:
        context[len(tokens) - count :] = False
    targets = np.full(len(tokens), -100)
    targets[:-1] = np.where(context[1:], -100, tokens[1:])
    front = np.arange(PROMPT)
    return {
        "input": np.concatenate([front + PROMPT * task, tokens]),
        "context": np.concatenate([np.full(PROMPT, True), context]),
        "position": np.arange(PROMPT + len(tokens)),
        "segment": np.concatenate([np.zeros(PROMPT, int), np.full(len(tokens), task)]),
        "targets": np.concatenate([np.full(PROMPT, -100), targets]),
    }


def group_rows(samples: dict[str, list], max_length: int) -> dict[str, list]:
    """The samples of a batch of the table, first fit into rows."""
    rows: list[dict[str, list]] = []
    for index in range(len(samples["input"])):
        size = len(samples["input"][index])
        for row in rows:
            if len(row["input"]) + size <= max_length:
                break
        else:
            row = {key: [] for key in KEYS}
            rows.append(row)
        span = row["span"][-1] + 1 if row["span"] else 0
        for key in KEYS:
            row[key] += [span] * size if key == "span" else samples[key][index]
    result: dict[str, list] = {key: [] for key in KEYS} | {"length": [len(row["input"]) for row in rows]}
    for row in rows:
        for key in KEYS:
            result[key].append(row[key] + [PADDING[key]] * (max_length - len(row[key])))
    return result


def pack_table(folder: Path, max_length: int, batch_size: int) -> tuple[float, float]:
    """Seconds of the first epoch (both maps and reading) and of a later one (reading)."""
    from datasets import load_from_disk

    def epoch(table: Any) -> None:
        for batch in table.iter(batch_size):
            assert batch["input"].dtype == torch.int64

    start = time.perf_counter()
    table = load_from_disk(str(folder))
    table = table.map(build_sample, remove_columns=table.column_names, load_from_cache_file=False)
    table = table.map(
        lambda samples: group_rows(samples, max_length),
        batched=True,
        remove_columns=table.column_names,
        load_from_cache_file=False,
    ).with_format("torch")
    epoch(table)
    first = time.perf_counter() - start
    return first, timed(lambda: epoch(table))[0]


def pack_cook(folder: Path, max_length: int, batch_size: int) -> tuple[float, float]:
    """Seconds of the first epoch (index, packing, batches) and of a later one (batches, drawn anew)."""
    from cook.base.files import write_json
    from cook.data.cpm_live.dataset import open_live
    from cook.data.cpm_tasks.task_rows import TaskRows, pack_records

    def epoch(rows: TaskRows, number: int) -> None:
        order = np.random.default_rng(number).permutation(len(rows))
        for begin in range(0, len(order), batch_size):
            assert rows.batch(order[begin : begin + batch_size], number)["input"].dtype == torch.int64

    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        data = open_live([folder], Path(cache), workers=1)
        packed = Path(cache) / "packed"
        packed.mkdir()
        sizes = {"max_length": max_length, "prompt_length": PROMPT}
        pack_records(data, np.arange(len(data)), **sizes, folder=packed, part="train")
        files = {path.name: path.stat().st_size for path in packed.iterdir()}
        write_json(packed / "manifest.json", {"fingerprint": "", **sizes, "files": files})
        rows = TaskRows(data, packed, "train", seed=0)
        epoch(rows, 0)
        first = time.perf_counter() - start
        return first, timed(lambda: epoch(rows, 1))[0]


def prepare(tokenizer: Any, texts: list[str], root: Path, max_length: int) -> int:
    """The same records as binary data and as a table on the disk; returns their tokens."""
    from datasets import Dataset

    from cook.data.commands.common import write_folder
    from cook.data.cpm_live.records import Record, Segment

    records, piece = [], max_length - PROMPT - 2
    rng = random.Random(0)
    for ids in tokenizer.encode_batch(texts):
        for begin in range(0, len(ids), piece):
            part = ids[begin : begin + piece]
            if len(part) >= 32:
                task = rng.choice([1, 2])
                tokens = np.array([tokenizer.bos_id, *part, tokenizer.eos_id], np.int64)
                records.append(Record(task, (Segment(len(tokens), task, task - 1),), tokens))
    (root / "live").mkdir()
    write_folder(root / "live", (record.numbers() for record in records), version=1, block_size=16 << 20)
    table = {"task": [record.task for record in records], "tokens": [record.tokens for record in records]}
    Dataset.from_dict(table).save_to_disk(str(root / "table"))
    return sum(len(record.tokens) for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    real = Path(os.environ.get("COOK_REAL_TEXT", ""), "enwik8")
    given = [str(real)] if real.is_file() else []
    parser.add_argument("--text", nargs="*", default=given, help="default: $COOK_REAL_TEXT/enwik8, else the library")
    parser.add_argument("--characters", type=int, default=8_000_000)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, whatever the libraries would take
    torch.set_num_threads(1)

    import datasets

    from cook.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece

    datasets.disable_progress_bars()
    texts = documents(arguments.text, arguments.characters)
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        train_sentencepiece(texts, root / "x.model", vocab_size=arguments.vocab_size, seed=0, sample_chars=2_000_000)
        tokenizer = SentencePieceTokenizer.load(root / "x.model")
        tokens = prepare(tokenizer, texts, root, arguments.max_length)
        sizes = (arguments.max_length, arguments.batch_size)
        for _ in range(arguments.repeats):
            ours, count = timed(lambda: tokenise_cook(tokenizer, texts))
            theirs, other = timed(lambda: tokenise_table(tokenizer, texts))
            assert count == other, "both tokenise the same"
            values = {"tokenise cook": ours, "tokenise table": theirs}
            values["first cook"], values["later cook"] = pack_cook(root / "live", *sizes)
            values["first table"], values["later table"] = pack_table(root / "table", *sizes)
            for name, value in values.items():
                seconds.setdefault(name, []).append(value)

    def row(what: str, key: str, amount: int, bar: str | None) -> dict[str, Any]:
        ours, theirs = (statistics.median(seconds[f"{key} {side}"]) for side in ("cook", "table"))
        return {
            "what": what,
            "cook, tokens/s": amount / ours,
            "HF datasets, tokens/s": amount / theirs,
            "ratio": theirs / ours,
            "bar": bar,
        }

    publish(
        "data_packing",
        {**vars(arguments), "tokens": tokens, "datasets": datasets.__version__, "cores": 1},
        [
            row("tokenising", "tokenise", count, None),
            row("tasks and packing, first epoch", "first", tokens, "≥ 3"),
            row("tasks and packing, a later epoch", "later", tokens, None),
        ],
        arguments.output,
    )


if __name__ == "__main__":
    main()
