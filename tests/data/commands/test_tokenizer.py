"""A tokenizer trained from the command line."""

from __future__ import annotations

import pytest

from cook.base.errors import UserError
from cook.text.sentencepiece import SentencePieceTokenizer
from tests.data.commands.conftest import WORDS


def test_the_command_trains_what_a_run_trains(run, tmp_path, tokenizer_path):
    (tmp_path / "x.txt").write_text((" ".join(WORDS) + "\n") * 20)
    run("tokenizer", tmp_path / "x.txt", "--output", tmp_path / "y.model", "--vocab-size", 345)
    text = " ".join(WORDS)
    ids = SentencePieceTokenizer.load(tmp_path / "y.model").encode(text)
    assert ids == SentencePieceTokenizer.load(tokenizer_path).encode(text)
    with pytest.raises(UserError, match="there already"):
        run("tokenizer", tmp_path / "x.txt", "--output", tmp_path / "y.model", "--vocab-size", 345)
