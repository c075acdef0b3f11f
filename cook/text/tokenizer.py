"""The protocol of all tokenizers, and the function that opens the one a configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from cook.base.errors import UserError
from cook.text.hf import HuggingFaceTokenizer
from cook.text.jieba import JiebaTokenizer
from cook.text.sentencepiece import SentencePieceTokenizer


class Tokenizer(Protocol):
    """Converts text to ids and back. Neither direction adds or removes special tokens.

    If a text contains the string of a special token, such as `</s>`, it is encoded as plain characters. Only the caller
    inserts special ids.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids. Every id is in `range(vocab_size)`."""

    @property
    def bos_id(self) -> int:
        """Id that means the beginning of a text."""

    @property
    def start_id(self) -> int | None:
        """Id that samples of texts begin with: `bos_id`, or None if the tokenizer does not begin texts with it."""

    @property
    def eos_id(self) -> int:
        """Id at the end of a sample."""

    @property
    def pad_id(self) -> int:
        """Id for padding."""

    @property
    def unk_id(self) -> int | None:
        """Id for text that the vocabulary cannot represent. None if it can represent any text."""

    @property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 that changes if the ids of any text may change."""

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text as an int32 array of shape (num_tokens,). Uses all available cores."""

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`."""

    def save(self, folder: str | Path) -> None:
        """Writes files to `folder` with which Hugging Face's AutoTokenizer gives the same ids without cook."""


TOKENIZERS: dict[str, type[SentencePieceTokenizer] | type[HuggingFaceTokenizer] | type[JiebaTokenizer]] = {
    "sentencepiece": SentencePieceTokenizer,  # a .model file
    "hf": HuggingFaceTokenizer,  # a folder for AutoTokenizer
    "jieba": JiebaTokenizer,  # CPM-Ant's vocab.txt
}
"""Tokenizer classes by `tokenizer.type`."""


def load_tokenizer(type: str, path: str) -> Tokenizer:
    """Loads a tokenizer of a type from `TOKENIZERS`.

    Raises:
        UserError: The type is unknown, or the path does not contain such a tokenizer.
    """
    if type not in TOKENIZERS:
        raise UserError("tokenizer.type is unknown", wanted=" or ".join(sorted(TOKENIZERS)), got=repr(type))
    return TOKENIZERS[type].load(path)
