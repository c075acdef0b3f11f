"""Text to binary data: the records of the rules, whatever the number of workers and however often it was killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cook.base.errors import Interrupted, UserError
from cook.text.sentencepiece import SentencePieceTokenizer
from tests.data.commands.conftest import WORDS
from tests.data.cpm_live import reference

ROOT = Path(__file__).resolve().parents[3]
BLOCK = 1 << 16
PIECE = 80 - 4 - 2
OPTIONS = ["--max-length", 80, "--prompt-length", 4, "--block-size", BLOCK, "--part-size", "4K", "--workers", 1]


@pytest.fixture
def texts():
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=rng.choice([5, 40, 150]))) for _ in range(120)]


@pytest.fixture
def corpus(tmp_path, texts):
    path = tmp_path / "corpus.txt"
    path.write_text("".join(text.replace("and", "<n>") + "\n" for text in texts))
    return path


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("version", [1, 2])
def test_records_follow_the_rules(tmp_path, texts, corpus, tokenizer, tokenizer_path, run, version):
    printed = run(
        "preprocess",
        corpus,
        "--output",
        tmp_path / "out",
        "--tokenizer",
        tokenizer_path,
        *OPTIONS,
        "--version",
        version,
    )
    found = reference.read_folder(tmp_path / "out", BLOCK)
    expected, dropped = [], 0
    for text in texts:
        ids = tokenizer.encode(text.replace("and", "\n"))
        for begin in range(0, len(ids), PIECE):
            piece = ids[begin : begin + PIECE]
            if len(piece) >= 32:
                expected.append([tokenizer.bos_id, *piece, tokenizer.eos_id])
            else:
                dropped += len(piece)
    assert [record[5:] for record in found] == expected
    assert all(r[:5] in ([1, 1, len(r) - 5, 1, 0], [2, 1, len(r) - 5, 2, 1]) for r in found)
    masked = sum(record[0] == 1 for record in found) / len(found)
    assert abs(masked - 0.5) < 4 * (0.25 / len(found)) ** 0.5
    assert f"{len(expected)} records of 120 documents" in printed and f"shorter than 32 tokens: {dropped:,}" in printed


def test_json_lines_and_the_share_of_masked_pieces(tmp_path, texts, tokenizer, tokenizer_path, run):
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    for share, task in ((0, 2), (1, 1)):
        out = tmp_path / f"out{share}"
        run(
            "preprocess",
            tmp_path / "x.jsonl",
            "--output",
            out,
            "--tokenizer",
            tokenizer_path,
            *OPTIONS,
            "--text-field",
            "body",
            "--masked-share",
            share,
        )
        records = reference.read_folder(out, BLOCK)
        assert {record[0] for record in records} == {task}
        assert records[0][6 : 6 + 32] == next(ids for ids in map(tokenizer.encode, texts) if len(ids) >= 32)[:32]


def test_workers_change_nothing(tmp_path, corpus, tokenizer_path, run):
    def folder(name, *options):
        run("preprocess", corpus, "--output", tmp_path / name, "--tokenizer", tokenizer_path, *OPTIONS, *options)
        return content(tmp_path / name)

    alone = folder("alone")
    assert len(alone) > 5 and folder("several", "--workers", 2) == alone
    assert folder("other", "--seed", 1) != alone


def test_a_mistake_in_a_worker_is_told_as_in_this_process(tmp_path, corpus, tokenizer_path, run):
    with open(corpus, "ab") as file:
        file.write(b"\xff\n")
    command = ["preprocess", corpus, "--output", tmp_path / "out", "--tokenizer", tokenizer_path, *OPTIONS]
    with pytest.raises(UserError, match=f"not UTF-8 at offset {corpus.stat().st_size - 2}"):
        run(*command, "--workers", 2)


def test_a_killed_run_resumes(tmp_path, corpus, tokenizer_path, run):
    """Killed by SIGKILL with its workers at work; run again, it gives the bytes of the run that was left alone."""
    options = [str(option) for option in OPTIONS[:-2]]
    command = ["preprocess", str(corpus), "--tokenizer", str(tokenizer_path), *options]
    run(*command, "--workers", 1, "--output", tmp_path / "whole")
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "cook", "data", *command, "--workers", "2", "--output", str(out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not list(out.glob(".unfinished/part-*.json")) and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (out / "meta.bin").exists() or process.returncode == 0
    notes = {path: path.stat().st_mtime_ns for path in out.glob(".unfinished/part-*.json")}
    printed = run(*command, "--workers", 1, "--output", out) if process.returncode == -signal.SIGKILL else "resuming"
    assert "resuming" in printed and (notes or process.returncode == 0)
    assert content(out) == content(tmp_path / "whole")


@pytest.fixture
def unfinished(tmp_path, corpus, tokenizer_path, run, monkeypatch):
    """A run that stopped after two parts."""
    import cook.data.commands.preprocess as preprocess

    real, calls = preprocess.write_part, []

    def stops(part, settings, folder):
        calls.append(part)
        if len(calls) > 2:
            raise KeyboardInterrupt
        real(part, settings, folder)

    command = ["preprocess", corpus, "--output", tmp_path / "out", "--tokenizer", tokenizer_path, *OPTIONS]
    with monkeypatch.context() as patch:
        patch.setattr(preprocess, "write_part", stops)
        with pytest.raises(Interrupted, match="to resume"):
            run(*command)
    return command


def test_only_what_is_missing_is_done_again(tmp_path, unfinished, run):
    before = (tmp_path / "out" / "part-00001").stat().st_mtime_ns
    assert "resuming: 2 of" in run(*unfinished)
    assert (tmp_path / "out" / "part-00001").stat().st_mtime_ns == before
    assert not (tmp_path / "out" / ".unfinished").exists()


def test_other_settings_do_not_resume(unfinished, run):
    with pytest.raises(UserError, match="unfinished run with other inputs, settings or tokenizer"):
        run(*unfinished, "--seed", 5)


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--masked-share", "1.5"], "--masked-share is out of range"),
        (["--max-length", "37"], "at least 38 with a prompt of 4"),
        (["--block-size", "400"], "larger than a block"),
        (["--max-length", "4000", "--part-size", "1M"], "nothing to write"),
    ],
)
def test_bad_settings(tmp_path, tokenizer_path, run, options, word):
    (tmp_path / "x.txt").write_text("the model\n" if "4000" in options else "the model reads " * 100)
    with pytest.raises(UserError, match=word):
        run(
            "preprocess",
            tmp_path / "x.txt",
            "--output",
            tmp_path / "out",
            "--tokenizer",
            tokenizer_path,
            *OPTIONS,
            *options,
        )


def test_a_folder_that_holds_something_is_not_written_into(tmp_path, corpus, tokenizer_path, run):
    with pytest.raises(UserError, match="is not empty"):
        run("preprocess", corpus, "--output", tmp_path, "--tokenizer", tokenizer_path, *OPTIONS)


def test_the_command_trains_what_a_run_trains(run, tmp_path, tokenizer_path):
    (tmp_path / "x.txt").write_text((" ".join(WORDS) + "\n") * 20)
    run("tokenizer", tmp_path / "x.txt", "--output", tmp_path / "y.model", "--vocab-size", 345)
    text = " ".join(WORDS)
    ids = SentencePieceTokenizer.load(tmp_path / "y.model").encode(text)
    assert ids == SentencePieceTokenizer.load(tokenizer_path).encode(text)
    with pytest.raises(UserError, match="already exists"):
        run("tokenizer", tmp_path / "x.txt", "--output", tmp_path / "y.model", "--vocab-size", 345)
