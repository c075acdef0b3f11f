from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cook.base.errors import RunFailed, UserError
from cook.export.model_folder import published, write_model_folder, write_tokenizer
from cook.families.cpm_ant import ADAPTER
from tests.models.cpm_ant_tiny import tiny_model
from tests.tiny_pruning import config_of


def write(output, text="new", source="source"):
    with published(output, source=output.parent / source) as folder:
        (folder / "config.json").write_text(text)
        assert not (output / "config.json").exists() or (output / "config.json").read_text() != text


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: full")])
def test_a_failed_write_is_one_message_and_leaves_the_old_export(tmp_path, error):
    write(tmp_path / "small", "old")
    with pytest.raises(RunFailed, match=r"small: the model cannot be written: (No space|I/O error)(.|\n)*again"):
        with published(tmp_path / "small", source=tmp_path / "source") as folder:
            (folder / "config.json").write_text("half")
            raise error
    assert os.listdir(tmp_path) == ["small"] and (tmp_path / "small" / "config.json").read_text() == "old"
    write(tmp_path / "small")
    assert (tmp_path / "small" / "config.json").read_text() == "new" and os.listdir(tmp_path) == ["small"]


@pytest.mark.parametrize("failure", [UserError("no"), RunFailed("no"), KeyboardInterrupt()])
def test_nothing_is_published_when_the_check_fails(tmp_path, failure):
    with pytest.raises(type(failure)), published(tmp_path / "small", source=tmp_path / "source") as folder:
        (folder / "config.json").write_text("half")
        raise failure
    assert os.listdir(tmp_path) == []


def test_a_failed_rename_brings_the_old_export_back(tmp_path, monkeypatch):
    write(tmp_path / "small", "old")
    rename = type(tmp_path).rename

    def failing(path, target):
        if path.name == ".small.tmp":
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", failing)
    with pytest.raises(RunFailed, match="Input/output error"):
        write(tmp_path / "small")
    assert (tmp_path / "small" / "config.json").read_text() == "old" and os.listdir(tmp_path) == ["small"]


def test_what_a_killed_run_left_is_taken_up(tmp_path):
    # Killed between the two renames: the old export lies aside, the new one is complete but not yet in its place.
    (tmp_path / ".small.old").mkdir()
    (tmp_path / ".small.old" / "config.json").write_text("old")
    (tmp_path / ".small.tmp").mkdir()
    (tmp_path / ".small.tmp" / "stale").write_text("x")
    with pytest.raises(UserError), published(tmp_path / "small", source=tmp_path / "source") as folder:
        assert os.listdir(folder) == []
        raise UserError("not equal")
    assert (tmp_path / "small" / "config.json").read_text() == "old" and os.listdir(tmp_path) == ["small"]


def test_a_link_is_followed_and_stays(tmp_path):
    (tmp_path / "disk").mkdir()
    for name, target in (("link", "disk"), ("dangling", "not_there_yet")):
        (tmp_path / name).symlink_to(tmp_path / target)
        write(tmp_path / name)
        assert (tmp_path / name).is_symlink() and (tmp_path / target / "config.json").read_text() == "new"
    assert sorted(os.listdir(tmp_path)) == ["dangling", "disk", "link", "not_there_yet"]


def test_what_must_not_be_replaced(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    (tmp_path / "source").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "source")
    before = sorted(os.listdir(tmp_path))
    for name, reason in (
        ("file", "is a file"),
        ("circle", "broken link"),
        ("thesis", "does not contain a model"),
        ("source", "would overwrite"),
        ("other", "would overwrite"),
    ):
        with pytest.raises(UserError, match=reason):
            write(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_mount_point_is_refused(tmp_path):
    mount = next(path for path in ("/proc", "/dev") if os.path.ismount(path))
    with pytest.raises(UserError, match="mount point"), published(type(tmp_path)(mount), source=tmp_path):
        raise AssertionError("must not be reached")


class Tokenizer:
    bos_id, eos_id, pad_id = 6, 7, 0

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_config_modeling_file_and_weights(tmp_path):
    model = tiny_model().bfloat16()
    write_model_folder(tmp_path, ADAPTER, config_of(), model.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["model_type"] == "cook_cpm_ant" and config["dim_model"] == 24
    for target in config["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}" in (tmp_path / f"{module}.py").read_text()
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_tensors_are_taken_as_they_come(tmp_path):
    # A generator that would hold two models is noticed: each tensor is dropped before the next shard is filled.
    alive = []

    def tensors():
        for number in range(6):
            alive.append(number)
            yield f"w{number}", torch.full((10,), float(number))

    write_model_folder(tmp_path, ADAPTER, config_of(), tensors(), shard_bytes=40)
    assert alive == list(range(6)) and len(list(tmp_path.glob("model-*.safetensors"))) == 6


def test_a_tokenizer_and_its_ids(tmp_path):
    write_tokenizer(tmp_path, Tokenizer())
    ids = json.loads((tmp_path / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 6, "eos_token_id": 7, "pad_token_id": 0}
