"""Where documents come from, and which are held out.

The running Python's library, text files and JSON lines are read here; `cook.data.tables` reads what comes in tables.
"""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cook.base.errors import UserError
from cook.base.files import sha256
from cook.data.documents import Document, Item, SourceFile

ENDS_BYTES = 1 << 16
PART_BYTES = 1 << 20
"""A larger text file becomes several documents of about this size, cut after a line end."""

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
    skipped: tuple[str, ...] = ()
    """Names of files that were left out because they are not UTF-8 (`python_stdlib` only)."""

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
    if kind == "text":
        return Corpus(kind, list_files(paths, None, digest), _read_text)
    # Imported late: tables need a library that takes seconds to load.
    read_objects: Callable[[SourceFile], Iterator[Item]]
    if kind == "jsonl":
        files, read_objects = list_files(paths, JSONL_SUFFIXES, digest), _read_jsonl
    elif kind == "parquet":
        from cook.data.tables import read_parquet

        files, read_objects = list_files(paths, (".parquet",), digest), read_parquet
    elif kind == "arrow":
        from cook.data.tables import list_arrow_folders, read_arrow_folder

        files, read_objects = list_arrow_folders(paths, split, digest), partial(read_arrow_folder, split=split)
    elif kind == "hub":
        from cook.data.tables import open_hub

        files, read_objects = open_hub(name or "", subset, split)
    else:
        kinds = "python_stdlib, text, jsonl, parquet, arrow or hub"
        raise UserError("data.type is unknown", wanted=kinds, got=repr(kind))
    read = partial(_read_field, read_objects, text_field)
    return Corpus(f"{kind}:{text_field}", files, read, read_objects=read_objects)


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
        bool (num_documents,), True where held out.

    Raises:
        UserError: There are fewer than two documents, or the fraction is not between 0 and 1.
    """
    if not 0.0 < fraction < 1.0:
        raise UserError("data.held_out is not a fraction", wanted="between 0 and 1, both excluded", got=fraction)
    place = np.fromiter((unit_hash(name) for name in names), dtype=np.float64)
    if len(place) < 2:
        raise UserError(
            "the corpus has too few documents to hold one out",
            wanted="at least 2",
            got=len(place),
            remedy="give more files, or a separate evaluation corpus in data.held_out_paths",
        )
    held_out = place < fraction
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
    files, skipped = [], []
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
                skipped.append(name)
                continue
            files.append(SourceFile(path, name, len(content), hashlib.sha256(content).hexdigest()))
    if not files:
        raise UserError(
            f"{root} holds no sources of the standard library", remedy="use data.type: text with files of your own"
        )
    files.sort(key=lambda file: file.name)
    return Corpus("python_stdlib", tuple(files), _read_stdlib, tuple(sorted(skipped)))


def _read_stdlib(file: SourceFile) -> Iterator[Document]:
    text = file.path.read_bytes().decode()
    if file.name != TOPICS:
        yield Document(file.name, text)
        return
    # The language reference as a dictionary of texts: parsed, never run.
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Dict):
            for topic, prose in ast.literal_eval(node).items():
                yield Document(f"{file.name}#{topic}", prose)


def _read_text(file: SourceFile) -> Iterator[Document]:
    offset = part = 0
    with open(file.path, "rb") as stream:
        while block := stream.read(PART_BYTES):
            block += stream.readline() if not block.endswith(b"\n") else b""
            try:
                text = block.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{file.path}: not UTF-8 at byte {offset + error.start}", remedy="convert the file to UTF-8"
                ) from None
            yield Document(f"{file.name}#{part}" if part else file.name, text)
            offset, part = offset + len(block), part + 1


def _read_field(
    read_objects: Callable[[SourceFile], Iterator[Item]], text_field: str, file: SourceFile
) -> Iterator[Document]:
    for item in read_objects(file):
        yield Document(item.name, text_of(item.values, text_field, item.where))


def _read_jsonl(file: SourceFile) -> Iterator[Item]:
    with open(file.path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
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
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {field!r} holds half a surrogate pair at character {error.start}") from None
    return text


def hash_of_ends(path: Path) -> str:
    """Hex SHA-256 of a file's size, first and last 64 KiB: enough to tell that it was replaced or grew."""
    with open(path, "rb") as file:
        size, first = os.fstat(file.fileno()).st_size, file.read(ENDS_BYTES)
        file.seek(max(0, size - ENDS_BYTES))
        return hashlib.sha256(b"%d %b %b" % (size, first, file.read())).hexdigest()


def list_files(
    paths: Sequence[str], suffixes: tuple[str, ...] | None, digest: Callable[[Path], str]
) -> tuple[SourceFile, ...]:
    """Every file that the paths name, in their order and sorted inside each, none twice."""
    found: dict[Path, SourceFile] = {}
    for given in paths:
        for path, name in matching_files(given, suffixes):
            if (resolved := path.resolve()) not in found:
                try:
                    found[resolved] = SourceFile(path, name, path.stat().st_size, digest(path))
                except OSError as error:
                    raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not found:
        raise UserError("the corpus is empty", wanted="at least one file in data.paths")
    return tuple(found.values())


def matching_files(given: str, suffixes: tuple[str, ...] | None) -> list[tuple[Path, str]]:
    path = Path(given)
    if path.is_file():
        return [(path, path.name)]
    if path.is_dir():
        root, inside = path, (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
        files = [file for file in inside if suffixes is None or file.name.endswith(suffixes)]
    elif glob.has_magic(given):
        fixed = [part for part in path.parts[: next(i for i, p in enumerate(path.parts) if glob.has_magic(p))]]
        root, files = Path(*fixed), [Path(match) for match in glob.glob(str(path), recursive=True)]
    else:
        raise UserError(f"{given}: there is no such file or folder", remedy="check data.paths")
    named = [(file, file.relative_to(root).as_posix()) for file in files if file.is_file()]
    visible = [(file, name) for file, name in named if not any(part.startswith(".") for part in name.split("/"))]
    if not visible:
        raise UserError(f"{given}: matches no file", wanted=f"files ending in {suffixes}" if suffixes else None)
    return sorted(visible, key=lambda item: item[1])
