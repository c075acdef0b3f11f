"""Arbitrary files and command lines: a configuration, or an error report. No other exception."""

from __future__ import annotations

import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cook.base.errors import UserErrors
from cook.config.load import load_config
from cook.config.types import RunConfig
from tests.config.conftest import BMCOOK, SCHEME

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=10**18),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["auto", "coarse-grained", "att", "x.pt", "*", "~", "..", "\x00", "\ud800", "/", "pretrain"]),
    st.just("a" * 300),
)
VALUES = st.recursive(
    SCALARS,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=5), below, max_size=3),
    max_leaves=8,
)


def places(tree: Any, place: tuple = ()) -> list[tuple]:
    """Every place of a value in a tree."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place] + [found for key, child in children for found in places(child, (*place, key))]


@st.composite
def mutated(draw: st.DrawFn, original: dict[str, Any]) -> Any:
    """The original with a few values replaced, removed or added."""
    tree: Any = copy.deepcopy(original)
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.sampled_from(places(tree)))
        if not place:
            continue
        parent = tree
        for key in place[:-1]:
            parent = parent[key]
        change = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if change == "replace":
            parent[place[-1]] = draw(VALUES)
        elif change == "remove":
            del parent[place[-1]]
        elif isinstance(parent, dict):
            parent[draw(st.text(max_size=6) | st.just("threads"))] = draw(VALUES)
    return tree


def load_or_report(bmcook: str, scheme: str, overrides: list[str], world_size: int | None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bmcook.json").write_text(bmcook)
        (Path(folder) / "l0_pruning.json").write_text(scheme)
        try:
            config = load_config(f"{folder}/bmcook.json", overrides, world_size=world_size)
        except UserErrors as error:
            assert error.errors
            str(error).encode()  # it can be printed
        else:
            assert isinstance(config, RunConfig)
            assert isinstance(config.training.learning_rate, float)


SLOW = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@SLOW
@given(mutated(BMCOOK), mutated(SCHEME), st.sampled_from([None, 1, 3]))
def test_mutated_files(bmcook, scheme, world_size):
    load_or_report(json.dumps(bmcook), json.dumps(scheme), [], world_size)


KEYS = st.sampled_from(
    [".".join(map(str, place)) for place in places(BMCOOK) + places(SCHEME) if place]
    + [
        "deepspeed",
        "deepspeed.bf16.enabled",
        "deepspeed.gradient_accumulation_steps",
        "deepspeed.optimizer.params.lr",
        "distillation",
        "distillation.teacher",
        "model.path",
        "data.paths",
        "stages.pretrain.training",
        "stages.9",
        "gates",
        "model.config.mask_modules",
        "pruning.l0_pruning",
        "data.cache_dir",
        "data.held_out_paths.0",
    ]
)


@SLOW
@given(st.lists(st.tuples(KEYS, VALUES.map(json.dumps) | st.text(max_size=8)), max_size=4))
def test_mutated_by_overrides(changes):
    load_or_report(json.dumps(BMCOOK), json.dumps(SCHEME), [f"{key}={value}" for key, value in changes], 2)


@SLOW
@given(st.text(max_size=30), st.text(max_size=30), st.lists(st.text(max_size=12), max_size=3))
def test_garbage(bmcook, scheme, overrides):
    load_or_report(
        bmcook.encode("utf-8", "replace").decode(), scheme.encode("utf-8", "replace").decode(), overrides, None
    )
