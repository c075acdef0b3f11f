"""The metrics of the nine GLUE tasks, each its own (Wang et al. 2019, table 1)."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np

Metrics = dict[str, float]


def glue_metrics(task: str, predictions: np.ndarray, targets: np.ndarray) -> Metrics:
    """All metrics of a task, as fractions.

    A correlation that is undefined because all predictions are equal counts as 0.

    Args:
        task: The task's name in `cook.data.benchmarks.glue.GLUE_TASKS`.
        predictions: `[rows]`, predicted class ids, or scores for a regression.
        targets: `[rows]`, the correct ones.
    """
    assert len(predictions) == len(targets) > 0
    return _METRICS.get(task, _accuracy)(predictions, targets)


def main_metric(task: str) -> str:
    """The name of a task's main metric, as in the benchmark's average."""
    return {"CoLA": "mcc", "STS-B": "corr", "MRPC": "acc_and_f1", "QQP": "acc_and_f1"}.get(task, "acc")


def _accuracy(predictions: np.ndarray, targets: np.ndarray) -> Metrics:
    return {"acc": float((predictions == targets).mean())}


def _accuracy_and_f1(predictions: np.ndarray, targets: np.ndarray) -> Metrics:
    from sklearn.metrics import f1_score

    accuracy = _accuracy(predictions, targets)["acc"]
    f1 = float(f1_score(targets, predictions, zero_division=0.0))
    return {"acc": accuracy, "f1": f1, "acc_and_f1": (accuracy + f1) / 2}


def _matthews(predictions: np.ndarray, targets: np.ndarray) -> Metrics:
    from sklearn.metrics import matthews_corrcoef

    return {"mcc": float(matthews_corrcoef(targets, predictions))}


def _correlations(predictions: np.ndarray, targets: np.ndarray) -> Metrics:
    from scipy.stats import pearsonr, spearmanr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a constant input gives NaN, which is handled below
        pearson = float(np.nan_to_num(pearsonr(predictions, targets)[0])) if len(targets) > 1 else 0.0
        spearman = float(np.nan_to_num(spearmanr(predictions, targets)[0])) if len(targets) > 1 else 0.0
    return {"pearson": pearson, "spearmanr": spearman, "corr": (pearson + spearman) / 2}


_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Metrics]] = {
    "CoLA": _matthews,
    "MRPC": _accuracy_and_f1,
    "QQP": _accuracy_and_f1,
    "STS-B": _correlations,
}
