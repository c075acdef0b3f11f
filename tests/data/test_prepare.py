import re
from types import SimpleNamespace

import numpy as np
import pytest

import cook.data.corpus as corpus_module
import cook.data.prepare as prepare
from cook.base.errors import UserError
from cook.config.corpus import DataConfig
from cook.data.cache import read_manifest
from cook.data.source_files import Document


def section(paths, **options):
    """A data section of the test's corpus."""
    return DataConfig(paths=paths, **({"type": "text", "held_out": 0.3, "max_length": 64} | options))


class Letters:
    """A tokenizer whose ids are code points shifted past four special ids."""

    bos_id, start_id, eos_id, pad_id, unk_id = 2, 2, 3, 0, 1
    vocab_size, fingerprint = 200, "letters"

    def encode_batch(self, texts):
        return [np.array([4 + ord(char) for char in text], dtype=np.int32) for text in texts]


@pytest.fixture
def corpus_folder(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number:02d}.txt").write_text(f"document {number} " * (number + 1))
    return folder


def read_part(folder, part):
    manifest = read_manifest(folder)
    tokens = np.fromfile(folder / f"{part}.tokens.bin", dtype=manifest["dtype"])
    offsets = np.load(folder / f"{part}.offsets.npy")
    assert manifest[part] == {"documents": len(offsets) - 1, "tokens": len(tokens)}
    return ["".join(chr(t - 4) for t in tokens[a:b]) for a, b in zip(offsets, offsets[1:], strict=False)]


@pytest.mark.parametrize("vocab_size", [200, 70_000])
@pytest.mark.parametrize("chars_at_once", [1, 100, 1 << 20])
def test_tokens_hold_every_document_on_its_side(corpus_folder, tmp_path, monkeypatch, chars_at_once, vocab_size):
    monkeypatch.setattr(corpus_module, "CHARACTERS_AT_ONCE", chars_at_once)
    monkeypatch.setattr(Letters, "vocab_size", vocab_size)
    corpus = prepare.open_split(section((str(corpus_folder),)))
    folder = prepare.prepare_tokens(corpus, Letters(), tmp_path / "cache")
    texts = [path.read_text() for path in sorted(corpus_folder.iterdir())]
    for part, side in (("train", False), ("held_out", True)):
        assert read_part(folder, part) == [t for t, h in zip(texts, corpus.is_held_out, strict=True) if h == side] != []
    assert read_manifest(folder)["dtype"] == ("uint16" if vocab_size == 200 else "int32")


def test_a_separate_evaluation_corpus_leaves_all_of_the_other_for_training(corpus_folder, tmp_path):
    (tmp_path / "eval.txt").write_text("evaluation text")
    data = section((str(corpus_folder),), held_out_paths=(str(tmp_path / "eval.txt"),))
    corpus = prepare.open_split(data)
    folder = prepare.prepare_tokens(corpus, Letters(), tmp_path / "cache")
    assert read_part(folder, "held_out") == ["evaluation text"] and len(read_part(folder, "train")) == 12
    assert "evaluation text" not in set(corpus.training_texts())


def test_the_standard_library_with_plain_text_for_evaluation(tmp_path, monkeypatch):
    (tmp_path / "eval.txt").write_text("evaluation text")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "a.py").write_text("x = 1")
    monkeypatch.setattr("cook.data.corpus.sysconfig.get_paths", lambda: {"stdlib": str(tmp_path / "lib")})
    corpus = prepare.open_split(section((), type="python_stdlib", held_out_paths=(str(tmp_path / "eval.txt"),)))
    assert [(d.text, h) for d, h in corpus.documents()] == [("x = 1", False), ("evaluation text", True)]


def test_a_changed_file_or_tokenizer_or_split_makes_new_tokens(corpus_folder, tmp_path, monkeypatch):
    def folder(**changes):
        corpus = prepare.open_split(section((str(corpus_folder),), **changes))
        return prepare.prepare_tokens(corpus, Letters(), tmp_path / "cache")

    first = folder()
    assert folder() == first
    assert folder(held_out=0.5) != first
    monkeypatch.setattr(Letters, "fingerprint", "other")
    other = folder()
    monkeypatch.setattr(Letters, "fingerprint", "letters")
    (corpus_folder / "03.txt").write_text("document 3 " * 3 + "documenT 3 ")
    assert len({first, other, folder()}) == 3


def test_ids_outside_the_vocabulary_are_refused_by_document(corpus_folder, tmp_path):
    (corpus_folder / "05.txt").write_text("plain and é")
    corpus = prepare.open_split(section((str(corpus_folder),)))
    with pytest.raises(UserError, match=r"document 05\.txt.*\n.*0 to 199\n.*36 to 237"):
        prepare.prepare_tokens(corpus, Letters(), tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


def rows_of(corpus_folder, tmp_path, *, max_length=40, prompt_length=8, **changes):
    tokens = prepare.prepare_tokens(
        prepare.open_split(section((str(corpus_folder),), **changes)), Letters(), tmp_path / "cache"
    )
    return prepare.prepare_rows(
        tokens, Letters(), max_length=max_length, prompt_length=prompt_length, cache=tmp_path / "cache"
    )


def test_rows_are_cached_by_their_lengths(corpus_folder, tmp_path):
    first = rows_of(corpus_folder, tmp_path)
    assert rows_of(corpus_folder, tmp_path) == first
    longer = rows_of(corpus_folder, tmp_path, max_length=41)
    prompted = rows_of(corpus_folder, tmp_path, prompt_length=9)
    assert len({first, longer, prompted}) == 3
    manifest = read_manifest(first)
    assert manifest["train"]["rows"] > manifest["held_out"]["rows"] > 0


def test_a_part_without_a_row_is_refused(tmp_path):
    corpus_file = tmp_path / "evaluation.txt"
    corpus_file.write_text("long enough for a row " * 9)
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / name).write_text("")
    with pytest.raises(UserError, match="has no documents"):
        rows_of(folder, tmp_path)
    with pytest.raises(UserError, match="train part of the corpus has no text"):
        rows_of(folder, tmp_path, held_out_paths=(str(corpus_file),))
    (folder / "a").write_text("long enough for a row " * 9)
    (folder / "b").write_text("long enough for a row " * 9)
    with pytest.raises(UserError, match="data.max_length"):
        rows_of(folder, tmp_path, max_length=12)


@pytest.mark.parametrize("mark", ["\n\n", "\n", " ", "x"])
def test_the_end_of_a_single_document_is_held_out(tmp_path, mark):
    # Every word occurs once, so that a training text that held a held-out word would be seen.
    text = mark.join(f"w{number}" for number in range(1000))
    (tmp_path / "book.txt").write_text(text)
    corpus = prepare.open_split(section((str(tmp_path / "book.txt"),), held_out=0.1))
    folder = prepare.prepare_tokens(corpus, Letters(), tmp_path / "cache")
    (train,), (held_out,) = (read_part(folder, part) for part in ("train", "held_out"))
    assert train + held_out == text and 0.85 < len(train) / len(text) <= 0.9
    assert (train.endswith(mark) and held_out.startswith("w")) or mark == "x"
    assert list(corpus.training_texts()) == [train]
    assert promised(corpus, text) <= len(held_out)


def write_large_file(path):
    """A text of 3.6 million characters, which is read as several documents; no line occurs twice."""
    path.write_text("".join(f"{number:07d} a line of the book\n" for number in range(120_000)))
    assert path.stat().st_size > 3 << 20
    return path.read_text()


@pytest.mark.parametrize("share", [0.03, 0.1, 0.3, 0.5, 0.9])
def test_the_end_of_a_file_that_is_read_as_several_documents_is_held_out(tmp_path, share):
    text = write_large_file(tmp_path / "book.txt")
    (tmp_path / "empty.txt").write_text("")
    for paths in (tmp_path / "book.txt",), (tmp_path,):
        corpus = prepare.open_split(section(tuple(map(str, paths)), held_out=share))
        assert sum(1 for _ in corpus.corpus.documents()) == 4
        folder = prepare.prepare_tokens(corpus, Letters(), tmp_path.with_name(f"{tmp_path.name}-cache"))
        train, held_out = ("".join(read_part(folder, part)) for part in ("train", "held_out"))
        assert train + held_out == text and train.endswith("\n")
        # A break is at most a tenth of a document before the place that the share gives.
        assert 0 <= len(held_out) - share * len(text) <= (1 << 20) // 10 + 1
        assert "".join(corpus.training_texts()) == train
        assert promised(corpus, text) <= len(held_out)
        names = [document.name for document, _ in corpus.documents()]
        assert len(set(names)) == len(names) == 5


@pytest.mark.parametrize("cut", [1 << 20, (1 << 20) + 1, (1 << 20) - 1])
def test_a_held_out_end_that_begins_where_a_document_does(tmp_path, cut):
    text = "x" * (1 << 20) + "y" * 100
    documents = [Document("a", text[: 1 << 20]), Document("b", text[1 << 20 :])]
    parts = list(prepare._end_held_out(documents, cut))
    assert all(document.text for document, _ in parts)
    assert "".join(document.text for document, held_out in parts if held_out) == text[cut:]


def test_of_several_files_whole_documents_are_held_out_by_their_names(tmp_path):
    write_large_file(tmp_path / "book.txt")
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(f"document {number}")
    corpus = prepare.open_split(section((str(tmp_path),)))
    documents = list(corpus.corpus.documents())
    expected = corpus_module.split([document.name for document in documents], 0.3).tolist()
    assert [(d, h) for d, h in corpus.documents()] == list(zip(documents, expected, strict=True))
    assert len(documents) == 24 and corpus.notes == []


@pytest.mark.parametrize("text", ["ab", "\n\n\n", "a b"])
def test_both_parts_of_the_shortest_document_have_text(text):
    for place in range(1, len(text)):
        assert 0 < prepare.break_before(text, place) < len(text)


def test_a_tokenizer_is_trained_once_on_training_documents_alone(corpus_folder, tmp_path, monkeypatch):
    seen = []

    def train(texts, path, *, vocab_size, seed):
        seen.append(list(texts))
        path.write_bytes(b"model")
        return 77

    monkeypatch.setattr(prepare, "train_sentencepiece", train)
    config = SimpleNamespace(type="sentencepiece", path=None, vocab_size=500)
    corpus = prepare.open_split(section((str(corpus_folder),)))

    def prepared():
        return prepare.prepare_tokenizer(config, corpus.training_texts(), corpus.fingerprint, tmp_path / "cache")

    path = prepared()
    assert path.read_bytes() == b"model" and prepared() == path
    assert read_manifest(path.parent)["left_out"] == {prepare.NOT_SAMPLED: {"count": 77, "named": []}}
    [texts] = seen
    held_out = {document.text for document, is_held_out in corpus.documents() if is_held_out}
    assert held_out and not held_out & set(texts) and len(texts) + len(held_out) == 12
    config.vocab_size = 501
    assert prepared() != path


def test_a_named_tokenizer_is_taken_and_a_missing_one_refused(corpus_folder, tmp_path):
    corpus = prepare.open_split(section((str(corpus_folder),)))
    given = SimpleNamespace(type="hf", path="some/folder", vocab_size=500)
    assert str(prepare.prepare_tokenizer(given, corpus.training_texts(), corpus.fingerprint, tmp_path)) == "some/folder"
    with pytest.raises(UserError, match="tokenizer.path is missing"):
        prepare.prepare_tokenizer(SimpleNamespace(type="hf", path=None, vocab_size=500), [], "f", tmp_path)


def test_documents_of_a_single_token_are_kept(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(12):
        (folder / f"{number}.txt").write_text("abcdefghijkl"[number])
    manifest = read_manifest(rows_of(folder, tmp_path, held_out=0.3))
    assert manifest["train"]["samples"] + manifest["held_out"]["samples"] == 12
    assert manifest["train"]["left_out"] == manifest["held_out"]["left_out"] == {}


def test_what_the_tokenizer_does_not_know_is_counted(corpus_folder, tmp_path):
    class Forgetful(Letters):
        def encode_batch(self, texts):
            return [np.where(ids == 4 + ord("d"), self.unk_id, ids) for ids in super().encode_batch(texts)]

    folder = prepare.prepare_tokens(prepare.open_split(section((str(corpus_folder),))), Forgetful(), tmp_path / "cache")
    letters = "".join(path.read_text() for path in corpus_folder.iterdir()).count("d")
    assert read_manifest(folder)["left_out"] == {prepare.UNKNOWN: {"count": letters, "named": []}}


def promised(corpus: prepare.SplitCorpus, text: str) -> int:
    """The number of held-out characters that the note of a single text promises."""
    (note,) = corpus.notes
    found = re.fullmatch(r"a single text: at least the last ([\d,]+) of ([\d,]+) characters are held out", note)
    assert found and int(found[2].replace(",", "")) == len(text), note
    return int(found[1].replace(",", ""))
