"""Checks of the corpus and of several sources."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from cook.config import check_inputs


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


def test_all_missing_paths_stand_in_one_error(errors_of, bmcook, elsewhere):
    (elsewhere / "there.txt").write_text("x")
    bmcook["model"] = {"type": "cpm_ant", "path": "models/none"}
    bmcook["tokenizer"]["path"] = "none.model"
    bmcook["data"] |= {"type": "text", "paths": ["there.txt", "none/*.txt"], "held_out_paths": ["gone"]}
    bmcook["distillation"] = {"teacher": "teacher", "ce_scale": 1}
    [message] = errors_of()
    assert message.startswith(
        "5 path(s) do not exist:\n    model.path: models/none\n    tokenizer.path: none.model\n"
        "    data.paths.1: none/*.txt\n    data.held_out_paths.0: gone\n    distillation.teacher: teacher\n"
    )


def test_files_folders_and_globs_are_found(load, bmcook, elsewhere):
    (elsewhere / "deep" / "er").mkdir(parents=True)
    (elsewhere / "deep" / "er" / "a[1].txt").write_text("x")
    paths = ["deep", "deep/er/a[1].txt", "deep/**/*.txt", str(elsewhere / "deep" / "*")]
    bmcook["data"] = {"type": "text", "paths": paths, "max_length": 32}
    assert load().data.paths == tuple(paths)


def test_a_glob_that_matches_nothing_is_missing(errors_of, bmcook, elsewhere):
    (elsewhere / "deep").mkdir()
    bmcook["data"] = {"type": "text", "paths": ["deep/*.txt"], "max_length": 32}
    assert "data.paths.0: deep/*.txt" in errors_of()[0]


def test_a_model_path_is_no_glob(errors_of, bmcook, elsewhere):
    (elsewhere / "m.pt").write_text("x")
    bmcook["model"]["path"] = "*.pt"
    assert "model.path: *.pt" in errors_of()[0]


def test_a_teacher_that_an_earlier_stage_writes_need_not_be_there(load, bmcook):
    bmcook["distillation"] = {"teacher": "results/tiny/dense", "ce_scale": 1}
    assert load().distillation.teacher == "results/tiny/dense"


def test_masks_need_not_be_there(load, elsewhere):
    load("fine-grained.train_mask=false", "coarse-grained.train_mask=false")
    assert not (elsewhere / "results").exists()


@pytest.mark.parametrize(
    "section, key, value, kind, said",
    [
        ("model", "path", "thing", "folder", "model.path: the folder has no config.json"),
        ("model", "path", "thing", "file", "model.path: not a model"),
        ("tokenizer", "path", "thing", "folder", "tokenizer.path: not a file"),
    ],
)
def test_paths_of_the_wrong_kind(errors_of, bmcook, elsewhere, section, key, value, kind, said):
    (elsewhere / value).mkdir() if kind == "folder" else (elsewhere / value).write_text("x")
    bmcook[section][key] = value
    [message] = errors_of()
    assert message.startswith(said)


def test_a_hugging_face_tokenizer_is_a_folder(errors_of, bmcook, elsewhere):
    (elsewhere / "thing").write_text("x")
    bmcook["tokenizer"] |= {"type": "hf", "path": "thing"}
    assert errors_of()[0].startswith("tokenizer.path: not a folder")


@pytest.mark.parametrize("name", ["a" * 5000, "b\x7fc/" * 2000])
def test_impossible_names_are_missing(errors_of, bmcook, name):
    bmcook["model"]["path"] = name
    assert errors_of()[0].startswith("1 path(s) do not exist")


REPOSITORY = str(Path(check_inputs.__file__).parents[2])


@pytest.mark.parametrize(
    "folder",
    [
        "/",
        "//",
        "/tmp/../",
        REPOSITORY,
        os.path.dirname(REPOSITORY),
        f"{REPOSITORY}/results/..",
        f"{REPOSITORY}/cook",
        f"{REPOSITORY}/cook/config/new",
        f"{REPOSITORY}/config",
        f"{REPOSITORY}/tests/x",
        f"{REPOSITORY}/results/bench/x",
        f"{REPOSITORY}/.git",
    ],
)
def test_folders_that_no_run_may_write_into(errors_of, folder):
    assert any(message.startswith("output_dir: ") for message in errors_of(f'output_dir="{folder}"'))
    assert any(message.startswith("data.cache_dir: ") for message in errors_of(f'data.cache_dir="{folder}"'))


@pytest.mark.parametrize("folder", ["x", "../x", "/tmp/some/x", f"{REPOSITORY}/results/x", f"{REPOSITORY}/cook2"])
def test_folders_that_a_run_may_write_into(load, folder):
    assert load(f"output_dir={folder}").output_dir == folder


def test_a_link_into_the_repository_is_seen_through(errors_of, elsewhere):
    (elsewhere / "link").symlink_to(f"{REPOSITORY}/cook")
    assert "cook/ is a folder of the program" in errors_of("output_dir=link/new")[0]


def test_a_file_is_no_output_folder(errors_of, elsewhere):
    (elsewhere / "file").write_text("x")
    assert errors_of("output_dir=file")[0].startswith("output_dir: this path is a file")


@pytest.mark.parametrize("key", ["coarse-grained.coarse_mask", "fine-grained.heads_mask", "fine-grained.dimff_mask"])
def test_masks_stay_out_of_the_program_too(errors_of, key):
    messages = errors_of(f"{key}={REPOSITORY}/config/mask.pt")
    assert any(message.startswith(f"{key}: config/ is a folder of the program") for message in messages)


def home_paths(tree):
    """Every text of a tree of dataclasses, lists and mappings that still begins with `~`."""
    if dataclasses.is_dataclass(tree):
        tree = vars(tree)
    below = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return [tree] if isinstance(tree, str) and tree.startswith("~") else [p for node in below for p in home_paths(node)]


def test_a_tilde_is_the_home_folder_in_every_path(load, bmcook, scheme, elsewhere, monkeypatch):
    home = elsewhere / "home"
    (home / "m").mkdir(parents=True)
    (home / "m" / "config.json").write_text("{}")
    for name in ("a.jsonl", "held.jsonl", "t.model"):
        (home / name).write_text("x")
    (home / "ds.json").write_text('{"zero_optimization": {"offload_param": {"nvme_path": "~/nvme"}}}')
    (home / "cpm.json").write_text(json.dumps(bmcook["model"]["config"]))
    (home / "scheme.json").write_text(json.dumps(scheme).replace("results/tiny", "~/masks"))
    bmcook["output_dir"], bmcook["deepspeed"] = "~/out", "~/ds.json"
    bmcook["model"] |= {"path": "~/m", "config": "~/cpm.json"}
    bmcook["tokenizer"]["path"] = "~/t.model"
    bmcook["data"] |= {"type": "jsonl", "paths": ["~/a.jsonl", "~/*.jsonl"], "held_out_paths": ["~/held.jsonl"]}
    bmcook["data"]["cache_dir"] = "~/cache"
    bmcook["pruning"]["l0_pruning"] = "~/scheme.json"
    bmcook["distillation"] = {"teacher": "~/m", "ce_scale": 1}
    monkeypatch.setenv("HOME", str(home))
    config = load()
    assert home_paths(config) == []
    assert config.output_dir == f"{home}/out" and config.source.l0_pruning == f"{home}/scheme.json"
    assert config.data.paths == (f"{home}/a.jsonl", f"{home}/*.jsonl") and config.distillation.teacher == f"{home}/m"
    assert config.coarse.coarse_mask == f"{home}/masks/layer.pt"
    assert config.deepspeed["zero_optimization"]["offload_param"]["nvme_path"] == f"{home}/nvme"


def test_a_tilde_of_the_sources_and_of_a_pattern(load, bmcook, elsewhere, monkeypatch):
    (elsewhere / "a.txt").write_text("x")
    (elsewhere / "old.safetensors").write_text("x")
    monkeypatch.setenv("HOME", str(elsewhere))
    bmcook["data"] = {"max_length": 32, "sources": [{"type": "text", "paths": ["~/a.txt"], "held_out_paths": ["~/*"]}]}
    bmcook["stages"] = [{"name": "pattern"}]
    bmcook["pruning"] |= {"mask_method": "pattern", "pruning_mask_path": "~/new.safetensors"}
    bmcook["pattern"] = {"type": 7, "sparsity": 50, "previous_mask": "~/old.safetensors"}
    config = load()
    assert home_paths(config) == [] and config.pattern.previous_mask == f"{elsewhere}/old.safetensors"


def test_a_missing_path_is_named_as_it_was_resolved(errors_of, bmcook, monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    bmcook["data"] |= {"type": "text", "paths": ["~/gone.txt", "./~/gone.txt", "~nobody-of-this-name/x"]}
    [message] = errors_of()
    for path in ("/nowhere/gone.txt", "./~/gone.txt", "~nobody-of-this-name/x"):
        assert f": {path}\n" in message
