"""GLUE's metrics against formulas written out in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cook.data.benchmarks.glue import GLUE_TASKS
from cook.evaluation.glue_metrics import glue_metrics, main_metric

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
