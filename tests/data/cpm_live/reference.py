"""CPM-Live's binary format written and read a second time, from its description, with Python's own pickle.

Nothing here comes from cook. The pickles are made by pickle itself: of a class that stands where CPM-Live's stood, and
of arrays, in which numpy's new module name is put back to the old one.
"""

from __future__ import annotations

import json
import pickle
import struct
import sys
import types
from pathlib import Path

import numpy as np


class FileInfo:
    def __init__(self, *state):
        self.state = state

    @classmethod
    def _load_from_state(cls, version, state):
        assert version == 1
        return cls(*state)

    def __reduce__(self):
        return FileInfo._load_from_state, (1, self.state)


def _stand_in(module: str) -> None:
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    sys.modules[module].FileInfo = FileInfo


def dumps_files(states: list[tuple], module: str = "cpm_live.dataset.distributed_dataset") -> bytes:
    _stand_in(module)
    FileInfo.__module__ = module
    return pickle.dumps([FileInfo(*state) for state in states], protocol=4)


def loads_files(content: bytes) -> list[tuple]:
    _stand_in("cpm_live.dataset.distributed_dataset")
    return [info.state for info in pickle.loads(content)]


def dumps_array(values: np.ndarray) -> bytes:
    """What `pickle.dumps` gave at protocol 4 with numpy 1: today's pickle with the shorter module name."""
    new = pickle.dumps(np.asarray(values, np.int64), protocol=4)
    length = struct.unpack("<Q", new[3:11])[0]
    old = new[11:].replace(b"\x8c\x16numpy._core.multiarray", b"\x8c\x15numpy.core.multiarray", 1)
    return new[:3] + struct.pack("<Q", length - 1) + old


def write_file(path: Path, records: list[np.ndarray], *, version: int, block_size: int, dumps=dumps_array) -> tuple:
    """Writes a data file; returns its (blocks, nbytes, nlines)."""
    content, offset, nbytes, blocks = b"", 0, 0, 1
    for record in records:
        payload = dumps(record)
        if version == 2:
            payload = struct.pack("I", len(payload)) + payload
        if offset + 2 + len(payload) > block_size:
            content += b"\x00" * (block_size - offset)
            offset, blocks = 0, blocks + 1
        assert offset + 2 + len(payload) <= block_size, "larger than a block"
        content += b"\x1f" + payload
        offset += 1 + len(payload)
        nbytes += len(payload)
    path.write_bytes(content + b"\x00" * (block_size - offset))
    return blocks, nbytes, len(records)


def write_folder(folder: Path, files: dict[str, list[np.ndarray]], *, version: int, block_size: int, **options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    states, begin = [], 0
    for name, records in files.items():
        blocks, nbytes, nlines = write_file(folder / name, records, version=version, block_size=block_size, **options)
        states.append((name, begin, begin + blocks, nbytes, nlines, False))
        begin += blocks
    if version == 1:
        (folder / "meta.bin").write_bytes(dumps_files(states))
    else:
        keys = ("file_name", "block_begin", "block_end", "nbytes", "nlines", "mask")
        lines = [json.dumps({**dict(zip(keys, state, strict=True)), "block_size": block_size}) for state in states]
        (folder / "meta.bin").write_text("".join(line + "\n" for line in lines))


def read_folder(folder: Path, block_size: int) -> list[list[int]]:
    """All records, by pickle, file after file and block after block."""
    meta = (folder / "meta.bin").read_bytes()
    version = 1 if meta[:1] == b"\x80" else 2
    if version == 1:
        names = [(state[0], state[2] - state[1]) for state in loads_files(meta)]
    else:
        infos = [json.loads(line) for line in meta.splitlines()]
        names = [(info["file_name"], info["block_end"] - info["block_begin"]) for info in infos]
    records = []
    for name, blocks in names:
        with open(folder / name, "rb") as file:
            for block in range(blocks):
                file.seek(block * block_size)
                while (magic := file.read(1)) == b"\x1f":
                    if version == 2:
                        file.read(4)
                    records.append(pickle.load(file).tolist())
                assert magic == b"\x00"
    return records


def random_records(rng: np.random.Generator, count: int, longest: int = 60, vocab: int = 500) -> list[np.ndarray]:
    """Records of one or two segments, as CPM-Ant's preprocessing makes them."""
    records = []
    for _ in range(count):
        length, task = int(rng.integers(2, longest)), int(rng.integers(3))
        tokens = rng.integers(10, vocab, length)
        if task < 2:
            head = [task + 1, 1, length, task + 1, task]
        else:
            head = [3, 2, length // 2, 1, 0, length - length // 2, 2, 1]
        records.append(np.concatenate([head, tokens]).astype(np.int64))
    return records
