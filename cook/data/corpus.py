"""Where documents come from, and which are held out.

This module reads the library of the running Python, text files and JSON lines; `table_documents.py` reads tables.
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
from cook.data.order import chosen_below
from cook.data.reports import LeftOut
from cook.data.source_files import MAX_LINE_BYTES, Document, Item, SourceFile, lines_of, list_files, opened

BOM = "\ufeff"
"""Byte order mark: no part of the text that follows it."""

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
    left_out: LeftOut = field(default_factory=LeftOut, compare=False)  # files that the paths name and that are not read
    read_objects: Callable[[SourceFile], Iterator[Item]] | None = None  # where a document is one text of an object

    def documents(self) -> Iterator[Document]:
        for file in self.files:
            yield from self.read(file)

    def objects(self) -> Iterator[Item]:
        """JSON lines or rows of a table, for tasks that need more of one than its text."""
        assert self.read_objects is not None, f"a corpus of type {self.kind} has no objects"
        for file in self.files:
            yield from self.read_objects(file)

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(file.size for file in self.files)

    def fingerprint(self) -> str:
        """Hex SHA-256 over the kind and every file's name, size and content."""
        files = [(file.name, file.size, file.sha256) for file in self.files]
        return hashlib.sha256(json.dumps([self.kind, files]).encode()).hexdigest()


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
        kind: `python_stdlib`: sources and prose of the running Python's standard library outside its tests; a file or
            help topic is a document. `text`: a file is a document; one of more than `PART_BYTES` is several. `jsonl`: a
            line is a document. `parquet`, `arrow` (folders of `save_to_disk`), `hub`: a row is a document.
        paths: Files, folders (every visible file below) or glob patterns; unused for `python_stdlib` and `hub`.
        text_field: Key of the text in a JSON line or a row.
        name: Of a Hub dataset, or a folder laid out like one.
        subset: Its configuration, where it has several.
        split: Of a Hub dataset, or of an arrow folder that has several.
        digest: The hash of a file's content; `hash_of_ends` where reading it all would take too long.

    Raises:
        UserError: A path matches no file, the corpus is empty, or a table cannot be opened.
    """
    if kind == "python_stdlib":
        return _open_stdlib()
    left_out = LeftOut()
    if kind == "text":
        return Corpus(kind, list_files(paths, None, digest, left_out), _read_text, left_out)
    read_objects: Callable[[SourceFile], Iterator[Item]]
    if kind == "jsonl":
        files, read_objects = list_files(paths, JSONL_SUFFIXES, digest, left_out), _read_jsonl
    elif kind in ("parquet", "arrow", "hub"):
        from cook.data import table_documents as tables  # needs a library that takes seconds to load

        if kind == "parquet":
            files = list_files(paths, (".parquet",), digest, left_out, compressed=False)
            read_objects = tables.read_parquet
        elif kind == "arrow":
            files = tables.list_arrow_folders(paths, split, digest)
            read_objects = partial(tables.read_arrow_folder, split=split)
        else:
            files, read_objects = tables.open_hub(name or "", subset, split)
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
    """bool (num_documents,), True where held out: by the name alone, so the same on every machine and in any company.

    A document is held out if the hash of its name, as a number in [0, 1), is below `fraction`, the expected share. If
    all documents fall on one side, the one nearest to the border changes sides. A single document is not held out.

    Raises:
        UserError: There is no document, or the fraction is not between 0 and 1.
    """
    place = np.fromiter((unit_hash(name) for name in names), dtype=np.float64)
    held_out = chosen_below(place, fraction)
    if not len(place):
        raise UserError("the corpus has no documents", remedy="give files with text in data.paths")
    return held_out & (len(place) > 1)


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
    decoder = codecs.getincrementaldecoder("utf-8")()  # a character cut by a part's end goes into the next part
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
    """The JSON object on a line, or a `UserError` that begins with `where`."""
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
    """The text under a key of an object, or a `UserError` that begins with `where`."""
    if field not in record:
        raise UserError(f"{where}: the object has no key {field!r}", got=", ".join(map(repr, record)), remedy=remedy)
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: {field!r} is not a string", wanted="a string", got=type(text).__name__)
    return whole_text(text, f"{where}: {field!r}")


def whole_text(text: str, what: str) -> str:
    """Returns the text.

    Raises:
        UserError: It is too long, or cannot be written as UTF-8, so no tokenizer takes it. `what` begins the message.
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
