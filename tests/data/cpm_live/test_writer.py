"""Data files, byte for byte those of an independent writer."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.data.cpm_live.meta import read_meta, write_meta
from cook.data.cpm_live.writer import LiveWriter
from tests.data.cpm_live import reference


def write(folder, files, version, block_size):
    infos = []
    folder.mkdir()
    for name, records in files.items():
        with LiveWriter(folder / name, version=version, block_size=block_size) as writer:
            for record in records:
                writer.write(record)
        infos.append(writer.info())
    write_meta(folder, version, infos)


@pytest.mark.parametrize("version", [1, 2])
@given(seed=st.integers(0, 2**32), count=st.integers(0, 40), block_size=st.integers(800, 3000))
@settings(max_examples=25)
def test_folders_are_byte_for_byte_those_of_the_description(tmp_path_factory, version, seed, count, block_size):
    folder, rng = tmp_path_factory.mktemp("live"), np.random.default_rng(seed)
    files = {"first": reference.random_records(rng, count), "second": reference.random_records(rng, 3)}
    write(folder / "ours", files, version, block_size)
    reference.write_folder(folder / "theirs", files, version=version, block_size=block_size)
    for name in ("first", "second", "meta.bin"):
        assert (folder / "ours" / name).read_bytes() == (folder / "theirs" / name).read_bytes()
    expected = [record.tolist() for records in files.values() for record in records]
    assert reference.read_folder(folder / "ours", block_size) == expected
    meta = read_meta(folder / "ours")
    assert [file.nlines for file in meta.files] == [count, 3] and meta.version == version


@pytest.mark.parametrize("version", [1, 2])
def test_a_record_that_just_fits_and_one_that_never_does(tmp_path, version):
    record = np.arange(40)
    size = len(reference.dumps_array(record)) + (4 if version == 2 else 0)
    with LiveWriter(tmp_path / "a", version=version, block_size=size + 2) as writer:
        writer.write(record)
        writer.write(record)
    assert writer.num_blocks == 2 and (tmp_path / "a").stat().st_size == 2 * (size + 2)
    with pytest.raises(UserError, match="record 0 is larger than a block"):
        with LiveWriter(tmp_path / "b", version=version, block_size=size + 1) as writer:
            writer.write(record)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"], "a failed file leaves nothing"
