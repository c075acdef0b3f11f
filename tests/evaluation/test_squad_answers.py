"""Answers from scores: an exhaustive search over all spans of all windows as the oracle."""

from __future__ import annotations

import numpy as np
import pytest

from cook.data.benchmarks.squad import Question, Window
from cook.evaluation.squad_answers import AnswerOptions, choose_answers

CONTEXT = "zero one two three four five six seven"
OFFSETS = np.array([(CONTEXT.index(w), CONTEXT.index(w) + len(w)) for w in CONTEXT.split()])
QUESTION = Question(id="q", text="?", context=CONTEXT, answers=())
FIRST = 3  # tokens of [CLS] question [SEP]


def windows() -> list[Window]:
    """Words 0 to 4 and 3 to 7; words 3 and 4 are judged in the second."""
    flags = [np.array([True, True, True, False, False]), np.ones(5, bool)]
    return [Window(0, FIRST, OFFSETS[0:5], flags[0]), Window(0, FIRST, OFFSETS[3:8], flags[1])]


def logits(seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(seed)
    # Two places more than the row has tokens, as padding leaves them, with scores that nobody may take.
    made = [random.normal(size=FIRST + 5 + 1 + 2) for _ in range(4)]
    for values in made:
        values[-3:] = 50.0
        values[1:FIRST] = 40.0
    return made[:2], made[2:]


def all_spans(starts, ends, longest: int) -> list[tuple[float, str]]:
    found = []
    for number, window in enumerate(windows()):
        for s in range(5):
            for e in range(s, min(5, s + longest)):
                if window.has_most_context[s]:
                    score = starts[number][FIRST + s] + ends[number][FIRST + e]
                    found.append((score, CONTEXT[window.offsets[s, 0] : window.offsets[e, 1]]))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("longest", [1, 3])
def test_the_best_of_all_spans(seed, longest):
    starts, ends = logits(seed)
    options = AnswerOptions(max_answer_length=longest, allows_no_answer=False)
    answers = choose_answers([QUESTION], windows(), starts, ends, options)
    wanted = all_spans(starts, ends, longest)
    assert answers.predictions["q"] == wanted[0][1]
    texts = [entry["text"] for entry in answers.n_best["q"]]
    assert texts == list(dict.fromkeys(text for _, text in wanted))[:20]
    assert sum(entry["probability"] for entry in answers.n_best["q"]) == pytest.approx(1.0)
    assert answers.null_odds == {}


def test_n_best_is_cut():
    starts, ends = logits(0)
    options = AnswerOptions(n_best=2, allows_no_answer=False)
    assert len(choose_answers([QUESTION], windows(), starts, ends, options).n_best["q"]) <= 2


@pytest.mark.parametrize("above", [True, False])
def test_the_null_threshold(above):
    starts, ends = logits(1)
    best = all_spans(starts, ends, 30)[0]
    null = min(starts[n][0] + ends[n][0] for n in range(2))
    odds = null - best[0]
    options = AnswerOptions(allows_no_answer=True, null_threshold=odds - 0.01 if above else odds + 0.01)
    answers = choose_answers([QUESTION], windows(), starts, ends, options)
    assert answers.null_odds["q"] == pytest.approx(odds)
    assert answers.predictions["q"] == ("" if above else best[1]) and answers.best_texts["q"] == best[1]
    assert "" in [entry["text"] for entry in answers.n_best["q"]]


def test_no_span_at_all():
    nothing = [Window(0, FIRST, OFFSETS[:2], np.zeros(2, bool))]
    scores = [np.zeros(8)]
    for allowed in (True, False):
        answers = choose_answers([QUESTION], nothing, scores, scores, AnswerOptions(allows_no_answer=allowed))
        assert answers.predictions == {"q": ""} and len(answers.n_best["q"]) == 1
