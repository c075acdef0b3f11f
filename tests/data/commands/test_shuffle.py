"""A random order that depends on the seed alone."""

from __future__ import annotations

import numpy as np
import pytest

from cook.base.errors import UserError
from tests.data.commands.conftest import BLOCK
from tests.data.cpm_live import reference


def test_the_same_records_in_an_order_of_the_seed(live, run, tmp_path):
    folder, records = live
    for name, options in {"a": [], "b": ["--memory", "20K"], "c": ["--seed", 1]}.items():
        run("shuffle", folder, "--output", tmp_path / name, *options)
    a, b, c = (reference.read_folder(tmp_path / name, BLOCK) for name in "abc")
    assert a == b and a != c and a != records, "the memory does not change the order, the seed does"
    assert sorted(a) == sorted(c) == sorted(records)
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["data-00000", "meta.bin"]
    place = {tuple(record): index for index, record in enumerate(records)}
    order = np.array([place[tuple(record)] for record in a])
    # Of 400 records in random order neighbours stay together once on average.
    assert (np.abs(np.diff(order)) == 1).sum() < 10 and abs(np.corrcoef(order, np.arange(400))[0, 1]) < 0.2


def test_version_2_stays_version_2(live, run, tmp_path):
    folder, records = live
    run("convert", folder, "--output", tmp_path / "two", "--version", 2, "--block-size", BLOCK)
    run("shuffle", tmp_path / "two", "--output", tmp_path / "shuffled")
    assert (tmp_path / "shuffled" / "meta.bin").read_bytes()[:1] == b"{"
    assert sorted(reference.read_folder(tmp_path / "shuffled", BLOCK)) == sorted(records)


def test_too_little_memory_and_damage(live, run, tmp_path):
    folder, _ = live
    with pytest.raises(UserError, match="--memory is too small"):
        run("shuffle", folder, "--output", tmp_path / "a", "--memory", "16")
    content = bytearray((folder / "b").read_bytes())
    content[0] = 9
    (folder / "b").write_bytes(content)
    with pytest.raises(UserError, match="block 0, offset 0"):
        run("shuffle", folder, "--output", tmp_path / "a")
    assert not list((tmp_path / "a").iterdir()), "nothing is left behind"
