import multiprocessing
import os
import time

import pytest

from cook.base.errors import UserError
from cook.data.cache import cached_folder, fingerprint_of, read_manifest


def builder(content=b"abc", calls=None):
    def build(folder):
        if calls is not None:
            calls.append(folder)
        (folder / "data.bin").write_bytes(content)
        return {"fact": 1}

    return build


def test_built_once_and_described(tmp_path):
    calls = []
    first = cached_folder(tmp_path, "kind", "f" * 64, builder(calls=calls))
    again = cached_folder(tmp_path, "kind", "f" * 64, builder(calls=calls))
    assert first == again == tmp_path / f"kind-{'f' * 16}" and len(calls) == 1
    assert read_manifest(first) == {"fingerprint": "f" * 64, "fact": 1, "files": {"data.bin": 3}}
    assert cached_folder(tmp_path, "kind", "0" * 64, builder(calls=calls)) != first and len(calls) == 2


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest", "other"])
def test_a_damaged_folder_is_rebuilt(tmp_path, damage):
    folder = cached_folder(tmp_path, "kind", "f" * 64, builder())
    if damage == "truncate":
        (folder / "data.bin").write_bytes(b"ab")
    elif damage == "remove":
        (folder / "data.bin").unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:  # the same sixteen digits, another fingerprint
        cached_folder(tmp_path, "kind", "f" * 63 + "0", builder())
        assert read_manifest(folder)["fingerprint"] == "f" * 63 + "0"
    cached_folder(tmp_path, "kind", "f" * 64, builder())
    assert (folder / "data.bin").read_bytes() == b"abc" and read_manifest(folder)["fingerprint"] == "f" * 64


def test_a_failed_build_leaves_nothing(tmp_path):
    def fail(folder):
        (folder / "half").write_bytes(b"x")
        raise UserError("no")

    with pytest.raises(UserError, match="^no$"):
        cached_folder(tmp_path, "kind", "f" * 64, fail)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def _build_and_die(cache):
    def die(folder):
        (folder / "half").write_bytes(b"x")
        os._exit(9)

    cached_folder(cache, "kind", "f" * 64, die)


def _build_slowly(cache):
    def build(folder):
        time.sleep(0.3)
        (folder / "data.bin").write_bytes(b"abc")
        with open(cache / "builds", "a") as log:
            log.write("x")
        return {}

    cached_folder(cache, "kind", "f" * 64, build)


def test_a_killed_build_is_cleared_away(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=_build_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 9 and any(path.name.endswith(".tmp") for path in tmp_path.iterdir())
    folder = cached_folder(tmp_path, "kind", "f" * 64, builder())
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", folder.name]
    assert sorted(path.name for path in folder.iterdir()) == ["data.bin", "manifest.json"]


def test_two_runs_build_one_folder_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_build_slowly, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert (tmp_path / "builds").read_text() == "x"


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cache of prepared data"):
        cached_folder(tmp_path / "file" / "cache", "kind", "f" * 64, builder())

    def full(folder):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left on device: .*kind-f"):  # no mistake of the user: exit code 1
        cached_folder(tmp_path, "kind", "f" * 64, full)


def test_fingerprints_differ_with_any_part():
    assert fingerprint_of("a", 1) == fingerprint_of("a", 1)
    assert len({fingerprint_of("a", 1), fingerprint_of("a1"), fingerprint_of("a", "1"), fingerprint_of(["a", 1])}) == 4
