"""Where documents come from, and which are held out.

The library of the running Python, text files and JSON lines are read here; tables by `table_documents.py`.
"""

from __future__ import annotations

import ast
import codecs
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cook.base.errors import UserError
from cook.base.files import sha256
from cook.data.documents import Document, Item, SourceFile
from cook.data.left_out import LeftOut
from cook.data.source_files import MAX_LINE_BYTES, lines_of, list_files, opened

BOM = "\ufeff"
"""Byte order mark: no part of the text that it stands in front of."""

PART_BYTES = 1 << 20
"""A larger text file becomes several documents of about this size, cut after a line end where one is near."""

# Tests are not prose or programs of the usual kind; generated files name the machine that built Python.
STDLIB_OMITTED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "lib-dynload", "__pycache__"}
)
STDLIB_SUFFIXES = (".py", ".txt", ".rst")
MIN_REST = 32
"""The end of a longer document is dropped if it is shorter than this many tokens (CPM-Live's rule)."""

CHARACTERS_AT_ONCE = 1 << 20
JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
TOPICS = "pydoc_data/topics.py"


Member = TypeVar("Member")


@dataclass(frozen=True)
class Corpus:
    """Files, and how documents are read from one. Iterating twice gives the same documents in the same order."""

    kind: str
    files: tuple[SourceFile, ...]
    read: Callable[[SourceFile], Iterator[Document]]
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)
    """Files that the paths reach and that are not read."""

    read_objects: Callable[[SourceFile], Iterator[Item]] | None = None
    """Where a document is one text of an object (a JSON line, a table's row): those objects."""

    def documents(self) -> Iterator[Document]:
        """All documents, file by file."""
        for file in self.files:
            yield from self.read(file)

    def objects(self) -> Iterator[Item]:
        """All objects, file by file, for tasks that need more of one than its text."""
        assert self.read_objects is not None, f"a corpus of type {self.kind} has no objects"
        for file in self.files:
            yield from self.read_objects(file)

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(file.size for file in self.files)

    def fingerprint(self) -> str:
        """Hex SHA-256 over the kind and every file's name, size and content."""
        return hashlib.sha256(
            json.dumps([self.kind, [(file.name, file.size, file.sha256) for file in self.files]]).encode()
        ).hexdigest()


def open_corpus(
    kind: str,
    paths: Sequence[str] = (),
    *,
    text_field: str = "text",
    name: str | None = None,
    subset: str | None = None,
    split: str = "train",
    digest: Callable[[Path], str] = sha256,
) -> Corpus:
    """Lists a corpus and hashes its files; documents are read later.

    Args:
        kind: `python_stdlib`: sources and prose of the running Python's standard library outside its tests, a file a
            document, help topics one by one. `text`: a file is a document; one of more than `PART_BYTES` is several.
            `jsonl`: a line is a document. `parquet`, `arrow` (folders of `save_to_disk`), `hub`: a row is a document.
        paths: Files, folders (every visible file below) or glob patterns; unused for `python_stdlib` and `hub`.
        text_field: Key of the text in a JSON line or a row.
        name: Of a Hub dataset, or a folder laid out like one.
        subset: Its configuration, where it has several.
        split: Of a Hub dataset, or of an arrow folder that has several.
        digest: Stands for a file's content; `hash_of_ends` where reading it all would take too long.

    Raises:
        UserError: A path matches no file, the corpus is empty, or a table cannot be opened.
    """
    if kind == "python_stdlib":
        return _open_stdlib()
    left_out = LeftOut()
    if kind == "text":
        return Corpus(kind, list_files(paths, None, digest, left_out), _read_text, left_out)
    # Imported late: tables need a library that takes seconds to load.
    read_objects: Callable[[SourceFile], Iterator[Item]]
    if kind == "jsonl":
        files, read_objects = list_files(paths, JSONL_SUFFIXES, digest, left_out), _read_jsonl
    elif kind == "parquet":
        from cook.data.table_documents import read_parquet

        files = list_files(paths, (".parquet",), digest, left_out, compressed=False)
        read_objects = read_parquet
    elif kind == "arrow":
        from cook.data.table_documents import list_arrow_folders, read_arrow_folder

        files, read_objects = list_arrow_folders(paths, split, digest), partial(read_arrow_folder, split=split)
    elif kind == "hub":
        from cook.data.table_documents import open_hub

        files, read_objects = open_hub(name or "", subset, split)
    else:
        kinds = "python_stdlib, text, jsonl, parquet, arrow or hub"
        raise UserError("data.type is unknown", wanted=kinds, got=repr(kind))
    read = partial(_read_field, read_objects, text_field)
    return Corpus(f"{kind}:{text_field}", files, read, left_out, read_objects)


def grouped(items: Iterable[Member], characters: Callable[[Member], int]) -> Iterator[list[Member]]:
    """Items in groups of about a million characters, so that encoding has work for all cores."""
    group: list[Member] = []
    total = 0
    for item in items:
        group.append(item)
        total += characters(item)
        if total >= CHARACTERS_AT_ONCE:
            yield group
            group, total = [], 0
    if group:
        yield group


def split(names: Iterable[str], fraction: float) -> np.ndarray:
    """Says which documents are held out, by the name alone: the same on every machine and whatever else is there.

    A document is held out if the hash of its name, as a number in [0, 1), is below `fraction`. In a corpus so small
    that all documents fall on one side, the document nearest to the border changes sides.

    Args:
        names: Document names.
        fraction: Expected share of held-out documents, in (0, 1).

    Returns:
        bool (num_documents,), True where held out. A single document is not held out.

    Raises:
        UserError: There is no document, or the fraction is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError("data.held_out is not a fraction", wanted="between 0 and 1, both excluded", got=fraction)
    place = np.fromiter((unit_hash(name) for name in names), dtype=np.float64)
    if not len(place):
        raise UserError("the corpus has no documents", remedy="give files with text in data.paths")
    held_out = place < fraction
    if len(place) == 1:
        return np.zeros(1, bool)
    if not held_out.any():
        held_out[place.argmin()] = True
    elif held_out.all():
        held_out[place.argmax()] = False
    return held_out


def unit_hash(name: str) -> float:
    """A number in [0, 1) that depends on the string alone."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6], "big") / 2**48


def _open_stdlib() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    files, left_out = [], LeftOut()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in STDLIB_OMITTED and not name.startswith("config-")]
        for filename in names:
            path = Path(folder, filename)
            name = path.relative_to(root).as_posix()
            if not filename.endswith(STDLIB_SUFFIXES) or filename.startswith("_sysconfigdata") or not path.is_file():
                continue
            content = path.read_bytes()
            try:
                content.decode()
            except UnicodeDecodeError:
                left_out.add("files that are not UTF-8", 1, name)
                continue
            files.append(SourceFile(path, name, len(content), hashlib.sha256(content).hexdigest()))
    if not files:
        raise UserError(
            f"{root} holds no sources of the standard library", remedy="use data.type: text with files of your own"
        )
    files.sort(key=lambda file: file.name)
    return Corpus("python_stdlib", tuple(files), _read_stdlib, left_out)


def _read_stdlib(file: SourceFile) -> Iterator[Document]:
    text = file.path.read_bytes().decode("utf-8-sig")
    if file.name != TOPICS:
        yield Document(file.name, text)
        return
    # The language reference as a dictionary of texts: parsed, never run.
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Dict):
            for topic, prose in ast.literal_eval(node).items():
                yield Document(f"{file.name}#{topic}", prose)


def _read_text(file: SourceFile) -> Iterator[Document]:
    decoder = codecs.getincrementaldecoder("utf-8")()  # a character that a part's end cuts goes into the next part
    offset = part = 0
    with opened(file.path) as stream:
        while block := stream.read(PART_BYTES):
            block += stream.readline(MAX_LINE_BYTES) if not block.endswith(b"\n") else b""
            text = _decoded(decoder, block, offset, file)
            yield Document(f"{file.name}#{part}" if part else file.name, text if part else text.removeprefix(BOM))
            offset, part = offset + len(block), part + 1
    _decoded(decoder, b"", offset, file)


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, offset: int, file: SourceFile) -> str:
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final=not block)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.path}: not UTF-8 at byte {offset - waiting + error.start}", remedy="convert the file to UTF-8"
        ) from None


def _read_field(
    read_objects: Callable[[SourceFile], Iterator[Item]], text_field: str, file: SourceFile
) -> Iterator[Document]:
    for item in read_objects(file):
        yield Document(item.name, text_of(item.values, text_field, item.where))


def _read_jsonl(file: SourceFile) -> Iterator[Item]:
    with opened(file.path) as stream:
        for number, (_, line) in enumerate(lines_of(stream, file.path), start=1):
            if line.strip():
                where = f"{file.path}, line {number}"
                yield Item(f"{file.name}:{number}", where, object_of(line, where))


def object_of(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object on a line.

    Raises:
        UserError: There is none; `where` begins the message.
    """
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start} of the line") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except ValueError as error:  # Python's limit on the digits of an integer
        raise UserError(f"{where}: not a usable number: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{where}: not a JSON object", wanted="an object", got=type(record).__name__)
    return record


def text_of(record: Mapping[str, Any], field: str, where: str, remedy: str | None = "data.text_field") -> str:
    """The text under a key of an object.

    Raises:
        UserError: There is none; `where` begins the message.
    """
    if field not in record:
        raise UserError(f"{where}: the object has no key {field!r}", got=", ".join(map(repr, record)), remedy=remedy)
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: {field!r} is not a string", wanted="a string", got=type(text).__name__)
    return whole_text(text, f"{where}: {field!r}")


def whole_text(text: str, what: str) -> str:
    """The text itself.

    Raises:
        UserError: It is too long, or cannot be written as UTF-8: no tokenizer takes it. `what` begins the message.
    """
    if len(text) > MAX_LINE_BYTES:
        raise UserError(
            f"{what} is too long",
            wanted=f"at most {MAX_LINE_BYTES:,} characters",
            got=f"{len(text):,}",
            remedy="cut the document into several",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} holds half a surrogate pair at character {error.start}") from None
    return text
