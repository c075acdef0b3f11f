"""SQuAD files and windows: strides, targets, the window that gives a token the most context."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import BertTokenizer

from cook.base.errors import UserError
from cook.data.benchmarks.squad import NO_ANSWER, Question, read_squad, squad_windows
from tests.recipe.benchmarks.tiny_task import SPECIAL, WORDS, write_squad


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BertTokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join((*SPECIAL, *WORDS)) + "\n")
    return BertTokenizer(vocab=str(path))


def question(context: str, answer: str | None, start: int | None = None, text: str = "who made it") -> Question:
    at = context.index(answer) if answer and start is None else start
    return Question(id="q", text=text, context=context, answers=((answer, at),) if answer and at is not None else ())


def windows(tokenizer, asked: Question, **options: int):
    sizes = {"max_length": 12, "doc_stride": 2, "max_query_length": 8, **options}
    return squad_windows([asked], tokenizer, **sizes)


def test_both_versions(tmp_path):
    for version, unanswered in (("1.1", 0), ("2.0", 4)):
        write_squad(tmp_path, version)
        found = read_squad(tmp_path / f"train-v{version}.json")
        assert len(found) == 12 and sum(not q.answers for q in found) == unanswered
        assert all(q.context[at : at + len(text)] == text for q in found for text, at in q.answers)


def test_windows_begin_a_stride_apart_and_cover_the_document(tokenizer):
    # 12 = [CLS] + 3 + [SEP] + 6 of the document + [SEP]
    context = "good bad film the a was it plot who"
    rows, found = windows(tokenizer, question(context, "plot"))
    pieces = [[context[a:b] for a, b in window.offsets] for window in found]
    words = context.split()
    assert pieces == [words[0:6], words[2:8], words[4:9]] and {window.first for window in found} == {5}
    assert rows.batch(np.array([0]))["token_type_ids"].tolist() == [[0] * 5 + [1] * 7]
    # "plot" is the 8th word: not in the first window; in the others at the place where it stands.
    assert rows.targets_R.tolist() == [list(NO_ANSWER), [5 + 5, 5 + 5], [5 + 3, 5 + 3]]


def test_every_token_is_judged_once_where_it_has_the_most_context(tokenizer):
    context = "good bad film the a was it plot who"
    _, found = windows(tokenizer, question(context, "plot"))
    owners = [[] for _ in range(9)]
    for order, window in enumerate(found):
        for (begin, _), flag in zip(window.offsets, window.has_most_context, strict=True):
            if flag:
                owners[context[:begin].count(" ")].append(order)
    # By hand, the lesser of left and right: word 3 has 2 and 1, word 4 has 1, 2 and 0, word 6 has 1 and 2.
    assert owners == [[0], [0], [0], [0], [1], [1], [2], [2], [2]]


def test_a_short_document_is_one_window(tokenizer):
    rows, found = windows(tokenizer, question("good film", "film"))
    assert len(found) == 1 and rows.targets_R.tolist() == [[6, 6]] and found[0].has_most_context.all()


def test_an_answer_of_several_words_and_inside_a_word(tokenizer):
    rows, _ = windows(tokenizer, question("it was the good film", "the good"))
    assert rows.targets_R.tolist() == [[7, 8]]
    rows, _ = windows(tokenizer, question("it was the good film", "oo"))
    assert rows.targets_R.tolist() == [[8, 8]]


@pytest.mark.parametrize("asked", [question("good film", None), question("good film", "film", start=0)])
def test_without_an_answer_the_target_is_the_first_token(tokenizer, asked):
    rows, _ = windows(tokenizer, asked)
    assert rows.targets_R.tolist() == [list(NO_ANSWER)]


def test_an_answer_that_a_window_cuts_is_not_its_target(tokenizer):
    rows, _ = windows(tokenizer, question("good bad film the a was it plot", "was it"))
    assert rows.targets_R.tolist() == [list(NO_ANSWER), [8, 9]]


def test_a_long_question_is_cut(tokenizer):
    rows, found = windows(tokenizer, question("good film", "film", text="who made it in the town"), max_query_length=2)
    assert found[0].first == 4 and rows.batch(np.array([0]))["input_ids"].shape[1] == 7
    with pytest.raises(UserError, match="no room"):
        windows(tokenizer, question("good film", "film"), max_length=5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("data"), "no list 'data'"),
        (lambda c: c["data"][0].pop("paragraphs"), r"data\[0\]: no list 'paragraphs'"),
        (lambda c: c["data"][0]["paragraphs"][1].pop("context"), r"paragraphs\[1\]: no text 'context'"),
        (lambda c: c["data"][0]["paragraphs"][2]["qas"][1].pop("id"), r"paragraphs\[2\]\.qas\[1\]: no text 'id'"),
        (lambda c: c["data"][0]["paragraphs"][2]["qas"][1]["answers"][0].update(answer_start=9999), r"answers\[0\]"),
        (lambda c: c["data"][0]["paragraphs"][0]["qas"][1].update(id="q1"), "one id"),
        (lambda c: c["data"].clear(), "no question"),
        (lambda c: c["data"].append(3), r"data\[1\]: no list"),
    ],
)
def test_a_malformed_file_is_told_with_its_place(tmp_path, change, reason):
    write_squad(tmp_path, "1.1")
    content = json.loads((tmp_path / "train-v1.1.json").read_text())
    change(content)
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=reason):
        read_squad(tmp_path / "x.json")


def test_json_that_is_none_is_told_with_its_line(tmp_path):
    (tmp_path / "x.json").write_text('{"data":\n [}')
    with pytest.raises(UserError, match="line 2 column 3"):
        read_squad(tmp_path / "x.json")
