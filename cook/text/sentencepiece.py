"""SentencePiece tokenizers: training, loading, and export to Hugging Face."""

from __future__ import annotations

import hashlib
import io
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from cook.base.errors import UserError
from cook.base.files import regular_file, write_atomically
from cook.base.pool import num_cores
from cook.text.hf_export import export_to_hugging_face, parse_model

SPACE = "\u2581"
"""The character that stands for a space inside sentencepiece's pieces."""

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3

# Line ends, tabs and indentation are user-defined pieces. They are frequent in code, and fixed pieces cut the text at
# the same places here and in the exported tokenizer. Lengths double, so that any run of them needs few pieces.
WHITESPACE_PIECES = ("\n", "\n\n", "\t", "\t\t", "\t\t\t\t", SPACE * 2, SPACE * 4, SPACE * 8, SPACE * 16)

MIN_VOCAB_SIZE = 4 + len(WHITESPACE_PIECES) + 256 + 64  # special ids, whitespace, bytes and an alphabet
MAX_LINE_CHARS = 4096
RARE = 0.01  # a character with at least this share of the text gets a piece in any vocabulary
MIN_COVERAGE, MAX_COVERAGE = 0.98, 0.9995  # sentencepiece accepts no value below 0.98
TRAINING_THREADS = 4  # fixed, because it is stored in the model and must not change its bytes between machines
DEFAULT_SAMPLE_CHARS = 16 << 20


class SentencePieceTokenizer:
    """A sentencepiece model from the content of a `.model` file; `origin` is its source, for messages.

    With a model trained by `train_sentencepiece`, `decode(encode(text)) == text` for every text.

    Raises:
        UserError: Not a sentencepiece model, or a model without beginning-of-text and end-of-text pieces.
    """

    def __init__(self, model: bytes, origin: str):
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except (RuntimeError, TypeError) as error:
            remedy = "check that it is a complete .model file"
            raise UserError(f"{origin}: not a sentencepiece model", remedy=remedy) from error
        self._model = model
        self.vocab_size: int = self._processor.get_piece_size()
        self.bos_id: int = self._processor.bos_id()
        self.start_id: int | None = self.bos_id
        self.eos_id: int = self._processor.eos_id()
        for what, piece_id in (("beginning-of-text", self.bos_id), ("end-of-text", self.eos_id)):
            if piece_id < 0:
                remedy = "train it with --bos_id and --eos_id"
                raise UserError(f"{origin}: the model has no {what} piece", remedy=remedy)
        self.unk_id: int | None = self._processor.unk_id()
        self.pad_id: int = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._space_bytes = self._byte_ids(SPACE)

    @classmethod
    def load(cls, path: str | Path) -> SentencePieceTokenizer:
        """Reads a `.model` file. Raises UserError if it is missing or not a usable sentencepiece model."""
        return cls(regular_file(path, ".model file").read_bytes(), str(path))

    def encode(self, text: str) -> list[int]:
        if self._space_bytes and SPACE in text:
            # sentencepiece reads a literal U+2581 as a space. Encoded as bytes, it is decoded correctly.
            first, *others = (self._processor.encode(part) if part else [] for part in text.split(SPACE))
            return first + [i for part in others for i in (*self._space_bytes, *part)]
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        lists = self._processor.encode(list(texts), num_threads=num_cores()) if texts else []
        for index, text in enumerate(texts):
            if self._space_bytes and SPACE in text:
                lists[index] = self.encode(text)
        return [np.asarray(ids, dtype=np.int32) for ids in lists]

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and the `.model` file.

        Raises:
            UserError: These files cannot represent the model, so that the ids would differ.
        """
        export_to_hugging_face(self._model, self.encode, Path(folder))
        write_atomically(Path(folder) / "sentencepiece.model", self._model)

    def _byte_ids(self, text: str) -> tuple[int, ...]:
        # Only for models without normalisation. A model that adds a prefix would add it to every part of a split text.
        normalizer = parse_model(self._model).normalizer_spec
        if normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or normalizer.precompiled_charsmap:
            return ()
        ids = tuple(self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode())
        return ids if all(self._processor.is_byte(i) for i in ids) else ()


def train_sentencepiece(
    texts: Iterable[str],
    model_path: str | Path,
    *,
    vocab_size: int,
    seed: int,
    sample_chars: int = DEFAULT_SAMPLE_CHARS,
) -> int:
    """Trains a lossless byte-pair model for code and prose, in English, Chinese or both, and writes it atomically.

    The model uses byte fallback, no normalisation and no added prefix, so that white space is preserved. Digits are
    single pieces, and line ends, tabs and indentation have their own pieces. The same texts in the same order,
    vocabulary size and seed give the same bytes. Special ids: pad 0, unk 1, `<s>` 2, `</s>` 3.

    Args:
        texts: Documents, read once.
        model_path: The `.model` file to write.
        vocab_size: Total number of ids.
        seed: Seed for sampling lines from a corpus larger than `sample_chars`.
        sample_chars: Largest sample of lines to train on, in characters. Returned: the number of characters outside it.

    Raises:
        UserError: The vocabulary is too small for bytes and an alphabet, or too large for the corpus.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError("tokenizer.vocab_size is too small", wanted=f"at least {MIN_VOCAB_SIZE}", got=vocab_size)
    seen = 0

    def counted() -> Iterator[str]:
        nonlocal seen
        for line in _lines(texts):
            seen += len(line)
            yield line

    lines = _sample(counted(), sample_chars, random.Random(seed))
    if not lines:
        raise UserError("there is no text to train a tokenizer on", remedy="check data.paths")
    # In Chinese, a space may be too rare to get a piece, and would then be encoded as the three bytes of U+2581.
    rare_space = sum(line.count(" ") for line in lines) < RARE * sum(map(len, lines))
    options: dict[str, Any] = {"pad_id": PAD_ID, "unk_id": UNK_ID, "bos_id": BOS_ID, "eos_id": EOS_ID}
    options |= {"required_chars": SPACE} if rare_space else {}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=_coverage(lines, vocab_size),
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            split_digits=True,
            user_defined_symbols=list(WHITESPACE_PIECES),
            max_sentence_length=4 * MAX_LINE_CHARS,
            num_threads=TRAINING_THREADS,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        remedy = "lower tokenizer.vocab_size, or use more text"
        if "smaller than required_chars" in str(error):
            remedy = "raise tokenizer.vocab_size: the text has too many different characters"
        what = f"no tokenizer of {vocab_size} pieces can be trained on this corpus ({len(lines)} lines): {error}"
        raise UserError(what, remedy=remedy) from error
    write_atomically(model_path, model.getvalue())
    return seen - sum(map(len, lines))


def _coverage(lines: Sequence[str], vocab_size: int) -> float:
    """The share of the text whose characters get their own pieces. All other characters are encoded as bytes.

    The default is 99.95%, as sentencepiece recommends for Chinese: rarer characters would waste ids. The share is lower
    if the characters (thousands in Chinese) would otherwise take more than half of a small vocabulary.
    """
    room = (vocab_size - MIN_VOCAB_SIZE) // 2 + 64
    if len(set().union(*lines)) <= room:
        return MAX_COVERAGE
    counts = Counter(char for line in lines for char in line)
    most = sum(count for _, count in counts.most_common(room))
    return max(MIN_COVERAGE, min(MAX_COVERAGE, (most - 0.5) / counts.total()))


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for begin in range(0, len(line), MAX_LINE_CHARS):
                yield line[begin : begin + MAX_LINE_CHARS]


def _sample(lines: Iterable[str], max_chars: int, rng: random.Random) -> list[str]:
    """A uniform sample of lines of at most `max_chars`, in one pass. Half of it is dropped whenever it overflows."""
    kept: list[str] = []
    chars, rate = 0, 1.0
    for line in lines:
        if rate < 1.0 and rng.random() >= rate:
            continue
        kept.append(line)
        chars += len(line)
        while chars > max_chars and len(kept) > 1:
            kept = [line for line in kept if rng.random() < 0.5]
            chars, rate = sum(map(len, kept)), rate / 2
    return kept
