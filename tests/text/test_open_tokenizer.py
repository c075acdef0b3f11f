import pytest

from cook.base.errors import UserError
from cook.text.open_tokenizer import load_tokenizer
from cook.text.sentencepiece import SentencePieceTokenizer


def test_the_type_chooses_the_class(model_path):
    assert isinstance(load_tokenizer("sentencepiece", str(model_path)), SentencePieceTokenizer)


def test_an_unknown_type_is_refused(model_path):
    with pytest.raises(UserError, match="wanted: hf or jieba or sentencepiece"):
        load_tokenizer("spm", str(model_path))
