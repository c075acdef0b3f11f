"""Which files are read, what is said of the others, compressed files, and what must be refused at once."""

import bz2
import gzip
import json
import lzma
import os
import socket
import subprocess
import sys

import pyarrow
import pytest

from cook.base.errors import UserError
from cook.data.corpus import open_corpus
from cook.data.source_files import has_ending, hash_of_ends, opened

PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "ZST": lambda raw: pyarrow.Codec("zstd").compress(raw, asbytes=True),
}


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts_of(corpus):
    return [document.text for document in corpus.documents()]


def left_out(corpus):
    return {reason: (told["count"], told["named"]) for reason, told in corpus.left_out.record().items()}


@pytest.mark.parametrize("ending", PACK)
def test_compressed_files_are_read_as_their_content(tmp_path, ending):
    content = lines(*(f"{ending} {n}" for n in range(3)))
    (tmp_path / f"a.jsonl.{ending}").write_bytes(PACK[ending](content))
    # Files that were joined after they were compressed, as `cat` does it.
    (tmp_path / f"b.jsonl.{ending}").write_bytes(PACK[ending](lines("x")) + PACK[ending](lines("y")))
    assert texts_of(open_corpus("jsonl", [str(tmp_path)])) == [f"{ending} {n}" for n in range(3)] + ["x", "y"]
    (tmp_path / f"t.txt.{ending}").write_bytes(PACK[ending]("\ufeffé\n".encode()))
    assert texts_of(open_corpus("text", [str(tmp_path / f"t.txt.{ending}")])) == ["é\n"]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("damage", ["cut", "text"])
def test_damaged_compressed_files_are_named(tmp_path, ending, damage):
    packed = PACK[ending](os.urandom(5000))
    path = tmp_path / f"a.txt.{ending}"
    path.write_bytes(packed[:-20] if damage == "cut" else b"no such file at all")
    with pytest.raises(UserError, match=r"a\.txt\..*cannot be read"), opened(path) as stream:
        stream.read()


def test_endings_of_any_case_and_linked_folders_are_read_and_the_rest_is_named(tmp_path):
    inside, beside = tmp_path / "in", tmp_path / "beside"
    for folder in (inside / "sub", beside):
        folder.mkdir(parents=True)
    (inside / "a.JSONL").write_bytes(lines("a"))
    (inside / "sub" / "b.Json").write_bytes(lines("b"))
    (beside / "c.jsonl").write_bytes(lines("c"))
    (inside / "link").symlink_to(beside)
    (inside / "sub" / "loop").symlink_to(inside)
    (inside / "gone").symlink_to(tmp_path / "nothing")
    (inside / "notes.csv").write_text("x")
    (inside / "empty.jsonl").write_text("")
    (inside / ".git").mkdir()
    os.mkfifo(inside / "pipe.jsonl")
    corpus = open_corpus("jsonl", [str(inside)])
    assert texts_of(corpus) == ["a", "c", "b"]
    assert [file.name for file in corpus.files] == ["a.JSONL", "empty.jsonl", "link/c.jsonl", "sub/b.Json"]
    assert left_out(corpus) == {
        "hidden files and folders": (1, [".git"]),
        "pipes, devices and broken links": (2, ["gone", "pipe.jsonl"]),
        "files with another ending than .jsonl, .json, .ndjson": (1, ["notes.csv"]),
        "empty files": (1, ["empty.jsonl"]),
    }


def test_patterns_name_the_folders_that_they_match_and_end_in_a_loop_of_links(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("x.txt", "deep/y.txt", "deep/er/z.txt", "deep/z.md"):
        (tmp_path / name).write_text(name)
    for number in range(3):  # glob.glob would follow 3 ** 40 ways through these
        (tmp_path / "deep" / f"loop{number}").symlink_to(tmp_path / "deep")
    corpus = open_corpus("text", [str(tmp_path / "*")])
    assert texts_of(corpus) == ["x.txt"] and left_out(corpus) == {"folders that a pattern matches": (1, ["deep"])}
    patterns = {
        "**/*.txt": ["deep/er/z.txt", "deep/y.txt", "x.txt"],
        "deep/**": ["er/z.txt", "y.txt", "z.md"],
        "d*/**/z.*": ["deep/er/z.txt", "deep/z.md"],
    }
    for pattern, wanted in patterns.items():
        assert [file.name for file in open_corpus("text", [str(tmp_path / pattern)]).files] == wanted


def test_a_folder_without_a_single_file_to_read_says_what_it_holds(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"matches no file(.|\n)*\.parquet(.|\n)*got:.*1 \(a\.csv\)"):
        open_corpus("parquet", [str(tmp_path)])
    assert has_ending("A.JSON.GZ", (".json",)) and not has_ending("a.parquet.gz", (".parquet",), compressed=False)


def test_pipes_sockets_and_devices_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        for given in (tmp_path / "pipe", tmp_path / "socket", "/dev/zero"):
            with pytest.raises(UserError, match="neither a file nor a folder"):
                open_corpus("jsonl", [str(given)])


LIMITED = """
import resource, sys
from cook.base.errors import UserError
from cook.data.corpus import open_corpus
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
try:
    for document in open_corpus(sys.argv[1], [sys.argv[2]]).documents():
        pass
except UserError as error:
    print(error)
"""


def in_two_gigabytes(kind, path):
    """What reading a corpus in 2 GB of address space prints, in at most 30 seconds."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, kind, str(path)],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "ARROW_DEFAULT_MEMORY_POOL": "system"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("case", ["line", "nuls", "packed", "lists", "number", "deep", "surrogate"])
def test_hostile_json_lines_are_named_with_file_and_place(tmp_path, case):
    path = tmp_path / ("x.jsonl.gz" if case == "packed" else "x.jsonl")
    if case == "packed":
        with gzip.open(path, "wb", 1) as packed:
            for _ in range(64):
                packed.write(bytes(16 << 20))
    elif case == "nuls":
        path.write_bytes(lines("good"))
        os.truncate(path, 1 << 30)  # a file with a hole reads as NULs
    else:
        path.write_bytes(
            {
                "line": lines("good") + b'{"text": "' + b"a" * (40 << 20),
                "number": b'{"text": "a", "n": ' + b"9" * 5000 + b"}",
                "lists": b'{"text": "a", "n": [' + b"[]," * (5 << 20) + b"[]]}",
                "deep": b'{"text": ' + b"[" * 1_000_000,
                "surrogate": b'{"text": "a\\ud800"}',
            }[case]
        )
    wanted = {
        "line": "offset 17 is too long",
        "nuls": "offset 17 is too long",
        "packed": "offset 0 is too long",
        "number": "line 1: not a usable number",
        "deep": "line 1: nested too deeply",
        "lists": "",
        "surrogate": "line 1: 'text' holds half a surrogate pair",
    }
    printed = in_two_gigabytes("jsonl", path)
    assert wanted[case] in printed and (case == "lists" or path.name in printed)


def test_a_text_without_line_ends_is_cut_between_characters(tmp_path):
    content = "é" * (10 << 20)
    (tmp_path / "x.txt").write_text("a" + content, encoding="utf-8")
    parts = texts_of(open_corpus("text", [str(tmp_path / "x.txt")]))
    assert "".join(parts) == "a" + content and len(parts) == 2
    (tmp_path / "x.txt").write_bytes(b"ab\xc3")
    with pytest.raises(UserError, match="not UTF-8 at byte 2"):
        texts_of(open_corpus("text", [str(tmp_path / "x.txt")]))


def test_the_ends_of_a_file_stand_for_it(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"a" * 300_000)
    first = hash_of_ends(path)
    for content in (b"a" * 300_001, b"b" + b"a" * 299_999, b"a" * 299_999 + b"b"):
        path.write_bytes(content)
        assert hash_of_ends(path) != first
    path.write_bytes(b"a" * 300_000)
    assert hash_of_ends(path) == first
