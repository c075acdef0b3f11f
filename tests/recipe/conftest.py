"""Whole runs that several files of this folder look at: made once, never changed."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.recipe.tiny_run import ATT_FIRST, FFN_FIRST, REPOSITORY, Result, do_prune, run, train, write_run

REPORT = [sys.executable, "-m", "cook", "report", "--config", "bmcook.json"]


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """A finished recipe, and how its commands ended."""

    folder: Path
    stages: tuple[str, ...]
    trained: Result
    pruned: Result
    reported: Result


@pytest.fixture(scope="session")
def att_first(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    return make_run(tmp_path_factory.mktemp("att_first"), ATT_FIRST, tensorboard=True)


@pytest.fixture(scope="session")
def ffn_first(tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    return make_run(tmp_path_factory.mktemp("ffn_first"), FFN_FIRST, tensorboard=False)


@pytest.fixture(scope="session", params=["att_first", "ffn_first"])
def whole_run(request: pytest.FixtureRequest) -> WholeRun:
    return request.getfixturevalue(request.param)


def make_run(folder: Path, stages: tuple[str, ...], *, tensorboard: bool) -> WholeRun:
    write_run(folder, stages, logging__tensorboard=tensorboard)
    trained = train(folder, "--stage", "all")
    assert trained.code == 0, trained
    pruned = do_prune(folder, "--config", "bmcook.json", "--verify")
    reported = run(REPORT, folder, PYTHONPATH=str(REPOSITORY))
    return WholeRun(folder=folder, stages=stages, trained=trained, pruned=pruned, reported=reported)
