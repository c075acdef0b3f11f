"""Arguments that the commands share."""

from __future__ import annotations

import argparse

import pytest

from cook.data.commands.common import at_least, size, tokenizer_type


def test_sizes():
    assert [size(text) for text in ("64", "4k", "16M", "2G")] == [64, 4096, 16 << 20, 2 << 30]
    for bad in ("", "x", "1.5M", "-3", "3T", "15"):
        with pytest.raises(argparse.ArgumentTypeError):
            size(bad)
    with pytest.raises(argparse.ArgumentTypeError):
        at_least(2)("1")


def test_the_tokenizer_s_type_follows_from_its_path(tmp_path):
    for path, type in ((tmp_path, "hf"), ("x.txt", "jieba"), ("x.model", "sentencepiece")):
        assert tokenizer_type(argparse.Namespace(tokenizer=str(path), tokenizer_type=None)) == type
    assert tokenizer_type(argparse.Namespace(tokenizer="x.txt", tokenizer_type="hf")) == "hf"
