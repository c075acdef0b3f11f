import os

import pytest

from cook.base.errors import UserError
from cook.text.sentencepiece import SentencePieceTokenizer
from cook.text.tokenizer import load_tokenizer


def test_the_type_chooses_the_class(model_path):
    assert isinstance(load_tokenizer("sentencepiece", str(model_path)), SentencePieceTokenizer)


def test_an_unknown_type_is_refused(model_path):
    with pytest.raises(UserError, match="wanted: hf or jieba or sentencepiece"):
        load_tokenizer("spm", str(model_path))


@pytest.mark.parametrize("type", ["jieba", "sentencepiece"])
def test_a_pipe_or_device_in_place_of_a_file_is_refused_at_once(tmp_path, type):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(UserError, match="not a regular file"):
            load_tokenizer(type, str(path))
