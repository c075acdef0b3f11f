"""Checks of the corpus and of several sources."""

import json

import pytest


@pytest.fixture
def files(elsewhere):
    for name in ("x.txt", "y.jsonl"):
        (elsewhere / name).write_text("x")


def given(*sources, **others):
    """Settings that put sources in the place of the tiny configuration's corpus."""
    data = {"max_length": 32, "sources": list(sources)} | others
    return f"data={json.dumps(data)}"


X = {"type": "text", "paths": ["x.txt"]}
Y = {"type": "jsonl", "paths": ["y.jsonl"], "name": "wiki"}


def test_the_corpus(errors_of, files):
    assert "has no paths" in errors_of('data.paths=["x.txt"]')[0]
    assert "a jsonl corpus needs its files" in errors_of("data.type=jsonl")[0]


def test_something_is_held_out_for_the_evaluation(errors_of, load, files):
    assert "no data is held out" in errors_of("data.held_out=0")[0]
    assert load("data.held_out=0", "training.eval_rows=0")
    assert load("data.held_out=0", 'data.held_out_paths=["x.txt"]')


def test_several_sources(load, files):
    data = load(given(X | {"weight": 2}, Y | {"weight": 1.5, "split": "all"})).data
    assert data.type is None and [source.type for source in data.sources] == ["text", "jsonl"]
    assert data.sources[0].weight == 2.0 and isinstance(data.sources[0].weight, float)
    assert data.sources[1].paths == ("y.jsonl",) and data.sources[1].name == "wiki"
    mixed = load(given(X | {"weight": 2}, Y | {"weight": 1}, mixing=MIXING))
    assert mixed.data.mixing.every == 5 and mixed.data.mixing.reference == {"text-0": 2, "wiki": 3}
    assert load(given(X | {"streaming": True})).data.sources[0].streaming


MIXING = {"every": 5, "reference": {"text-0": 2.0, "wiki": 3.0}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (given(), "data: no corpus is given"),
        (given(X, type="text"), "data.type: not allowed together with data.sources"),
        (given(X, held_out_paths=["x.txt"]), "data.held_out_paths: not allowed"),
        (given({"type": "text"}), "data.sources.0.paths: a text corpus needs its files"),
        (given({"type": "hub"}), "data.sources.0.name: missing"),
        (given({"type": "hub", "name": "a/b", "paths": ["x.txt"]}), "the hub corpus has no paths"),
        (given({"type": "text", "paths": ["gone.txt"]}), "data.sources.0.paths.0: gone.txt"),
        (given(X | {"weight": 1}, Y), "data.sources.1.weight: missing"),
        (given(X | {"weight": 0}, Y | {"weight": 1}), "data.sources.0.weight"),
        (given(X | {"weight": 1}, Y | {"weight": 1, "streaming": True}), "some are streamed and some are not"),
        (given(X | {"streaming": True}, Y | {"streaming": True}), "streamed sources without weights"),
        (given(X | {"streaming": True}, workers=2), "streamed data has no workers"),
        (given({"type": "python_stdlib", "streaming": True}), "cannot be streamed"),
        (given({"type": "downstream", "paths": ["y.jsonl"], "streaming": True}), "is mapped, not streamed"),
        (given({"type": "cpm_live", "paths": ["."]}), "tokenizer.path: missing, and cpm_live data consists of ids"),
        (given(X | {"name": "wiki"}, Y), "2 sources have the name 'wiki'"),
        (given(X, mixing=MIXING), "there are no sources to mix"),
        (given(X | {"weight": 1}, Y | {"weight": 1}, mixing=MIXING | {"reference": {"w": 2}}), "the source 'wiki'"),
        (given(X | {"weight": 1}, Y | {"weight": 1}, mixing=MIXING | {"reference": {"w": 2}}), "no source 'w'"),
        (given(X | {"weihgt": 1}), "did you mean 'weight'"),
        (given(X | {"weight": "1"}), "data.sources.0.weight"),
    ],
)
def test_what_is_wrong_with_sources(errors_of, files, data, message):
    assert any(message in error for error in errors_of(data)), errors_of(data)
