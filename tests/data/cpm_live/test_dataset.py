"""Records by number: all of them, from mapped files; damage is named with file, block and offset."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from cook.base.errors import UserError
from cook.data.cpm_live import dataset as live
from cook.data.cpm_live.dataset import open_live
from tests.data.cpm_live import reference

BLOCK = 3000
ROOT = Path(__file__).resolve().parents[3]


def records_of(count=120, seed=0):
    return reference.random_records(np.random.default_rng(seed), count)


def folder_with(tmp_path, records, version=1, **options):
    half = len(records) // 2
    files = {"one": records[:half], "two": records[half:]}
    reference.write_folder(tmp_path / "live", files, version=version, block_size=BLOCK, **options)
    return tmp_path / "live"


def opened(tmp_path, folder, **options):
    return open_live([folder], tmp_path / "cache", **options)


@pytest.mark.parametrize("version", [1, 2])
def test_every_record_by_number(tmp_path, version):
    records = records_of()
    data = opened(tmp_path, folder_with(tmp_path, records, version))
    assert len(data) == len(records)
    for number in np.random.default_rng(1).permutation(len(records)).tolist():
        assert np.array_equal(data.record(number).numbers(), records[number])
    again = pickle.loads(pickle.dumps(data))
    assert [t.tolist() for t in again.tokens(np.array([7, 99]))] == [data.record(n).tokens.tolist() for n in (7, 99)]
    largest = max(int(record[2 + 3 * record[1] :].max()) for record in records)
    assert data.largest_token == largest and largest in data.record(data.largest_token_record).tokens


@pytest.mark.parametrize("protocol", [3, 5])
def test_records_of_other_pickle_protocols(tmp_path, protocol):
    records = records_of(20)
    folder = folder_with(tmp_path, records, dumps=lambda record: pickle.dumps(record, protocol=protocol))
    data = opened(tmp_path, folder)
    assert all(np.array_equal(data.record(n).numbers(), record) for n, record in enumerate(records))


def test_several_processes_give_the_same_index(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, records_of())
    alone = open_live([folder], tmp_path / "alone", workers=1)
    monkeypatch.setattr(live, "CHUNK_BYTES", 4 * BLOCK)
    several = open_live([folder], tmp_path / "several", workers=2)
    assert alone.fingerprint == several.fingerprint
    for name, column in alone.column.items():
        assert np.array_equal(column, several.column[name]), name
    assert np.array_equal(alone.segment_begin, several.segment_begin)
    assert alone.largest_token_record == several.largest_token_record


def test_several_folders_are_one_list(tmp_path):
    first, second = records_of(10, 1), records_of(10, 2)
    reference.write_folder(tmp_path / "a", {"x": first}, version=1, block_size=BLOCK)
    reference.write_folder(tmp_path / "b", {"x": second}, version=2, block_size=BLOCK)
    data = open_live([tmp_path / "a", tmp_path / "b"], tmp_path / "cache")
    assert [data.record(n).tokens.tolist() for n in range(20)] == [r[2 + 3 * r[1] :].tolist() for r in first + second]


def test_the_index_is_kept_and_its_hash_is_of_the_content(tmp_path, monkeypatch):
    folder = folder_with(tmp_path, records_of())
    data = opened(tmp_path, folder)
    with monkeypatch.context() as patch:
        patch.setattr(live, "scan_blocks", lambda *_: pytest.fail("scanned again"))
        assert opened(tmp_path, folder).fingerprint == data.fingerprint
    os.utime(folder / "one")
    touched = opened(tmp_path, folder)
    assert touched.fingerprint == data.fingerprint, "another time, the same content"
    content = bytearray((folder / "one").read_bytes())
    at = content.find(struct.pack("<q", int(touched.record(0).tokens[1])))
    content[at] ^= 1
    (folder / "one").write_bytes(content)
    assert opened(tmp_path, folder).fingerprint != data.fingerprint


def place_of(error):
    return str(error.value).splitlines()[0]


@pytest.mark.parametrize("version", [1, 2])
def test_a_corrupt_magic(tmp_path, version):
    folder = folder_with(tmp_path, records_of(), version)
    content = bytearray((folder / "two").read_bytes())
    content[2 * BLOCK] = 0x42
    (folder / "two").write_bytes(content)
    with pytest.raises(UserError) as caught:
        opened(tmp_path, folder)
    assert place_of(caught).startswith(f"{folder / 'two'}, block 2, offset {2 * BLOCK}: the byte 0x42")
    assert not list((tmp_path / "cache").glob("index-*"))


@pytest.mark.parametrize("version", [1, 2])
def test_a_block_without_an_end(tmp_path, version):
    record = np.array([1, 1, 300, 1, 0, *range(300)])
    size = len(reference.dumps_array(record)) + 1 + (4 if version == 2 else 0)
    reference.write_folder(tmp_path / "live", {"x": [record]}, version=version, block_size=size + 1)
    content = (tmp_path / "live" / "x").read_bytes()
    (tmp_path / "live" / "x").write_bytes(content[:-1])
    if version == 2:
        meta = (tmp_path / "live" / "meta.bin").read_text()
        (tmp_path / "live" / "meta.bin").write_text(meta.replace(str(size + 1), str(size)))
    with pytest.raises(UserError, match="block 0, offset .*(has no end|longer than the rest)"):
        opened(tmp_path, tmp_path / "live")


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        ([1, 1, 9, 1, 0, 5, 5], "have 9 tokens, the record 2"),
        ([1, 1, 2, 1, 55, 5, 5], "task is 55"),
        ([1, 1, 2, 1, 0, 5, -5], "the token -5"),
        ([1, 1, 2, 1, 0, 5, 2**40], "the token 1099511627776"),
        ([1, 1], "not a record"),
    ],
)
def test_a_bad_record(tmp_path, bad, word):
    records = records_of()
    records[80] = np.array(bad)
    folder = folder_with(tmp_path, records)
    with pytest.raises(UserError) as caught:
        opened(tmp_path, folder)
    assert word in place_of(caught) and f"{folder / 'two'}, block " in place_of(caught)


@pytest.mark.parametrize("version", [1, 2])
def test_every_flipped_byte_is_an_error_or_another_content(tmp_path, version):
    folder = folder_with(tmp_path, records_of(12), version)
    whole = opened(tmp_path, folder).fingerprint
    original = (folder / "two").read_bytes()
    rng = np.random.default_rng(3)
    outcomes = set()
    for at in rng.choice(len(original), 60, replace=False).tolist():
        content = bytearray(original)
        content[at] ^= 1 << int(rng.integers(8))
        (folder / "two").write_bytes(content)
        try:
            assert opened(tmp_path, folder).fingerprint != whole
            outcomes.add("content")
        except UserError as error:
            assert "offset" in str(error)
            outcomes.add("error")
    assert outcomes == {"content", "error"}


@pytest.mark.parametrize("byte", [1, 3, 5])
def test_a_record_that_only_begins_like_known_ones(tmp_path, byte):
    """Records of one length are recognised by their first bytes; the last ones must be right as well."""
    record = np.array([1, 1, 50, 1, 0, *range(50)])
    reference.write_folder(tmp_path / "live", {"x": [record] * 4}, version=1, block_size=BLOCK)
    content = bytearray((tmp_path / "live" / "x").read_bytes())
    size = 1 + len(reference.dumps_array(record))
    content[3 * size - byte] ^= 0x40
    (tmp_path / "live" / "x").write_bytes(content)
    with pytest.raises(UserError, match="x, block 0, offset"):
        opened(tmp_path, tmp_path / "live")


@pytest.mark.parametrize("size", [0, 1, 2999, 3000, 5000])
def test_truncated_files(tmp_path, size):
    folder = folder_with(tmp_path, records_of(), 2)
    content = (folder / "two").read_bytes()
    (folder / "two").write_bytes(content[:size])
    with pytest.raises(UserError, match=f"two: truncated or changed: block .* offset {size}"):
        opened(tmp_path, folder)


def test_other_counts_than_meta_says(tmp_path):
    folder = folder_with(tmp_path, records_of())
    states = reference.loads_files((folder / "meta.bin").read_bytes())
    states[1] = (*states[1][:4], states[1][4] + 1, False)
    (folder / "meta.bin").write_bytes(reference.dumps_files(states))
    with pytest.raises(UserError, match="two: not the file that meta.bin describes, blocks"):
        opened(tmp_path, folder)


def test_a_file_that_changes_in_use(tmp_path):
    folder = folder_with(tmp_path, records_of())
    data = opened(tmp_path, folder)
    first, (whole, block) = data.record(100).tokens.tolist(), ((folder / "two").read_bytes(), 3)
    (folder / "two").write_bytes(whole)
    os.utime(folder / "two", ns=(0, 12345))
    assert data.record(100).tokens.tolist() == first, "only touched"
    for change in (whole[: block * BLOCK + 5], whole[: block * BLOCK] + b"x" + whole[block * BLOCK + 1 :]):
        (folder / "two").write_bytes(change)
        with pytest.raises(UserError, match=f"two, block {block}, offset {block * BLOCK}: changed since"):
            data.record(100)
    (folder / "two").write_bytes(whole + bytes(BLOCK))
    with pytest.raises(UserError, match=f"two, block {len(whole) // BLOCK}, offset {len(whole)}: changed since"):
        data.record(100)
    (folder / "two").unlink()
    with pytest.raises(UserError, match="two, block 0, offset 0: the file no longer exists"):
        data.record(100)
    data.record(0)


CANARY = """
import pickle, resource, struct, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from cook.base.errors import UserError
from cook.data.cpm_live.dataset import open_live
from cook.data.cpm_live.meta import read_meta
from cook.data.cpm_live.writer import LiveWriter
from cook.data.cpm_live.meta import write_meta
import numpy as np

root = Path(sys.argv[1])
canary = root / "canary"

class Evil:
    def __init__(self, call): self.call = call
    def __reduce__(self): return self.call

import os, subprocess, builtins
calls = [(os.system, (f"touch {canary}",)), (exec, (f"open({str(canary)!r}, 'w')",)),
         (subprocess.check_call, (["touch", str(canary)],)), (getattr, ("", "join"))]
bombs = [b"\\x80\\x04Nr" + struct.pack("<I", 2**32 - 1) + b".",             # room for 2**32 memo entries
         b"\\x80\\x04B" + struct.pack("<I", 2**32 - 1),                     # bytes that are not there
         b"\\x80\\x04\\x8e" + struct.pack("<Q", 2**62) + b".",
         b"\\x80\\x04]\\x94" + b"(h\\x00h\\x00e" * 300 + b".",              # a list within itself
         b"\\x80\\x04" + b"(" * 4000, b"\\x80\\x04" + b"]" * 4000 + b"a" * 3999 + b"."]
payloads = [pickle.dumps(Evil(call), protocol=p) for call in calls for p in (0, 1, 2, 3, 4, 5)]
payloads += [pickle.dumps([Evil(call)], protocol=4) for call in calls] + bombs
refused = 0
for number, payload in enumerate(payloads):
    folder = root / str(number)
    folder.mkdir()
    with LiveWriter(folder / "x", version=1, block_size=8192) as writer:
        writer.write(np.array([1, 1, 1, 1, 0, 5]))
    write_meta(folder, 1, [writer.info()])
    good = (folder / "meta.bin").read_bytes()
    (folder / "meta.bin").write_bytes(payload)
    try:
        read_meta(folder)
    except UserError:
        refused += 1
    (folder / "meta.bin").write_bytes(good)
    (folder / "x").write_bytes((b"\\x1f" + payload).ljust(8192, b"\\0"))
    try:
        open_live([folder], root / "cache", workers=1)
    except UserError as error:
        assert "block 0, offset" in str(error), error
        refused += 1
print(refused, 2 * len(payloads), canary.exists())
"""


def test_malicious_pickles_run_nothing_and_need_no_memory(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CANARY), str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    refused, all_of_them, canary = done.stdout.split()
    assert refused == all_of_them and canary == "False"
    assert not (tmp_path / "canary").exists()
