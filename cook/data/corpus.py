"""Where documents come from: the running Python's library, text files, JSON lines; and which are held out."""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cook.base.errors import UserError
from cook.base.files import sha256

PART_BYTES = 1 << 20
"""A larger text file becomes several documents of about this size, cut after a line end."""

# Tests are not prose or programs of the usual kind; generated files name the machine that built Python.
STDLIB_OMITTED = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "_bundled", "lib-dynload", "__pycache__"}
)
STDLIB_SUFFIXES = (".py", ".txt", ".rst")
JSONL_SUFFIXES = (".jsonl", ".json", ".ndjson")
TOPICS = "pydoc_data/topics.py"


@dataclass(frozen=True)
class Document:
    """One text, and a name that is the same on every machine that has the corpus."""

    name: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus as it was when the corpus was opened; `name` is relative to the path that the user gave."""

    path: Path
    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Corpus:
    """Files, and how documents are read from one. Iterating twice gives the same documents in the same order."""

    kind: str
    files: tuple[SourceFile, ...]
    read: Callable[[SourceFile], Iterator[Document]]
    skipped: tuple[str, ...] = ()
    """Names of files that were left out because they are not UTF-8 (`python_stdlib` only)."""

    def documents(self) -> Iterator[Document]:
        """All documents, file by file."""
        for file in self.files:
            yield from self.read(file)

    @property
    def size(self) -> int:
        """Bytes in all files."""
        return sum(file.size for file in self.files)

    def fingerprint(self) -> str:
        """Hex SHA-256 over the kind and every file's name, size and content."""
        return hashlib.sha256(
            json.dumps([self.kind, [(file.name, file.size, file.sha256) for file in self.files]]).encode()
        ).hexdigest()


def open_corpus(kind: str, paths: Sequence[str] = (), *, text_field: str = "text") -> Corpus:
    """Lists a corpus and hashes its files; documents are read later.

    Args:
        kind: `python_stdlib`: sources and prose of the running Python's standard library outside its tests, a file a
            document, help topics one by one. `text`: a file is a document; one of more than `PART_BYTES` is several.
            `jsonl`: a line is a document.
        paths: Files, folders (every visible file below) or glob patterns; unused for `python_stdlib`.
        text_field: Key of the text in a JSON line.

    Raises:
        UserError: A path matches no file, or the corpus is empty.
    """
    if kind == "python_stdlib":
        return _open_stdlib()
    if kind == "text":
        return Corpus(kind, _list_files(paths, suffixes=None), _read_text)
    if kind == "jsonl":
        files = _list_files(paths, suffixes=JSONL_SUFFIXES)
        return Corpus(f"jsonl:{text_field}", files, lambda file: _read_jsonl(file, text_field))
    raise UserError("data.type is unknown", wanted="python_stdlib, text or jsonl", got=repr(kind))


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
    place = np.fromiter((_unit_hash(name) for name in names), dtype=np.float64)
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


def _unit_hash(name: str) -> float:
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


def _read_jsonl(file: SourceFile, text_field: str) -> Iterator[Document]:
    with open(file.path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{file.path}, line {number}"
                yield Document(f"{file.name}:{number}", text_of(object_of(line, where), text_field, where))


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


def _list_files(paths: Sequence[str], suffixes: tuple[str, ...] | None) -> tuple[SourceFile, ...]:
    """Every file that the paths name, in their order and sorted inside each, none twice."""
    found: dict[Path, SourceFile] = {}
    for given in paths:
        for path, name in _matches(given, suffixes):
            if (resolved := path.resolve()) not in found:
                try:
                    found[resolved] = SourceFile(path, name, path.stat().st_size, sha256(path))
                except OSError as error:
                    raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not found:
        raise UserError("the corpus is empty", wanted="at least one file in data.paths")
    return tuple(found.values())


def _matches(given: str, suffixes: tuple[str, ...] | None) -> list[tuple[Path, str]]:
    path = Path(given).expanduser()
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
