"""What a corpus is made of: documents, objects, and the files that hold them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


@dataclass(frozen=True)
class Document:
    """One text, and a name that is the same on every machine that has the corpus."""

    name: str
    text: str


class Item(NamedTuple):
    """An object of a corpus: its document's name, what to call its place in a message, its keys and values."""

    name: str
    where: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus as it was when the corpus was opened; `name` is relative to the path that the user gave."""

    path: Path
    name: str
    size: int
    sha256: str
