"""What the house asks of a tokenizer, whatever its origin."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to ids and back. Neither direction adds or drops special tokens: text is text, ids are ids.

    The string of a special token inside a text (a document that happens to contain `</s>`) is encoded as the plain
    characters that it is; only the caller places special ids.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids: every id is in `range(vocab_size)`."""

    @property
    def bos_id(self) -> int:
        """Id that opens a sample."""

    @property
    def eos_id(self) -> int:
        """Id that closes a sample."""

    @property
    def pad_id(self) -> int:
        """Id that fills a batch."""

    @property
    def unk_id(self) -> int | None:
        """Id of text that the vocabulary cannot express; None where there is no such text."""

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 that changes whenever the ids of some text might."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of every text, one int32 array (num_tokens,) each; uses all cores that the process may use."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`."""

    def save(self, folder: str | Path) -> None:
        """Writes files into `folder` from which Hugging Face's AutoTokenizer, without cook, gives the same ids."""
