"""SQuAD files and windows: strides, targets, the window that gives a token the most context."""

from __future__ import annotations

import json

import numpy as np
import pytest
from transformers import BertTokenizer

from cook.base.errors import UserError
from cook.data.benchmarks.squad import LOST, NO_ANSWER, Question, read_squad, squad_windows
from cook.data.reports import LeftOut
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
        found = read_squad(tmp_path / f"train-v{version}.json", for_training=True).questions
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
    with pytest.raises(UserError, match="too small for any token"):
        windows(tokenizer, question("good film", "film"), max_length=5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.pop("data"), "no list 'data'"),
        (lambda c: c["data"][0].pop("paragraphs"), r"data\[0\]: no list 'paragraphs'"),
        (lambda c: c["data"][0]["paragraphs"][1].pop("context"), r"paragraphs\[1\]: no text 'context'"),
        (lambda c: c["data"][0]["paragraphs"][2]["qas"][1].pop("id"), r"paragraphs\[2\]\.qas\[1\]: no text 'id'"),
        (lambda c: c["data"][0]["paragraphs"][2]["qas"][1]["answers"][0].update(answer_start="3"), r"answers\[0\]"),
        (lambda c: c["data"][0]["paragraphs"][0]["qas"][1].update(id="q1"), "the same id"),
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
        read_squad(tmp_path / "x.json", for_training=True)


def test_json_that_is_none_is_told_with_its_line(tmp_path):
    (tmp_path / "x.json").write_text('{"data":\n [}')
    with pytest.raises(UserError, match="line 2 column 3"):
        read_squad(tmp_path / "x.json", for_training=True)


def squad(tmp_path, *entries, name="x.json"):
    """A file of paragraphs (context, questions): a question is its answers, or None if it cannot be answered."""
    number, paragraphs = 0, []
    for context, *asked in entries:
        qas = []
        for answers in asked:
            number += 1
            told = [{"text": text, "answer_start": start} for text, start in answers or ()]
            impossible = {"is_impossible": True} if answers is None else {}
            qas.append({"id": f"q{number}", "question": "who made it", "answers": told} | impossible)
        paragraphs.append({"context": context, "qas": qas})
    (tmp_path / name).write_text(json.dumps({"version": "1.1", "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return tmp_path / name


@pytest.mark.parametrize(
    ("context", "text", "start", "wanted"),
    [
        ("good bad film", "bad", 5, ("bad", 5)),
        ("good bad film", "bad", 6, ("bad", 5)),  # counted from 1
        ("one\r\ntwo\r\nbad film", "bad", 8, ("bad", 10)),  # counted where a line end was one character
        ("\U0001f600 bad film", "bad", 3, ("bad", 2)),  # counted in UTF-16
        ("é é bad film", "bad", 6, ("bad", 4)),  # counted in bytes
        ("a very\n bad film", "very bad", 2, ("very\n bad", 2)),  # other white space, at its place
        ("a very\n bad film", "very bad ", 9, ("very\n bad", 2)),  # and elsewhere
        ("a (bad) film", "(bad)", 0, ("(bad)", 2)),
        ("bad and bad", "bad", 8, ("bad", 8)),
        ("bad and bad", "bad", 7, None),  # twice, and not there
        ("bad and bad", "good", 0, None),
        ("a bad film", "bad", -1, ("bad", 2)),
        ("a bad film", " ", 1, None),
    ],
)
def test_an_answer_is_looked_for_by_its_words(tmp_path, context, text, start, wanted):
    filler = ("the town", [("town", 4)], [("the", 0)])
    found = read_squad(squad(tmp_path, (context, [(text, start)]), filler), for_training=True)
    if wanted is None:
        assert [question.id for question in found.questions] == ["q2", "q3"] and found.num_found == 0
        assert found.left_out.record() == {LOST: {"count": 1, "named": ["q1"]}}
        return
    assert found.questions[0].answers == (wanted,) and not found.left_out
    assert context[wanted[1] : wanted[1] + len(wanted[0])] == wanted[0] and " ".join(wanted[0].split()) == text.strip()
    assert found.num_found == (wanted[1] != start)


def test_no_answer_is_taught_only_where_the_file_says_so(tmp_path):
    path = squad(tmp_path, ("the town", None, [], [("town", 4)]))
    found = read_squad(path, for_training=True)
    assert [question.id for question in found.questions] == ["q1", "q3"]
    assert found.left_out.sentences("x") == ["x: left out: questions with neither an answer nor is_impossible: 1 (q2)"]


def test_a_file_in_which_most_answers_are_lost_is_refused(tmp_path):
    path = squad(tmp_path, ("town and town", [("town", 1)], [("town", 2)], [("and", 5)]))
    with pytest.raises(UserError, match="most answers do not stand(.|\n)*2 of 3 questions"):
        read_squad(path, for_training=True)


def test_an_evaluation_takes_answers_without_a_place(tmp_path):
    path = squad(tmp_path, ("town and town", [("town", -1), ("Town", 99)], []))
    found = read_squad(path, for_training=False)
    assert [question.answers for question in found.questions] == [(("town", -1), ("Town", 99)), ()]
    assert not found.left_out and found.num_found == 0


def test_an_answer_that_no_window_holds_whole_is_left_out(tokenizer):
    context = "good bad film the a was it plot who"
    asked = [question(context, answer) for answer in ("bad film the a was it plot", "film")]
    sizes = {"max_length": 12, "doc_stride": 2, "max_query_length": 2}
    left_out = LeftOut()
    rows, found = squad_windows(asked, tokenizer, **sizes, left_out=left_out)
    assert {window.question for window in found} == {1} and rows.targets_R.any()
    assert {reason: told["count"] for reason, told in left_out.record().items()} == {
        "tokens at the ends of long questions": 2,
        "questions whose answer no window holds whole": 1,
    }
    _, every = squad_windows(asked, tokenizer, **sizes)
    assert {window.question for window in every} == {0, 1}


def test_half_a_surrogate_pair_and_a_file_that_is_too_large_are_named(tmp_path):
    path = squad(tmp_path, ("a bad\ud800 film", [("bad", 2)]))
    with pytest.raises(UserError, match=r"paragraphs\[0\]: 'context' holds half a surrogate pair at character 5"):
        read_squad(path, for_training=True)
    with open(path, "wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(UserError, match="too large"):
        read_squad(path, for_training=False)


def test_a_byte_order_mark_is_no_part_of_the_file(tmp_path):
    path = squad(tmp_path, ("the town", [("town", 4)]))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_squad(path, for_training=True).questions) == 1


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path, tokenizer):
    found = read_squad(squad(tmp_path, ("town and town", [], [])), for_training=True)
    sizes = {"max_length": 12, "doc_stride": 2, "max_query_length": 2}
    with pytest.raises(UserError, match="no question is left(.|\n)*neither an answer nor is_impossible: 2"):
        squad_windows(found.questions, tokenizer, **sizes, left_out=found.left_out)
