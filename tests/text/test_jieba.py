"""The tokenizer of CPM-Ant against transformers' own class, on a vocabulary made for the test."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, CpmAntTokenizer

from cook.base.errors import UserError
from cook.text.jieba import KEPT_WORDS, MAX_WORD_CHARS, SPECIAL, JiebaTokenizer
from cook.text.tokenizer import load_tokenizer

PIECES = (
    "的 一 不 在 人 有 我 他 这 中 大 来 上 国 新 年 中国 中国人 北京 北京大学 大学 大学生 "
    "新年 讲话 希望 世界 ， 。 《 》 "
    "a b c d e f g h i l o r t w ab abc hello world wor ld < > / . 1 2 12 2024 ## \u3000 é"
).split(" ")
TEXTS = (
    "我在北京大学，他在中国。",
    "新年讲话：中国人的希望 hello  world\n\n2024年 abcd 龘靐",
    "\thello\r\nworld\n \u3000é",
    "",
    "a" * 300 + " " + "ab" * 99,
)


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join((*SPECIAL, *PIECES)) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tokenizer(vocab):
    return load_tokenizer("jieba", str(vocab))


@pytest.fixture(scope="module")
def theirs(vocab):
    return CpmAntTokenizer(str(vocab))


def ids_of(theirs, text):
    return theirs(text, add_special_tokens=False)["input_ids"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*PIECES, " ", "\n", "\r\n", "龘", "国学生", "x" * 40]), max_size=40).map("".join))
@example(TEXTS[0])
@example(TEXTS[1])
@example(TEXTS[2])
@example(TEXTS[4])
def test_ids_are_those_of_transformers(tokenizer, theirs, text):
    assert tokenizer.encode(text) == ids_of(theirs, text)


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=50))
def test_ids_of_any_text_are_those_of_transformers(tokenizer, theirs, text):
    if any(name in text for name in SPECIAL):  # there a special token, here text
        return
    assert tokenizer.encode(text) == ids_of(theirs, text)


def test_special_ids_and_size(tokenizer, theirs):
    assert tokenizer.vocab_size == len(SPECIAL) + len(PIECES) == theirs.vocab_size
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 6, 7)
    assert (theirs.pad_token_id, theirs.unk_token_id, theirs.bos_token_id, theirs.eos_token_id) == (0, 1, 6, 7)
    assert tokenizer.encode("\n ") == [4, 5]


def test_a_text_of_known_pieces_comes_back(tokenizer):
    text = "我在北京大学，他在中国。\nhello world 2024"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    # Longest match inside a jieba word: one id for the university, none for the city and the school.
    assert tokenizer.encode("北京大学") == [10 + PIECES.index("北京大学")]


def test_text_is_text_even_where_it_spells_a_special_token(tokenizer):
    ids = tokenizer.encode("a</s><s>b</n>")
    assert not {6, 7, 4} & set(ids) and tokenizer.decode(ids).startswith("a</")


def test_a_word_too_long_is_one_unknown_id(vocab):
    whole = JiebaTokenizer((*SPECIAL, "a"), "test", cut=lambda text: [text])
    assert whole.encode("a" * MAX_WORD_CHARS) == [10] * MAX_WORD_CHARS
    assert whole.encode("a" * (MAX_WORD_CHARS + 1)) == [1]
    assert KEPT_WORDS > 0


def test_a_batch_is_encoded_like_single_texts(tokenizer):
    encoded = tokenizer.encode_batch(TEXTS)
    assert [ids.tolist() for ids in encoded] == [tokenizer.encode(text) for text in TEXTS]
    assert {ids.dtype for ids in encoded} == {np.dtype(np.int32)} and tokenizer.encode_batch([]) == []


def test_a_saved_folder_reads_back_here_and_in_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(str(tmp_path))
    assert type(auto).__name__ == "CpmAntTokenizer"
    again = JiebaTokenizer.load(tmp_path / "vocab.txt")
    assert again.fingerprint == tokenizer.fingerprint
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text) == ids_of(auto, text)


def test_python_jieba_serves_where_rjieba_is_missing(vocab, tokenizer, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "rjieba", None)
    monkeypatch.setitem(sys.modules, "jieba", SimpleNamespace(cut=lambda text, **how: calls.append(how) or [text]))
    other = JiebaTokenizer.load(vocab)
    assert other.encode("中国") == tokenizer.encode("中国") and calls == [{"cut_all": False, "HMM": False}]
    assert other.fingerprint != tokenizer.fingerprint  # another cutter may cut otherwise
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(UserError, match="pip install rjieba"):
        JiebaTokenizer.load(vocab)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<pad>\n<unk>\nthe\n", "line 3 is not '<mask>'"),
        (b"", "line 1 is not '<pad>'"),
        (b"<pad>\n<unk>\n\xff\n", "not UTF-8 at byte"),
        (None, "there is no such vocab.txt"),
    ],
)
def test_files_that_are_no_vocabulary_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_tokenizer("jieba", str(tmp_path / "vocab.txt"))


def test_a_byte_order_mark_is_no_part_of_the_first_piece(vocab, tokenizer, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"\xef\xbb\xbf" + vocab.read_bytes())
    assert load_tokenizer("jieba", str(tmp_path / "vocab.txt")).fingerprint == tokenizer.fingerprint
