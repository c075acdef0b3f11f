"""A tiny BERT folder, tiny GLUE and SQuAD files in their distributed layouts, and the task command on them.

Started as a script under a launcher it runs a list of commands in one process group, which saves their imports, and
writes what they printed or refused: `python … tiny_task.py CASES.json OUT.json`.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from tests.recipe.tiny_run import REPOSITORY, Result, run

WORDS = ("good", "bad", "film", "the", "a", "was", "it", "plot", "who", "made", "she", "he", "did", "in", "town")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CONFIG: dict[str, Any] = dict(
    vocab_size=len(SPECIAL) + len(WORDS),
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=48,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
OPTIONS = dict(
    data_dir="data",
    output_dir="out",
    max_length="32",
    epochs="1",
    train_batch_size="8",
    eval_batch_size="8",
    learning_rate="0.01",
    precision="fp32",
    scoring_steps="3",
    threads="1",
    tensorboard="false",
    log_every="1",
    granularity="16",
    block="8",
    seed="7",
)


def write_model(folder: Path, **changes: Any) -> None:
    """A stock BERT folder with a vocabulary of a few words."""
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join((*SPECIAL, *WORDS)) + "\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**CONFIG | changes))
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


def write_pairs(folder: Path) -> None:
    """STS-B, whose score is 5 where both texts have the mood `good`, and MNLI in its three files."""
    maker = random.Random(3)
    stsb = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore\n"
    mnli = "\t".join(f"column{n}" for n in range(8)) + "\tsentence1\tsentence2\tlabel1\tgold_label\n"
    for name in ("STS-B", "MNLI"):
        (folder / name).mkdir(parents=True)
    for split, count in (("train", 48), ("dev", 16)):
        for _ in range(count):
            mood = maker.choice(WORDS[:2])
            pair = f"{sentence(maker, mood)}\t{sentence(maker, mood)}"
            stsb += "0\tg\tf\t1\t0\ts\ts\t" + pair + f"\t{5.0 * (mood == 'good')}\n"
            mnli += "x\t" * 8 + pair + "\tneutral\t" + maker.choice(("neutral", "entailment", "-")) + "\n"
        (folder / "STS-B" / f"{split}.tsv").write_text(stsb)
        for file in ("train",) if split == "train" else ("dev_matched", "dev_mismatched"):
            (folder / "MNLI" / f"{file}.tsv").write_text(mnli)


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


def options(**changes: str) -> list[str]:
    """The options of a tiny run."""
    return [f"--{name}={value}" for name, value in (OPTIONS | changes).items()]


def task(folder: Path, mode: str, **changes: str) -> Result:
    """`cook/tasks.py MODE` in `folder`."""
    return run([sys.executable, str(REPOSITORY / "cook" / "tasks.py"), mode, *options(**changes)], folder)


def tasks(folder: Path, cases: dict[str, tuple[str, dict[str, str]]], ranks: int = 1) -> dict[str, dict[str, str]]:
    """Several commands (mode and options by name) one after the other; what each printed, and its error."""
    (folder / "cases.json").write_text(json.dumps({n: [mode, *options(**o)] for n, (mode, o) in cases.items()}))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    python = [sys.executable, "-W", "ignore"]
    result = run([*python, *launcher, __file__, "cases.json", "told.json"], folder, timeout=400)
    assert result.code == 0, result
    return record(folder, "told.json")


def record(folder: Path, *path: str) -> Any:
    """A JSON file."""
    return json.loads(folder.joinpath(*path).read_text())


def main() -> None:
    from cook.base import distributed
    from cook.base.errors import UserError
    from cook.config.tasks import parse_task_options
    from cook.recipe.benchmarks.task_export import run_export
    from cook.recipe.benchmarks.task_stages import run_pretrain, run_prune
    from cook.training.engine import initialise_processes, leave_processes

    initialise_processes(1)
    told = {}
    for name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
        printed, error = io.StringIO(), ""
        with contextlib.redirect_stdout(printed):
            try:
                config = parse_task_options(arguments)
                run = {"pretrain": run_pretrain, "prune": run_prune, "export": run_export}[config.mode]
                run(config, lambda step, phase: None)
            except UserError as mistake:
                error = str(mistake)
        told[name] = {"out": printed.getvalue(), "error": error}
    if distributed.rank() == 0:
        Path(sys.argv[2]).write_text(json.dumps(told))
    leave_processes()


if __name__ == "__main__":
    main()
