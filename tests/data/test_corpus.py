import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cook.data.corpus as corpus_module
from cook.base.errors import UserError
from cook.data.corpus import open_corpus, split


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def names_of(corpus):
    return [document.name for document in corpus.documents()]


@pytest.fixture(scope="module")
def stdlib():
    return open_corpus("python_stdlib")


def test_stdlib_is_large_sorted_and_the_same_twice(stdlib):
    names = [file.name for file in stdlib.files]
    assert names == sorted(names) and "argparse.py" in names and "email/parser.py" in names
    assert 4e6 < stdlib.size < 40e6
    assert stdlib.fingerprint() == open_corpus("python_stdlib").fingerprint()


def test_stdlib_leaves_tests_and_packages_out(stdlib):
    parts = {part for file in stdlib.files for part in file.name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "site-packages", "_bundled", "__pycache__"}


def test_stdlib_help_topics_are_prose_not_source(stdlib):
    topics = {d.name: d.text for d in stdlib.documents() if d.name.startswith("pydoc_data/topics.py")}
    assert "pydoc_data/topics.py" not in topics and len(topics) > 50
    assert "\n" in topics["pydoc_data/topics.py#assert"] and "\\n" not in topics["pydoc_data/topics.py#assert"][:200]


def test_stdlib_counts_what_is_not_utf8(tmp_path, monkeypatch):
    write(tmp_path, good_dot_py="x = 1\n", bad_dot_py=b"# \xff\n", test__t_dot_py="no", lib_dot_c="no")
    monkeypatch.setattr(corpus_module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = open_corpus("python_stdlib")
    assert names_of(corpus) == ["good.py"] and corpus.left_out.record() == {
        "files that are not UTF-8": {"count": 1, "named": ["bad.py"]}
    }
    monkeypatch.setattr(corpus_module.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(UserError, match="holds no sources"):
        open_corpus("python_stdlib")


def test_files_folders_and_globs(tmp_path):
    write(tmp_path, b_dot_txt="B", sub__a_dot_txt="A", sub__deep__c_dot_md="C")
    (tmp_path / "sub" / ".hidden").write_bytes(b"\xff")
    assert names_of(open_corpus("text", [str(tmp_path)])) == ["b.txt", "sub/a.txt", "sub/deep/c.md"]
    assert names_of(open_corpus("text", [str(tmp_path / "sub"), str(tmp_path / "b.txt")])) == [
        "a.txt",
        "deep/c.md",
        "b.txt",
    ]
    assert names_of(open_corpus("text", [str(tmp_path / "**" / "*.txt")])) == ["b.txt", "sub/a.txt"]
    # A file that two paths name is read once.
    twice = open_corpus("text", [str(tmp_path / "b.txt"), str(tmp_path / "*.txt")])
    assert [document.text for document in twice.documents()] == ["B"]


@pytest.mark.parametrize("given", ["missing.txt", "*.nothing", "empty"])
def test_paths_that_match_nothing_are_named(tmp_path, given):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=given.replace("*", r"\*")):
        open_corpus("text", [str(tmp_path / given)])


def test_no_paths_and_unknown_types_are_refused():
    with pytest.raises(UserError, match="the corpus is empty"):
        open_corpus("text", [])
    with pytest.raises(UserError, match=r"data\.type"):
        open_corpus("csv", ["x"])


def test_text_is_kept_to_the_byte(tmp_path):
    content = "a\r\n\ufeffb\rc\n\n  é😀\t"
    write(tmp_path, f_dot_txt=content)
    assert [d.text for d in open_corpus("text", [str(tmp_path)]).documents()] == [content]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    line = json.dumps({"text": "a"})
    write(tmp_path, f_dot_txt="\ufeffa\n", f_dot_jsonl=f"\ufeff{line}\n{line}\n")
    assert [d.text for d in open_corpus("text", [str(tmp_path / "f.txt")]).documents()] == ["a\n"]
    assert [d.text for d in open_corpus("jsonl", [str(tmp_path / "f.jsonl")]).documents()] == ["a", "a"]


@given(st.lists(st.integers(1, 40), max_size=30))
def test_a_large_file_becomes_parts_cut_after_line_ends(tmp_path_factory, line_lengths):
    folder = tmp_path_factory.mktemp("large")
    content = "".join("é" * length + "\n" for length in line_lengths) + "end"
    write(folder, f_dot_txt=content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus_module, "PART_BYTES", 50)
        documents = list(open_corpus("text", [str(folder)]).documents())
    assert "".join(document.text for document in documents) == content
    assert all(document.text.endswith("\n") for document in documents[:-1])
    assert all(len(document.text.encode()) <= 50 + 81 for document in documents)
    assert [document.name for document in documents] == ["f.txt", *(f"f.txt#{i}" for i in range(1, len(documents)))]


def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "PART_BYTES", 4)
    write(tmp_path, f_dot_txt=b"good\nline\nba\xffd\n")
    with pytest.raises(UserError, match=r"f\.txt: not UTF-8 at byte 12"):
        list(open_corpus("text", [str(tmp_path)]).documents())


def test_json_lines(tmp_path):
    lines = [{"text": "one"}, {"other": 1, "text": "two é\n"}]
    write(tmp_path, f_dot_jsonl="\n\n".join(json.dumps(line) for line in lines) + "\n")
    corpus = open_corpus("jsonl", [str(tmp_path)])
    assert [(d.name, d.text) for d in corpus.documents()] == [("f.jsonl:1", "one"), ("f.jsonl:3", "two é\n")]
    assert corpus.fingerprint() != open_corpus("jsonl", [str(tmp_path)], text_field="other").fingerprint()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not valid JSON, column 2"),
        (b'{"text": "a\xff"}', "not UTF-8 at byte 11 of the line"),
        (b'["text"]', "not a JSON object"),
        (b'{"txt": "a"}', "no key 'text'"),
        (b'{"text": 3}', "'text' is not a string"),
        (b'{"text": "ab\\ud800"}', "half a surrogate pair at character 2"),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply|not valid JSON"),
    ],
)
def test_bad_json_lines_are_named_with_file_and_line(tmp_path, line, message):
    write(tmp_path, f_dot_jsonl=b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message) as caught:
        list(open_corpus("jsonl", [str(tmp_path / "f.jsonl")]).documents())
    assert "f.jsonl, line 2" in str(caught.value)


def test_fingerprint_follows_content_name_and_size(tmp_path):
    write(tmp_path, a_dot_txt="one", b_dot_txt="two")
    first = open_corpus("text", [str(tmp_path)]).fingerprint()
    (tmp_path / "a.txt").write_text("onE")
    changed = open_corpus("text", [str(tmp_path)]).fingerprint()
    (tmp_path / "a.txt").write_text("one")
    assert open_corpus("text", [str(tmp_path)]).fingerprint() == first != changed
    (tmp_path / "a.txt").rename(tmp_path / "c.txt")
    assert open_corpus("text", [str(tmp_path)]).fingerprint() not in (first, changed)


def test_split_is_pinned_and_depends_on_the_name_alone():
    names = [f"document {number}" for number in range(2000)]
    held_out = split(names, 0.1)
    assert 150 < held_out.sum() < 250
    assert split(names[::-1], 0.1)[::-1].tolist() == held_out.tolist()
    assert split(names[:500], 0.1).tolist() == held_out[:500].tolist()
    # A larger fraction holds out the same documents and more.
    assert not (held_out & ~split(names, 0.2)).any()
    # Computed with sha256sum: the first 48 bits of the digest, as a fraction of 2**48, below 0.1.
    assert np.flatnonzero(held_out)[:5].tolist() == [21, 22, 51, 55, 59]


@given(st.lists(st.text(), min_size=2, max_size=6), st.floats(0.001, 0.999))
def test_neither_side_is_empty(names, fraction):
    held_out = split(names, fraction)
    assert 0 < held_out.sum() < len(names)


def test_splits_that_cannot_be_made_are_refused():
    with pytest.raises(UserError, match="has no documents"):
        split([], 0.1)
    assert split(["only one"], 0.1).tolist() == [False]
    for fraction in (0.0, 1.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="held_out"):
            split(["a", "b"], fraction)


def test_groups_keep_order_and_bound_their_size(monkeypatch):
    monkeypatch.setattr(corpus_module, "CHARACTERS_AT_ONCE", 10)
    texts = ["x" * n for n in (4, 4, 4, 30, 0, 1)]
    groups = list(corpus_module.grouped(texts, len))
    assert [text for group in groups for text in group] == texts
    assert [len(group) for group in groups] == [3, 1, 2]
