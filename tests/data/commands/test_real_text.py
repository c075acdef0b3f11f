"""Real Chinese and English text through all steps: tokenizer, binary data, its commands, rows of tasks.

COOK_REAL_TEXT=FOLDER python -m pytest -m real_text
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from cook.cli import invoke
from cook.data.cpm_live.dataset import open_live
from cook.data.cpm_tasks.task_data import open_task_rows
from cook.data.token_loss import count_targets
from cook.text.sentencepiece import SentencePieceTokenizer
from tests.data import real_text
from tests.data.cpm_live import reference
from tests.data.cpm_tasks.test_task_data import section

pytestmark = pytest.mark.real_text
BLOCK = 1 << 20
MAX_LENGTH, PROMPT = 256, 32
OPTIONS = ["--max-length", str(MAX_LENGTH), "--prompt-length", str(PROMPT), "--block-size", str(BLOCK)]


@pytest.fixture(scope="module", params=["chinese", "english"])
def made(request, tmp_path_factory):
    """A folder with `corpus.txt`, `x.model` and `live/` made of it, and the documents."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "chinese":
        texts, format = real_text.peoples_daily(), "lines"
    else:
        texts, format = [real_text.enwik8(10_000_000)], "text"
    (folder / "corpus.txt").write_text("\n".join(texts), encoding="utf-8", newline="")
    corpus, model, live = (str(folder / name) for name in ("corpus.txt", "x.model", "live"))
    invoke("data", ["tokenizer", corpus, "--output", model, "--vocab-size", "8000", "--format", format])
    command = ["preprocess", corpus, "--tokenizer", model, "--format", format, "--part-size", "3M", *OPTIONS]
    invoke("data", [*command, "--output", live, "--workers", "2"])
    invoke("data", [*command, "--output", str(folder / "alone"), "--workers", "1"])
    return folder, texts


def test_every_record_is_a_piece_of_the_text(made):
    folder, texts = made
    tokenizer = SentencePieceTokenizer.load(folder / "x.model")
    records = reference.read_folder(folder / "live", BLOCK)
    assert len(records) > 5000
    whole = "\n".join(texts)
    for record in records[:: len(records) // 200]:
        text = tokenizer.decode(record[6:-1])
        # Cut inside a character that is spelled in bytes, a piece begins or ends with a part of it.
        assert text.strip("\ufffd") in whole, text
    if len(texts) > 1:
        ids = [tokenizer.encode(text.strip()) for text in texts]
        piece = MAX_LENGTH - PROMPT - 2
        lengths = [min(piece, len(i) - b) for i in ids for b in range(0, len(i), piece)]
        assert sum(n for n in lengths if n >= 32) == sum(len(record) - 7 for record in records)


def test_two_workers_write_what_one_does(made):
    folder, _ = made
    files = {path.name: path.read_bytes() for path in (folder / "live").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (folder / "alone").iterdir()}


def test_commands_keep_every_record(made, tmp_path, capsys):
    folder, _ = made
    invoke("data", ["shuffle", str(folder / "live"), "--output", str(tmp_path / "shuffled"), "--memory", "4M"])
    invoke("data", ["convert", str(tmp_path / "shuffled"), "--output", str(tmp_path / "two"), "--version", "2"])
    invoke("data", ["merge", str(tmp_path / "two"), str(folder / "live"), "--output", str(tmp_path / "merged")])
    capsys.readouterr()
    facts = []
    for path in (folder / "live", tmp_path / "merged"):
        invoke("data", ["inspect", str(path), "--json", "--tokenizer", str(folder / "x.model")])
        facts.append(json.loads(capsys.readouterr().out))
    assert facts[1]["records"] == 2 * facts[0]["records"] and facts[1]["tokens"] == 2 * facts[0]["tokens"]
    data = open_live([tmp_path / "merged"], tmp_path / "cache")
    half = facts[0]["records"]
    digests = np.array([hash(data.record(n).numbers().tobytes()) for n in range(2 * half)])
    assert np.array_equal(np.sort(digests[:half]), np.sort(digests[half:]))


def test_rows_hold_every_token_once(made, tmp_path):
    folder, _ = made
    tokenizer = SentencePieceTokenizer.load(folder / "x.model")
    data = section(type="cpm_live", paths=(str(folder / "live"),), held_out=0.03, max_length=MAX_LENGTH)
    train, held_out, *_ = open_task_rows(data, tokenizer, prompt_length=PROMPT, cache=tmp_path, seed=0)
    records = reference.read_folder(folder / "live", BLOCK)
    expected = np.bincount(np.concatenate([record[5:] for record in records]), minlength=8000)
    found, told = np.zeros(8000, np.int64), 0
    for rows in (train, held_out):
        for begin in range(0, len(rows), 64):
            indices = np.arange(begin, min(begin + 64, len(rows)))
            batch = rows.batch(indices, epoch=1)
            found += np.bincount(batch["input"][batch["segment"] != 0].numpy(), minlength=8000)
            assert rows.num_targets(indices, epoch=1).sum() == count_targets(batch)
            told += int(count_targets(batch))
    assert np.array_equal(found, expected)
    assert 0.4 < told / expected.sum() < 0.6  # half of a segment on average
