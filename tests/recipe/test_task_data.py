"""A run on binary data and downstream objects, from the commands that make the data to the trained model."""

from __future__ import annotations

import json
import math
import random

import pytest

from cook.cli import invoke
from tests.recipe.tiny_run import read_log, train, write_run


@pytest.fixture
def folder(tmp_path):
    """A run's folder with `live/`, a single block of binary data, and `asked.jsonl`."""
    rng = random.Random(0)
    numbers = [[rng.randrange(10) for _ in range(2)] for _ in range(60)]
    objects = [{"input": f"{a}+{b}=", "target": str(a + b)} for a, b in numbers]
    objects += [{"input": f"{a}+{b}=", "options": [str(a + b + 1), str(a + b)], "target": 1} for a, b in numbers]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(value) + "\n" for value in objects))
    source = {"weight": 1.0, "paths": ["asked.jsonl"], "type": "downstream"}
    sources = [source, {"weight": 2.0, "paths": ["live"], "type": "cpm_live"}]
    write_run(
        tmp_path,
        data={"max_length": 72, "held_out": 0.2, "sources": sources},
        training__steps=5,
        tokenizer={"type": "sentencepiece", "path": "x.model", "vocab_size": 400},
    )
    made = [str(tmp_path / name) for name in ("docs/json.txt", "x.model", "live")]
    invoke("data", ["tokenizer", made[0], "--format", "text", "--output", made[1], "--vocab-size", "400"])
    invoke(
        "data",
        [
            "preprocess",
            made[0],
            "--format",
            "text",
            "--output",
            made[2],
            "--tokenizer",
            made[1],
            "--max-length",
            "72",
            "--prompt-length",
            "4",
            "--block-size",
            "1M",
            "--workers",
            "1",
        ],
    )
    return tmp_path


def test_two_ranks_train_on_one_block_and_on_questions(folder):
    done = train(folder, "--stage", "pretrain", ranks=2)
    assert done.code == 0, done
    log = read_log(folder, "pretrain")
    assert all(math.isfinite(record["loss"]) for record in log if "loss" in record), log
    live = folder / "live" / "part-00000"
    live.write_bytes(b"\x42" + live.read_bytes()[1:])
    refused = train(folder, "--stage", "pretrain", "--resume", "never")
    assert refused.code == 2 and "live/part-00000, block 0, offset 0: the byte 0x42" in refused.err, refused
