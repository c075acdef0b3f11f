from __future__ import annotations

import os

import pytest
from safetensors import SafetensorError

from cook.base.errors import RunFailed, UserError
from cook.export.publish import published


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
        ("circle", "leads nowhere"),
        ("thesis", "something other than a model"),
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
