"""CPM-Ant's tokenizer: jieba cuts a text into words, and each word is spelled with the longest pieces that match."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from itertools import zip_longest
from pathlib import Path

import numpy as np

from cook.base.errors import UserError
from cook.base.files import read_json, regular_file, write_atomically, write_json

SPECIAL = ("<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<d>", "</d>")
"""Ids 0 to 9. `</n>` stands for a line end and `</_>` for a space. Text is never encoded as one of the others."""

STANDS_FOR = {"</n>": "\n", "</_>": " "}
CLASS = "CpmAntTokenizer"
"""The class of transformers that reads such a vocabulary."""
MAX_WORD_CHARS = 200
"""A longer word becomes a single unknown id, as in CPM-Live."""
KEPT_WORDS = 1 << 18
"""Number of words whose ids are cached. A look-up takes a tenth of the time of spelling a word."""


class JiebaTokenizer:
    """A tokenizer from a vocabulary file with one piece per line, like CpmAntTokenizer of transformers.

    The ids equal those of that class, which does not use jieba's hidden Markov model. The only difference is text that
    spells a special token such as `</s>`: here it is encoded as plain characters. Characters outside the vocabulary
    become `<unk>`, so decoding does not always restore the text. The published vocabulary is made for Chinese.

    Args:
        lines: The lines of the vocabulary. The line number, counted from 0, is the id.
        origin: The source of the vocabulary, for messages.
        cut: Cuts a text into words whose concatenation is the text. Default: rjieba if installed, else jieba.

    Raises:
        UserError: The first lines are not CPM-Ant's special tokens, or neither rjieba nor jieba is installed.
    """

    def __init__(self, lines: Sequence[str], origin: str, cut: Callable[[str], Iterable[str]] | None = None):
        for number, (name, line) in enumerate(zip_longest(SPECIAL, lines[: len(SPECIAL)]), start=1):
            if name != line:
                raise UserError(
                    f"{origin}: line {number} is not {name!r}",
                    wanted=f"a CPM-Ant vocabulary, whose first lines are {' '.join(SPECIAL)}",
                    got=repr(line) if line is not None else "the end of the file",
                )
        self._lines = tuple(lines)
        self._cut, segmenter = (cut, "given") if cut else _segmenter()
        self._id_of = {piece: number for number, piece in enumerate(lines) if number >= len(SPECIAL) and piece}
        self._id_of |= {text: SPECIAL.index(name) for name, text in STANDS_FOR.items()}
        self._text_of = [STANDS_FOR.get(name, name) for name in SPECIAL] + list(lines[len(SPECIAL) :])
        self._longest = max(map(len, self._id_of))
        self._known: dict[str, list[int]] = {}
        self.vocab_size: int = len(lines)
        self.pad_id: int = SPECIAL.index("<pad>")
        self.unk_id: int | None = SPECIAL.index("<unk>")
        self.bos_id: int = SPECIAL.index("<s>")
        self.start_id: int | None = self.bos_id
        self.eos_id: int = SPECIAL.index("</s>")
        self.fingerprint = hashlib.sha256("\n".join((segmenter, *lines)).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path) -> JiebaTokenizer:
        """Reads a `vocab.txt`. Raises UserError if it cannot be read, is not UTF-8 or not CPM-Ant's."""
        try:
            # Universal line ends, as in transformers, because the ids are line numbers.
            with open(regular_file(path, "vocab.txt"), encoding="utf-8-sig") as file:
                lines = [line.rstrip("\n") for line in file]
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}", wanted="a vocab.txt") from None
        return cls(lines, str(path))

    def encode(self, text: str) -> list[int]:
        known = self._known
        ids: list[int] = []
        for word in self._cut(text):
            spelled = known.get(word)
            if spelled is None:
                spelled = self._spell(word)
                if len(known) < KEPT_WORDS:
                    known[word] = spelled
            ids += spelled
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # One core: Python spells the words. To use more, run `cook data preprocess` with several processes.
        return [np.asarray(self.encode(text), dtype=np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self._text_of[int(i)] for i in ids)

    def save(self, folder: str | Path) -> None:
        """Writes `vocab.txt` and a `tokenizer_config.json` for the class of transformers, which prepends `<s>`."""
        write_atomically(Path(folder) / "vocab.txt", "".join(f"{line}\n" for line in self._lines))
        settings = {"tokenizer_class": CLASS, "split_special_tokens": True, "model_max_length": 10**30}
        write_json(Path(folder) / "tokenizer_config.json", settings)

    def _spell(self, word: str) -> list[int]:
        if len(word) > MAX_WORD_CHARS:
            return [SPECIAL.index("<unk>")]
        ids, start = [], 0
        while start < len(word):
            for end in range(min(len(word), start + self._longest), start, -1):
                if (found := self._id_of.get(word[start:end])) is not None:
                    break
            else:
                found, end = SPECIAL.index("<unk>"), start + 1
            ids.append(found)
            start = end
        return ids


def is_jieba(folder: Path) -> bool:
    """Whether a folder has the files that `JiebaTokenizer.save` writes."""
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and read_json(settings).get("tokenizer_class") == CLASS


def _segmenter() -> tuple[Callable[[str], Iterable[str]], str]:
    """The installed word segmenter and its name."""
    with contextlib.suppress(ImportError):
        rust = import_module("rjieba")
        return lambda text: rust.cut(text, False), "rjieba"
    try:
        python = import_module("jieba")
    except ImportError:
        raise UserError(
            "tokenizer.type jieba needs a word segmenter, and none is installed", remedy="pip install rjieba (or jieba)"
        ) from None
    return lambda text: python.cut(text, cut_all=False, HMM=False), "jieba"
