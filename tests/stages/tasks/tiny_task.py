"""A tiny BERT folder, tiny GLUE and SQuAD files in their distributed layouts, and the task command on them."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from tests.stages.tiny_run import REPOSITORY, Result, run

WORDS = ("good", "bad", "film", "the", "a", "was", "it", "plot", "who", "made", "she", "he", "did", "in", "town")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONFIG: dict[str, Any] = dict(
    vocab_size=len(SPECIAL) + len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=64, max_position_embeddings=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
OPTIONS = dict(
    data_dir="data", output_dir="out", max_length="32", epochs="1", train_batch_size="8", eval_batch_size="8",
    learning_rate="0.01", precision="fp32", scoring_steps="3", threads="1", tensorboard="false", log_every="1",
    granularity="16", block="8", seed="7",
)  # fmt: skip


def write_model(folder: Path) -> None:
    """A stock BERT folder with a vocabulary of a few words."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join((*SPECIAL, *WORDS)) + "\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**CONFIG))
    model.bert.save_pretrained(folder)
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)


def sentence(maker: random.Random, mood: str) -> str:
    words = [maker.choice(WORDS[2:]) for _ in range(maker.randint(3, 9))]
    words.insert(maker.randint(0, len(words)), mood)
    return " ".join(words)


def write_sst2(folder: Path, rows: int = 48) -> None:
    """A task that a tiny model learns: one of two words tells the label."""
    maker = random.Random(1)
    (folder / "SST-2").mkdir(parents=True)
    for name, count in (("train", rows), ("dev", rows // 2)):
        lines = ["sentence\tlabel"]
        for _ in range(count):
            label = maker.randint(0, 1)
            lines.append(f"{sentence(maker, WORDS[1 - label])}\t{label}")
        (folder / "SST-2" / f"{name}.tsv").write_text("\n".join(lines) + "\n")


def write_squad(folder: Path, version: str) -> None:
    """Questions on a town; every third of version 2.0 has no answer."""
    maker, number = random.Random(2), 0
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev"):
        paragraphs = []
        for _ in range(6):
            context, qas = sentence(maker, "town") + " " + sentence(maker, "plot"), []
            for _ in range(2):
                number += 1
                word = maker.choice(context.split())
                answer = {"text": word, "answer_start": context.index(word)}
                none = version == "2.0" and number % 3 == 0
                qas.append(
                    {"id": f"q{number}", "question": "who made it", "answers": [] if none else [answer] * 2}
                    | ({"is_impossible": none} if version == "2.0" else {})
                )
            paragraphs.append({"context": context, "qas": qas})
        content = {"version": version, "data": [{"title": "t", "paragraphs": paragraphs}]}
        (folder / f"{split}-v{version}.json").write_text(json.dumps(content))


def task(folder: Path, mode: str, *, ranks: int = 0, keywords: Any = None, **options: str) -> Result:
    """`cook/tasks.py MODE` in `folder`: plain, or with `ranks` under torchrun."""
    command = [sys.executable]
    if ranks:
        command += ["-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command += [str(REPOSITORY / "cook" / "tasks.py"), mode]
    command += [f"--{name}={value}" for name, value in (OPTIONS | options).items()]
    return run(command, folder, **(keywords or {}))


def record(folder: Path, *path: str) -> Any:
    """A JSON file."""
    return json.loads(folder.joinpath(*path).read_text())
