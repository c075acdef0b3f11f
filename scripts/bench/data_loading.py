"""Tokenising, preparing and loading text on one core, against the same work with plain Hugging Face `datasets`.

    python scripts/bench/data_loading.py [--text FILE …] [--wait]

Each pair does the same work on the same text with the same ids, in turns; tokens/s are medians. The other side:

- tokenise: `Dataset.map(tokenizer, batched=True)` with the tokenizer's exported fast twin (or transformers' own
  CpmAntTokenizer), written to the library's cache as ours is to a file;
- prepare: the same, then the usual `map` that concatenates a batch of documents and cuts it into rows;
- load: `DataLoader(dataset, shuffle=True)` over those rows, whose collation makes the model's seven tensors.

The default text is the running Python's standard library. `--wait` adds the share of the step time that the default
run spends waiting for data, by the run's own log (`data_wait`), at `--wait-steps` steps of its first stage.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from common import ROOT, publish, run_apart  # noqa: E402

from cook.config.corpus import DataConfig  # noqa: E402
from cook.config.types import TokenizerConfig  # noqa: E402
from cook.data.loader import RowLoader  # noqa: E402
from cook.data.packing import LM_TASK, NO_TARGET, TEXT_SEGMENT  # noqa: E402
from cook.data.prepare import open_split, prepare_rows, prepare_tokens  # noqa: E402
from cook.data.training_data import TrainingData, load_rows  # noqa: E402

BATCHES = 200
Timed = Callable[[], int]
"""Does the work once and returns how many tokens it went through."""


def main() -> None:
    """Measures and publishes."""
    arguments = parse()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        given = {"type": "text", "paths": tuple(arguments.text)} if arguments.text else {"type": "python_stdlib"}
        data = DataConfig(**given, max_length=arguments.max_length)  # type: ignore[arg-type]
        tokenizer = TokenizerConfig(type="sentencepiece", vocab_size=arguments.vocab_size)
        ours = load_rows(data, tokenizer, prompt_length=arguments.prompt_length, output_dir=folder)
        bench = Bench(arguments, data, ours, Path(folder))
        rows = [bench.tokenise(), bench.prepare(), bench.load()]
        if arguments.vocab:
            rows.insert(1, bench.tokenise_words(arguments.vocab))
    if arguments.wait:
        rows.append(waiting(arguments.wait_steps))
    publish("data_loading", vars(arguments), rows, arguments.output)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", default=[], help="text files (default: the standard library)")
    parser.add_argument("--vocab", help="CPM-Ant's vocab.txt: also times its tokenizer")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--prompt-length", type=int, default=32)
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch")
    parser.add_argument("--documents", type=int, default=400, help="documents that are tokenised in one turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--wait", action="store_true", help="also run the default recipe's first stage")
    parser.add_argument("--wait-steps", type=int, default=60)
    parser.add_argument("--output")
    return parser.parse_args()


class Bench:
    """The pairs, on one corpus."""

    def __init__(self, arguments: argparse.Namespace, data: DataConfig, ours: TrainingData, folder: Path):
        self.arguments, self.data, self.tokenizer, self.rows, self.folder = arguments, data, *ours[:2], folder
        self.turn = 0
        corpus = open_split(data)
        self.texts = [text for text, _ in zip(corpus.training_texts(), range(arguments.documents), strict=False)]
        self.corpus = corpus
        self.tokenizer.save(folder / "exported")

    def tokenise(self) -> dict[str, Any]:
        """sentencepiece itself against its exported fast tokenizer under `map`."""
        from transformers import AutoTokenizer

        return self._pair("tokenise", self._ours(self.tokenizer), self._mapped(AutoTokenizer, self.folder / "exported"))

    def tokenise_words(self, vocab: str) -> dict[str, Any]:
        """CPM-Ant's tokenizer against transformers' class."""
        from transformers import CpmAntTokenizer

        from cook.text.jieba import JiebaTokenizer

        JiebaTokenizer.load(vocab).save(self.folder / "words")
        # A fresh one each turn: ours remembers the words it has spelled.
        return self._pair(
            "tokenise, jieba",
            lambda: self._ours(JiebaTokenizer.load(vocab))(),
            self._mapped(CpmAntTokenizer, self.folder / "words"),
        )

    def prepare(self) -> dict[str, Any]:
        """Tokenised, packed rows on the disk."""
        from transformers import AutoTokenizer

        size = self.arguments.max_length - self.arguments.prompt_length
        fast = AutoTokenizer.from_pretrained(self.folder / "exported")

        def ours() -> int:
            tokens = prepare_tokens(_Texts(self.texts), self.tokenizer, self._place())
            rows = prepare_rows(
                tokens,
                self.tokenizer,
                max_length=self.arguments.max_length,
                cache=self._place(),
                prompt_length=self.arguments.prompt_length,
                parts=("train",),
            )
            return int(np.load(rows / "train.used.npy").sum())

        def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
            return {"input_ids": [[2, *ids, 3] for ids in fast(batch["text"], verbose=False)["input_ids"]]}

        def group(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
            flat = [token for ids in batch["input_ids"] for token in ids]
            return {"input_ids": [flat[i : i + size] for i in range(0, len(flat) - size + 1, size)]}

        def theirs() -> int:
            encoded = self._dataset().map(encode, batched=True, remove_columns=["text"])
            return len(encoded.map(group, batched=True)) * size

        return self._pair("prepare", ours, theirs)

    def load(self) -> dict[str, Any]:
        """Shuffled batches of the model's tensors from rows on the disk, an epoch or `BATCHES` batches."""
        import datasets
        from torch.utils.data import DataLoader

        batch, prompt = self.arguments.batch, self.arguments.prompt_length
        count = min(len(self.rows) // batch, BATCHES)
        loader = RowLoader(self.rows, train_batch_size=batch, seed=0)
        columns = {"tokens": list(self.rows.tokens_RT), "span": list(self.rows.spans_RT)}  # type: ignore[union-attr]
        place = self._place()
        datasets.Dataset.from_dict(columns).save_to_disk(place)
        table = datasets.load_from_disk(str(place)).with_format("torch")

        def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
            return collated(rows, prompt)

        def ours() -> int:
            return sum(loader.micro_batches(step, 0, 1, batch)[0]["input"].numel() for step in range(count))

        def theirs() -> int:
            shuffled: Any = DataLoader(table, batch, shuffle=True, collate_fn=collate)
            return sum(some["input"].numel() for some, _ in zip(shuffled, range(count), strict=False))

        mine, other = loader.micro_batches(0, 0, 1, batch)[0], collate([table[int(i)] for i in loader.indices(0)])
        assert all(torch.equal(mine[key], other[key]) for key in mine), "both sides build the same batch"
        return self._pair("load", ours, theirs)

    def _pair(self, what: str, ours: Timed, theirs: Timed) -> dict[str, Any]:
        rates: dict[str, list[float]] = {"cook": [], "datasets": []}
        for _ in range(self.arguments.repeats + 1):  # the first turn warms up
            for name, work in (("cook", ours), ("datasets", theirs)):
                begin = time.perf_counter()
                rates[name].append(work() / (time.perf_counter() - begin))
        mine, other = (statistics.median(rates[name][1:]) for name in ("cook", "datasets"))
        return {"work": what, "cook, tokens/s": mine, "datasets, tokens/s": other, "ratio": mine / other}

    def _ours(self, tokenizer: Any) -> Timed:
        def work() -> int:
            folder = prepare_tokens(_Texts(self.texts), tokenizer, self._place())
            return json.loads((folder / "manifest.json").read_text())["train"]["tokens"]

        return work

    def _mapped(self, kind: Any, folder: Path) -> Timed:
        other = kind.from_pretrained(folder)

        def work() -> int:
            def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
                return {"input_ids": other(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]}

            return sum(map(len, self._dataset().map(encode, batched=True, remove_columns=["text"])["input_ids"]))

        return work

    def _dataset(self) -> Any:
        import datasets

        # From a file of its own, so that the results are written to the cache and not read from it.
        place = self._place()
        datasets.Dataset.from_dict({"text": self.texts}).save_to_disk(place)
        return datasets.load_from_disk(str(place))

    def _place(self) -> Path:
        self.turn += 1
        return self.folder / f"turn-{self.turn}"


class _Texts:
    """Documents in memory, all for training."""

    def __init__(self, texts: list[str]):
        self.texts, self.fingerprint, self.size = texts, "bench", 0

    def documents(self) -> Iterable[tuple[Any, bool]]:
        from cook.data.source_files import Document

        return ((Document(str(number), text), False) for number, text in enumerate(self.texts))


def collated(rows: list[dict[str, torch.Tensor]], prompt: int) -> dict[str, torch.Tensor]:
    """CPM-Ant's batch from stored tokens and spans, with torch, the whole batch at once."""
    tokens, span = (torch.stack([row[key] for row in rows]).long() for key in ("tokens", "span"))
    count, size = tokens.shape
    is_text, column = span != -1, torch.arange(size)
    continues = torch.zeros_like(is_text)
    continues[:, :-1] = is_text[:, 1:] & (span[:, 1:] == span[:, :-1])
    begins = torch.cat([torch.ones(count, 1, dtype=torch.bool), span[:, 1:] != span[:, :-1]], dim=1)
    start = torch.where(begins, column, 0).cummax(dim=1).values

    def row(front: Any, text: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.as_tensor(front, dtype=text.dtype).expand(count, prompt), text], dim=1)

    return {
        "input": row(torch.arange(prompt) + prompt * LM_TASK, tokens),
        "length": prompt + is_text.sum(dim=1),
        "context": row(True, torch.zeros_like(is_text)),
        "position": row(torch.arange(prompt), torch.where(is_text, prompt + column - start, 0)),
        "segment": row(0, torch.where(is_text, TEXT_SEGMENT, 0)),
        "span": row(0, span),
        "targets": row(NO_TARGET, torch.where(continues, tokens.roll(-1, dims=1), NO_TARGET)),
    }


def waiting(steps: int) -> dict[str, Any]:
    """The share of the step time that the default run's first stage waits for data."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "training.eval_rows": 0, "stages.pretrain.training.steps": steps}
        options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
        run_apart(["cook/train.py", "--config", str(ROOT / "config" / "bmcook.json"), "--stage", "pretrain", *options])
        lines = (Path(folder) / "pretrain" / "log.jsonl").read_text().splitlines()
    shares = [record["data_wait"] for record in map(json.loads, lines) if record["step"] > 1]
    return {"work": "wait for data, share of the default run's step time", "ratio": statistics.mean(shares)}


if __name__ == "__main__":
    sys.exit(main())
