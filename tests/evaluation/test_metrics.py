"""GLUE's metrics against formulas written out in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cook.data.benchmarks.glue import GLUE_TASKS
from cook.data.benchmarks.squad import Question
from cook.evaluation.metrics import (
    exact_match,
    f1,
    glue_metrics,
    main_metric,
    normalised,
    squad_v1_metrics,
    squad_v2_metrics,
)

RANDOM = np.random.default_rng(0)
TARGETS = RANDOM.integers(0, 2, 60)
PREDICTIONS = np.where(RANDOM.random(60) < 0.3, 1 - TARGETS, TARGETS)


def confusion() -> tuple[int, int, int, int]:
    cells = [(PREDICTIONS == p) & (TARGETS == t) for p, t in ((1, 1), (0, 0), (1, 0), (0, 1))]
    return tuple(int(cell.sum()) for cell in cells)  # type: ignore[return-value]


def test_matthews():
    tp, tn, fp, fn = confusion()
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert glue_metrics("CoLA", PREDICTIONS, TARGETS) == {"mcc": pytest.approx(wanted)}
    assert glue_metrics("CoLA", np.ones(4), np.array([0, 1, 1, 0])) == {"mcc": 0.0}


@pytest.mark.parametrize("task", ["MRPC", "QQP"])
def test_accuracy_and_f1_of_the_positive_class(task):
    tp, tn, fp, fn = confusion()
    accuracy, f1 = (tp + tn) / 60, 2 * tp / (2 * tp + fp + fn)
    found = glue_metrics(task, PREDICTIONS, TARGETS)
    assert found == pytest.approx({"acc": accuracy, "f1": f1, "acc_and_f1": (accuracy + f1) / 2})
    assert glue_metrics(task, np.zeros(3), np.ones(3))["f1"] == 0.0


@pytest.mark.parametrize("task", ["SST-2", "MNLI", "QNLI", "RTE", "WNLI"])
def test_accuracy(task):
    assert glue_metrics(task, np.array([2, 0, 1, 1]), np.array([2, 1, 1, 1])) == {"acc": 0.75}


def test_correlations():
    x, y = RANDOM.normal(size=30), RANDOM.normal(size=30)
    y = np.exp(x) + 0.3 * y
    ranks = [np.argsort(np.argsort(values)) for values in (x, y)]
    found = glue_metrics("STS-B", x, y)
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found["spearmanr"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert found["corr"] == pytest.approx((found["pearson"] + found["spearmanr"]) / 2)


def test_a_constant_prediction_correlates_with_nothing():
    for predictions, targets in ((np.ones(4), np.arange(4.0)), (np.array([1.0]), np.array([2.0]))):
        assert glue_metrics("STS-B", predictions, targets) == {"pearson": 0.0, "spearmanr": 0.0, "corr": 0.0}


def test_every_task_reports_its_main_metric():
    for task in GLUE_TASKS:
        targets = np.array([0.0, 1.0, 1.0])
        assert main_metric(task) in glue_metrics(task, targets, targets)
        assert glue_metrics(task, targets, targets)[main_metric(task)] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("The Denver Broncos", "denver broncos"),
        ("an  apple, a day", "apple day"),
        ("Saint Bernadette Soubirous.", "saint bernadette soubirous"),
        ("$5.2 billion", "52 billion"),
        ("  white\tspace\nof any  kind ", "white space of any kind"),
        ("theatre and anthem", "theatre and anthem"),  # articles only as whole words
        ("A", ""),  # the known case of an answer that normalises to nothing
        ("the", ""),
        ("a.b", "ab"),  # punctuation goes first: no article is left over
        ("the-a", "thea"),
        ("“the”", "“ ”"),  # only ASCII punctuation is taken out, but the article between is a word
        ("École Normale", "école normale"),
        ("", ""),
    ],
)
def test_normalisation(text, wanted):
    assert normalised(text) == wanted


def test_exact_match():
    assert exact_match("The Broncos!", "broncos") == 1.0
    assert exact_match("Broncos", "Denver Broncos") == 0.0


def test_f1_counts_words_as_often_as_they_occur():
    # 2 words in common of 3 given and 4 wanted
    assert f1("b b c", "b c c d", empty_counts=False) == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))
    assert f1("x", "y", empty_counts=False) == 0.0


@pytest.mark.parametrize(
    ("given", "wanted", "v1", "v2"),
    [("", "", 0.0, 1.0), ("the", "a", 0.0, 1.0), ("", "x", 0.0, 0.0), ("x", "the", 0.0, 0.0)],
)
def test_texts_without_words_agree_in_version_2_only(given, wanted, v1, v2):
    assert f1(given, wanted, empty_counts=False) == v1
    assert f1(given, wanted, empty_counts=True) == v2


def asked(key: str, *answers: str) -> Question:
    return Question(id=key, text="?", context="", answers=tuple((text, 0) for text in answers))


def test_version_1_takes_the_best_reference_and_counts_missing_predictions():
    questions = [asked("1", "Denver", "Denver Broncos"), asked("2", "gold"), asked("3", "x")]
    found = squad_v1_metrics(questions, {"1": "the Broncos", "2": "Gold"})
    # "broncos" against "denver broncos": precision 1, recall 1/2
    assert found == pytest.approx({"exact_match": 100 / 3, "f1": 100 * (2 / 3 + 1) / 3})


def test_version_2():
    questions = [asked("has1", "gold", "the"), asked("has2", "a b c"), asked("no1"), asked("no2")]
    predictions = {"has1": "gold", "has2": "b x", "no1": "", "no2": "something"}
    odds = {"has1": -5.0, "has2": 1.0, "no1": 2.0, "no2": 3.0}
    found = squad_v2_metrics(questions, predictions, odds, threshold=10.0)
    # "b c" against "b x": one word of two and two ("a" is an article).
    assert found["exact"] == pytest.approx(50.0) and found["f1"] == pytest.approx(100 * 2.5 / 4)
    assert found["HasAns_exact"] == pytest.approx(50.0) and found["HasAns_f1"] == pytest.approx(75.0)
    assert found["NoAns_exact"] == found["NoAns_f1"] == pytest.approx(50.0)
    assert (found["total"], found["HasAns_total"], found["NoAns_total"]) == (4.0, 2.0, 2.0)
    # With the threshold at 2.5 question no2 is not answered: what was wrong is right.
    assert squad_v2_metrics(questions, predictions, odds, threshold=2.5)["exact"] == pytest.approx(75.0)
    # Beginning with no answers (2 right), letting has1 in gives 3, has2 3.5 in F1 and nothing in exact matches.
    assert found["best_exact"] == pytest.approx(75.0) and found["best_exact_thresh"] == -5.0
    assert found["best_f1"] == pytest.approx(100 * 3.5 / 4) and found["best_f1_thresh"] == 1.0


def test_version_2_where_nothing_helps():
    found = squad_v2_metrics([asked("no")], {"no": "x"}, {"no": 0.5}, threshold=1.0)
    assert found["exact"] == 0.0 and found["best_exact"] == 100.0 and found["best_exact_thresh"] == 0.0
    assert "HasAns_exact" not in found
