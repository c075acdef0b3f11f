"""Hugging Face tokenizer folders, behind the `Tokenizer` protocol."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cook.base.errors import UserError, library_errors

PROBE_BYTES, PROBE_SECONDS = 2 << 30, 60
PROBE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
from tokenizers import Tokenizer
Tokenizer.from_file(sys.argv[1]).encode_batch(["a", "The first words of a text, 123."])
"""
"""Reads a tokenizer.json and encodes a text. The second argument limits the memory, in bytes."""


class HuggingFaceTokenizer:
    """A tokenizer that AutoTokenizer reads from a local folder. Code in the folder is never run.

    The end-of-text token, which is required, stands in for a missing beginning-of-text or padding token (GPT-2).
    `origin` is the source of `backend`, for messages.
    """

    def __init__(self, backend: Any, origin: str):
        if backend.eos_token_id is None:
            raise UserError(
                f"{origin}: the tokenizer has no end-of-text token",
                wanted="an eos_token in tokenizer_config.json",
                remedy="set eos_token in the folder's tokenizer_config.json to the token that ends a document",
            )
        self._backend = backend
        self.eos_id: int = backend.eos_token_id
        self.bos_id: int = backend.bos_token_id if backend.bos_token_id is not None else self.eos_id
        self.start_id: int | None = self.bos_id if begins_texts(backend) else None
        self.pad_id: int = backend.pad_token_id if backend.pad_token_id is not None else self.eos_id
        self.unk_id: int | None = backend.unk_token_id
        # Ids may have gaps, so the vocabulary size follows from the largest id, not from the number of tokens.
        self.vocab_size: int = max(backend.get_vocab().values()) + 1
        self.fingerprint = _fingerprint(backend)

    @classmethod
    def load(cls, path: str | Path) -> HuggingFaceTokenizer:
        """Reads a tokenizer folder. Raises UserError if AutoTokenizer cannot read it."""
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(f"tokenizer.path: {folder} is not a folder", wanted="a folder with tokenizer.json")
        return cls(open_backend(str(folder), local_files_only=True), str(folder))

    def ordinary_tokens(self) -> dict[str, int]:
        """Returns the ids by token, without special and other added tokens."""
        added = self._backend.added_tokens_encoder
        return {token: number for token, number in self._backend.get_vocab().items() if token not in added}

    def encode(self, text: str) -> list[int]:
        return list(self._ids([text])[0])

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.asarray(ids, dtype=np.int32) for ids in self._ids(list(texts))] if texts else []

    def decode(self, ids: Sequence[int]) -> str:
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        text = self._backend.decode([int(i) for i in ids], **options)
        assert isinstance(text, str)
        return text

    def save(self, folder: str | Path) -> None:
        self._backend.save_pretrained(str(folder))

    def _ids(self, texts: list[str]) -> list[list[int]]:
        # verbose=False: a document longer than the model's context needs no warning, since it is cut later.
        options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return self._backend(texts, **options, return_attention_mask=False, return_token_type_ids=False)["input_ids"]


def begins_texts(backend: Any) -> bool:
    """Whether a Hugging Face tokenizer puts its beginning-of-text token in front of texts."""
    plain = backend("a", add_special_tokens=False)["input_ids"]
    return bool(backend("a")["input_ids"][: 1 + len(plain)] == [backend.bos_token_id, *plain])


def open_backend(source: str, **options: Any) -> Any:
    """Opens the Hugging Face tokenizer of a folder or Hub name, with options of `AutoTokenizer.from_pretrained`.

    Code in the folder is run only if the options allow it.

    Raises:
        UserError: the tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    check_tokenizer_file(Path(source))
    if Path(source).is_dir():
        check_has_tokenizer(Path(source))
    with library_errors(f"{source}: its tokenizer cannot be read"):
        backend = AutoTokenizer.from_pretrained(source, **{"trust_remote_code": False, **options})
        backend.get_vocab()
        return backend


def check_has_tokenizer(folder: Path) -> None:
    """Raises UserError if no file of a folder looks like one of a tokenizer, for which transformers has other words."""
    names = ("tokenizer*", "*.model", "vocab*", "spiece*", "merges*", "*.tiktoken")
    if not any(file for name in names for file in folder.glob(name)):
        remedy = "save the model's tokenizer in it: tokenizer.save_pretrained(folder)"
        raise UserError(f"{folder}: there is no tokenizer in this folder", wanted="tokenizer.json", remedy=remedy)


def check_tokenizer_file(folder: Path) -> None:
    """Tests a folder's tokenizer.json in a separate process with limits on memory and time.

    A few lines of JSON can describe a normalizer that exhausts the memory, and the Rust code then aborts its process.

    Raises:
        UserError: the file cannot be read within the limits.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        status = file.stat()
        _check_once(file.resolve(), status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _check_once(file: Path, _time: int, _size: int) -> None:
    command = [sys.executable, "-I", "-c", PROBE, str(file), str(PROBE_BYTES)]
    environment = os.environ | {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PROBE_SECONDS)
        said = done.stderr.strip().splitlines()
        reason = None if done.returncode == 0 else said[-1][:300] if said else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        reason = "still reading when the time was up"
    if reason is not None:
        raise UserError(
            f"{file.parent}: its tokenizer cannot be read",
            wanted=f"a tokenizer.json that takes at most {PROBE_BYTES >> 30} GB and {PROBE_SECONDS} s to read",
            got=reason,
        )


def _fingerprint(backend: Any) -> str:
    rust = getattr(backend, "backend_tokenizer", None)
    # Tokenizers written in Python cannot be serialised. Their class and vocabulary are hashed instead.
    content = rust.to_str() if rust is not None else json.dumps(sorted(backend.get_vocab().items()))
    return hashlib.sha256(f"{type(backend).__name__}\n{content}".encode()).hexdigest()
