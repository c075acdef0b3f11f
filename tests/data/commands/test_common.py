"""Arguments that the commands share."""

from __future__ import annotations

import pytest

from cook.base.errors import UserError
from cook.data.commands.common import size, tokenizer_type


def test_sizes():
    assert [size("--memory", text) for text in ("64", "4k", "16M", "2G")] == [64, 4096, 16 << 20, 2 << 30]
    for bad in ("", "x", "1.5M", "-3", "3T", "15"):
        with pytest.raises(UserError, match="--memory is not a size"):
            size("--memory", bad)


def test_the_tokenizer_s_type_follows_from_its_path(tmp_path):
    for path, type in ((tmp_path, "hf"), ("x.txt", "jieba"), ("x.model", "sentencepiece")):
        assert tokenizer_type(str(path), None) == type
    assert tokenizer_type("x.txt", "hf") == "hf"
