"""The metrics of GLUE (Wang et al. 2019, table 1) and of SQuAD (Rajpurkar et al. 2016, 2018)."""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from cook.data.benchmarks.squad import Question

Metrics = dict[str, float]
Scores = Mapping[str, float]
"""A number per question, by id."""


def glue_metrics(task: str, predictions: np.ndarray, targets: np.ndarray) -> Metrics:
    """All metrics of a GLUE task, as fractions. A correlation of equal predictions, which is undefined, counts as 0.

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


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> str:
    """Converts to lower case and removes punctuation, articles and extra white space, in the official order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    return float(normalised(prediction) == normalised(answer))


def f1(prediction: str, answer: str, *, empty_counts: bool) -> float:
    """Harmonic mean of precision and recall over words.

    `empty_counts` is for version 2.0, where two texts without words agree; in 1.1 they score 0.
    """
    given, wanted = normalised(prediction).split(), normalised(answer).split()
    if empty_counts and not (given and wanted):
        return float(given == wanted)
    common = sum((Counter(given) & Counter(wanted)).values())
    if not common:
        return 0.0
    precision, recall = common / len(given), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def squad_v1_metrics(questions: Sequence[Question], predictions: Mapping[str, str]) -> dict[str, float]:
    """`exact_match` and `f1` in percent, as evaluate-v1.1.py prints them; a question without a prediction counts 0."""
    exact = total_f1 = 0.0
    for question in questions:
        texts = [text for text, _ in question.answers]
        if question.id in predictions and texts:
            prediction = predictions[question.id]
            exact += max(exact_match(prediction, text) for text in texts)
            total_f1 += max(f1(prediction, text, empty_counts=False) for text in texts)
    return {"exact_match": 100.0 * exact / len(questions), "f1": 100.0 * total_f1 / len(questions)}


def squad_v2_metrics(
    questions: Sequence[Question],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float],
    threshold: float = 1.0,
) -> dict[str, float]:
    """The numbers of the official evaluate-v2.0.py, in percent.

    The prediction for an unanswerable question is compared with the empty text. References that normalise to nothing
    are ignored. The thresholds on the null odds that would have been best are reported too.

    Args:
        questions: The reference.
        predictions: Texts by question; the empty text says that there is no answer.
        null_odds: Score of no answer minus score of the best answer, by question.
        threshold: Null odds above it turn a prediction into no answer, as the script's `--na-prob-thresh` does.
    """
    asked = [question for question in questions if question.id in predictions]
    raw_exact, raw_f1, answerable = {}, {}, {}
    for question in asked:
        texts = [text for text, _ in question.answers if normalised(text)] or [""]
        prediction = predictions[question.id]
        raw_exact[question.id] = max(exact_match(prediction, text) for text in texts)
        raw_f1[question.id] = max(f1(prediction, text, empty_counts=True) for text in texts)
        answerable[question.id] = bool(question.answers)
    exact = _with_threshold(raw_exact, null_odds, answerable, threshold)
    f1s = _with_threshold(raw_f1, null_odds, answerable, threshold)
    found = {"exact": _percent(list(exact.values())), "f1": _percent(list(f1s.values())), "total": float(len(asked))}
    for name, kind in (("HasAns", True), ("NoAns", False)):
        chosen = [key for key, has in answerable.items() if has is kind]
        if chosen:
            found[f"{name}_exact"] = _percent([exact[key] for key in chosen])
            found[f"{name}_f1"] = _percent([f1s[key] for key in chosen])
            found[f"{name}_total"] = float(len(chosen))
    found["best_exact"], found["best_exact_thresh"] = _best(predictions, raw_exact, null_odds, answerable)
    found["best_f1"], found["best_f1_thresh"] = _best(predictions, raw_f1, null_odds, answerable)
    return found


def _percent(values: Sequence[float]) -> float:
    return 100.0 * sum(values) / len(values) if values else 0.0


def _with_threshold(scores: Scores, odds: Scores, answerable: Mapping[str, bool], threshold: float) -> dict[str, float]:
    return {
        key: float(not answerable[key]) if odds.get(key, 0.0) > threshold else score for key, score in scores.items()
    }


def _best(
    predictions: Mapping[str, str], scores: Scores, odds: Scores, answerable: Mapping[str, bool]
) -> tuple[float, float]:
    """The best score over all thresholds, in percent, and its threshold: starts without answers, adds one by one."""
    current = best = float(sum(not has for has in answerable.values()))
    threshold = 0.0
    for key in sorted(scores, key=lambda key: odds.get(key, 0.0)):
        current += scores[key] if answerable[key] else -float(bool(predictions[key]))
        if current > best:
            best, threshold = current, odds.get(key, 0.0)
    return 100.0 * best / max(1, len(scores)), threshold
