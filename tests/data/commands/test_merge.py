"""Several folders to one."""

from __future__ import annotations

import numpy as np
import pytest

from cook.base.errors import UserError
from tests.data.commands.conftest import BLOCK
from tests.data.cpm_live import reference


@pytest.mark.parametrize("version", [1, 2])
def test_folders_of_one_format_are_copied(live, run, tmp_path, version):
    folder, records = live
    more = reference.random_records(np.random.default_rng(1), 30)
    reference.write_folder(tmp_path / "more", {"a": more}, version=version, block_size=BLOCK)
    if version == 2:
        run("convert", folder, "--output", tmp_path / "two", "--version", 2, "--block-size", BLOCK)
        folder = tmp_path / "two"
    assert "copied" in run("merge", folder, tmp_path / "more", tmp_path / "more", "--output", tmp_path / "all")
    again = [record.tolist() for record in more]
    assert reference.read_folder(tmp_path / "all", BLOCK) == records + again + again
    assert "records             460" in run("inspect", tmp_path / "all")
    assert len(list((tmp_path / "all").iterdir())) == (5 if version == 1 else 4)


def test_other_formats_are_written_anew(live, run, tmp_path):
    folder, records = live
    more = reference.random_records(np.random.default_rng(1), 30)
    reference.write_folder(tmp_path / "more", {"a": more}, version=2, block_size=4096)
    assert "written anew in version 1" in run("merge", folder, tmp_path / "more", "--output", tmp_path / "all")
    assert reference.read_folder(tmp_path / "all", BLOCK) == records + [record.tolist() for record in more]
    run("merge", folder, "--output", tmp_path / "two", "--version", 2)
    assert (tmp_path / "two" / "meta.bin").read_bytes()[:1] == b"{"
    with pytest.raises(UserError, match="is not empty"):
        run("merge", folder, "--output", tmp_path / "two")
