"""A small tokenizer, and the commands run in this process."""

import numpy as np
import pytest

from cook.cli import invoke
from cook.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from tests.data.cpm_live import reference

WORDS = "the model reads a row of text and learns which heads and dims it can do without".split()
BLOCK = 8192


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "x.model"
    train_sentencepiece([" ".join(WORDS)] * 20, path, vocab_size=345, seed=0)
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path):
    return SentencePieceTokenizer.load(tokenizer_path)


@pytest.fixture
def run(capsys):
    """Runs a command; returns what it printed."""

    def run(*arguments):
        invoke("data", [str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture
def live(tmp_path):
    """A folder of binary data, and its records as lists."""
    records = reference.random_records(np.random.default_rng(0), 400)
    files = {"a": records[:150], "b": records[150:]}
    reference.write_folder(tmp_path / "live", files, version=1, block_size=BLOCK)
    return tmp_path / "live", [record.tolist() for record in records]
