"""Opens the tokenizer that a configuration names."""

from __future__ import annotations

from cook.base.errors import UserError
from cook.text.hf import HuggingFaceTokenizer
from cook.text.jieba import JiebaTokenizer
from cook.text.sentencepiece import SentencePieceTokenizer
from cook.text.tokenizer import Tokenizer

TOKENIZERS: dict[str, type[SentencePieceTokenizer] | type[HuggingFaceTokenizer] | type[JiebaTokenizer]] = {
    "sentencepiece": SentencePieceTokenizer,
    "hf": HuggingFaceTokenizer,
    "jieba": JiebaTokenizer,
}
"""Tokenizer classes by `tokenizer.type`."""


def load_tokenizer(type: str, path: str) -> Tokenizer:
    """Loads a tokenizer.

    Args:
        type: `sentencepiece` (a `.model` file), `hf` (a folder for AutoTokenizer) or `jieba` (CPM-Ant's `vocab.txt`).
        path: The file or folder.

    Raises:
        UserError: The type is unknown, or the path does not contain such a tokenizer.
    """
    if type not in TOKENIZERS:
        raise UserError("tokenizer.type is unknown", wanted=" or ".join(sorted(TOKENIZERS)), got=repr(type))
    return TOKENIZERS[type].load(path)
