"""A small tokenizer, trained once, on this very folder's sources and a few library modules."""

import argparse
import inspect
import json
import textwrap
from pathlib import Path

import pytest

from cook.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece

VOCAB_SIZE = 800


@pytest.fixture(scope="session")
def texts() -> list[str]:
    modules = (argparse, inspect, textwrap, json)
    return [inspect.getsource(module) for module in modules] + ["naïve façade — 中文分词 123 €\n"] * 3


@pytest.fixture(scope="session")
def model_path(texts, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "small.model"
    train_sentencepiece(texts, path, vocab_size=VOCAB_SIZE, seed=0)
    return path


@pytest.fixture(scope="session")
def tokenizer(model_path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.load(model_path)


@pytest.fixture(scope="session")
def exported(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    tokenizer.save(folder)
    return folder
