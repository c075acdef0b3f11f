from __future__ import annotations

import errno
import io
import json
import os
import pickle
import weakref
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cook.base import tensor_files
from cook.base.errors import UserError
from cook.base.files import naming
from cook.base.tensor_files import (
    LazyTensors,
    ShardWriter,
    in_parts,
    load_pt,
    open_pt,
    open_safetensors_folder,
    put_away,
    read_model_config,
)


def write(folder, sizes, shard_bytes):
    tensors = {f"w{i}": torch.randn(size) for i, size in enumerate(sizes)}
    with ShardWriter(folder, shard_bytes) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
    return tensors


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(4, 200))
def test_shards_hold_everything_once_and_stay_within_their_size(tmp_path_factory, sizes, shard_bytes):
    folder = tmp_path_factory.mktemp("shards")
    tensors = write(folder, sizes, shard_bytes)
    files = sorted(folder.glob("*.safetensors"))
    contents = {file.name: load_file(file) for file in files}
    merged = {name: tensor for content in contents.values() for name, tensor in content.items()}
    assert sum(map(len, contents.values())) == len(tensors) == len(merged)
    assert all(torch.equal(merged[name], tensor) for name, tensor in tensors.items())
    for content in contents.values():
        assert len(content) == 1 or sum(t.nbytes for t in content.values()) <= shard_bytes
    if len(files) == 1:
        assert {p.name for p in folder.iterdir()} == {"model.safetensors"}
    else:
        count = len(files)
        assert [f.name for f in files] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == 4 * sum(sizes)
        assert index["weight_map"] == {name: file for file, content in contents.items() for name in content}
        assert len(list(folder.iterdir())) == count + 1
    back = open_safetensors_folder(folder)
    assert set(back) == set(tensors) and len(back) == len(tensors)
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


TYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(TYPES), st.integers(0, 9)), min_size=1, max_size=12), st.integers(1, 300))
def test_a_shard_that_is_begun_early_is_a_plain_safetensors_file(tmp_path_factory, given, buffered):
    """safetensors' own reader is the oracle; offsets are multiples of the types' sizes, as readers of a map need."""
    folder = tmp_path_factory.mktemp("shards")
    tensors = {f"w{i}": torch.randn(size, 3).mul(9).to(kind) for i, (kind, size) in enumerate(given)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_files, "BUFFERED", buffered)
        patch.setattr(tensor_files, "HEADER", 600)  # a header for few tensors: others need another shard
        with ShardWriter(folder, 200) as writer:
            for name, tensor in tensors.items():
                writer.add(name, tensor)
    found = {}
    for file in folder.glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little")
        entries = json.loads(file.read_bytes()[8 : 8 + length])
        assert length % 8 == 0 and entries.pop("__metadata__") == {"format": "pt"}
        for name, entry in entries.items():
            assert entry["data_offsets"][0] % tensors[name].element_size() == 0
        found |= load_file(file)
    assert found.keys() == tensors.keys() == dict(open_safetensors_folder(folder)).keys()
    assert all(torch.equal(found[name], t) and found[name].dtype == t.dtype for name, t in tensors.items())


@pytest.mark.parametrize("beside, most", [(0, 2), (200, 5)])
def test_a_writer_keeps_few_bytes_in_memory(tmp_path, monkeypatch, beside, most):
    # Two tensors of 40 bytes wait for a third; up to `beside` bytes are written while the next ones are added.
    monkeypatch.setattr(tensor_files, "BUFFERED", 100)
    monkeypatch.setattr(tensor_files, "BESIDE", beside)
    alive = []
    with ShardWriter(tmp_path) as writer:
        for i in range(9):
            tensor = torch.full((10,), float(i))
            alive.append(weakref.ref(tensor))
            writer.add(f"w{i}", tensor)
            del tensor
            assert sum(ref() is not None for ref in alive) <= most
    assert len(load_file(tmp_path / "model.safetensors")) == 9


def test_elements_are_changed_in_parts_without_another_result():
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted = (tensor.double() * 1.7).bfloat16()
    sizes = []

    def change(part):
        sizes.append(part.numel())
        return part.double() * 1.7

    assert torch.equal(in_parts(change, tensor, numel=10), wanted) and max(sizes) == 10
    assert torch.equal(in_parts(change, tensor.t(), numel=1), wanted.t())
    assert torch.equal(in_parts(change, tensor[0, 0]), wanted[0, 0]) and in_parts(change, tensor[:0]).shape == (0, 5)


def test_a_mapped_tensor_that_is_put_away_leaves_memory_and_keeps_its_numbers(tmp_path):
    def in_memory():
        return int(next(x for x in Path("/proc/self/status").read_text().splitlines() if "RssFile" in x).split()[1])

    torch.save({"w": torch.arange(float(4 << 20))}, tmp_path / "w.pt")
    mapped = load_pt(tmp_path / "w.pt", mmap=True)["w"]
    total, before = mapped.sum(), in_memory()
    put_away(mapped)
    assert before - in_memory() > 12 << 10  # KiB, of 16 MiB
    assert mapped.sum() == total
    plain = torch.ones(1 << 20)
    put_away(plain)
    assert plain.sum() == 1 << 20


def test_a_folder_is_written_over_without_remains(tmp_path):
    write(tmp_path, [10, 10, 10], 40)
    new = write(tmp_path, [3], 1000)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(open_safetensors_folder(tmp_path)["w0"], new["w0"])
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_failure_leaves_no_shards_and_the_old_model(tmp_path):
    old = write(tmp_path, [4], 1000)
    with pytest.raises(ZeroDivisionError), ShardWriter(tmp_path, 8) as writer:
        for i in range(4):
            writer.add(f"v{i}", torch.ones(4))
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(open_safetensors_folder(tmp_path)["w0"], old["w0"])


def test_an_error_of_the_writing_thread_is_raised_and_leaves_no_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(tensor_files, "BUFFERED", 8)
    old, first = write(tmp_path, [4], 1000), iter([True])

    def full(file, path, tensors):
        if next(first, False):
            return written(file, path, tensors)
        with naming(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    written = tensor_files._write_tensors
    monkeypatch.setattr(tensor_files, "_write_tensors", full)
    with pytest.raises(OSError, match="No space left on device: .*shard-00000"), ShardWriter(tmp_path) as writer:
        for i in range(3):
            writer.add(f"v{i}", torch.ones(4))
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(open_safetensors_folder(tmp_path)["w0"], old["w0"])


def test_views_and_transposes_are_written_as_they_look(tmp_path):
    base = torch.randn(6, 4)
    with ShardWriter(tmp_path) as writer:
        writer.add("t", base.t())
        writer.add("half", base[:3])
        writer.add("bf16", base.bfloat16())
    back = load_file(tmp_path / "model.safetensors")
    assert torch.equal(back["t"], base.t()) and torch.equal(back["half"], base[:3])
    assert back["bf16"].dtype == torch.bfloat16


def test_lazy_tensors_read_only_what_is_asked_for():
    read = []
    tensors = LazyTensors({name: lambda name=name: read.append(name) or torch.ones(1) for name in "ab"})
    assert "a" in tensors and "c" not in tensors and list(tensors) == ["a", "b"] and len(tensors) == 2
    assert read == []
    assert tensors["b"].item() == 1 and read == ["b"]


@pytest.mark.parametrize(
    ("index", "word"),
    [
        ([], "weight_map"),
        ({"weight_map": {}}, "weight_map"),
        ({"weight_map": {"w": "../w.safetensors"}}, "outside its folder"),
        ({"weight_map": {"w": 3}}, "outside its folder"),
        ({"weight_map": {"w": "absent.safetensors"}}, "no such file"),
        ({"weight_map": {"w": "a.safetensors", "v": "a.safetensors"}}, "'v'"),
    ],
)
def test_bad_indexes_are_refused(tmp_path, index, word):
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (folder / "a.safetensors", tmp_path / "w.safetensors"):
        save_file({"w": torch.ones(1)}, place)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=word):
        open_safetensors_folder(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "a.safetensors"])
def test_a_pipe_in_place_of_weights_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match=f"{name}: cannot be read: not a regular file"):
        open_safetensors_folder(tmp_path)


@pytest.mark.parametrize("cut", [0, 7, 8, 40, -1])
def test_truncated_safetensors_are_refused(tmp_path, cut):
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, file)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(UserError, match="not a safetensors file"):
        open_safetensors_folder(tmp_path)


def torch_bytes(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def repacked(content: bytes, **changes) -> bytes:
    """The same archive, its members written again with other settings."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", **changes) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))
    return out.getvalue()


def with_member(content: bytes, name: str) -> bytes:
    out = io.BytesIO(content)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(name, b"x")
    return out.getvalue()


def overlapping(content: bytes) -> bytes:
    """A directory of many entries that all point to the same large member."""
    out = io.BytesIO(content)
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr("archive/data/9", b"\0" * 50_000)
        member = archive.infolist()[-1]
        for number in range(100):
            copy = zipfile.ZipInfo(f"archive/data/{number + 10}")
            copy.file_size = copy.compress_size = member.file_size
            copy.CRC, copy.header_offset = member.CRC, member.header_offset
            archive.filelist.append(copy)
    return out.getvalue()


GOOD = torch_bytes({"a": torch.arange(3.0)})


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not a readable"),
        (b"garbage", "not a readable"),
        (GOOD[: len(GOOD) // 2], "not a readable"),
        (GOOD[:-1], "not a readable"),
        (pickle.dumps({"a": 1}), "not a readable"),
        (torch_bytes([torch.ones(1)]), "wanted: a dictionary"),
        (repacked(GOOD, compression=zipfile.ZIP_DEFLATED), "torch.save would not have written"),
        (with_member(GOOD, "../../evil"), "evil"),
        (overlapping(GOOD), "claim more bytes"),
    ],
)
def test_bad_pt_files_are_refused(tmp_path, content, word, mmap):
    path = tmp_path / "bad.pt"
    path.write_bytes(content)
    with pytest.raises(UserError, match="bad.pt") as caught:
        load_pt(path, mmap=mmap)
    assert word in str(caught.value)


def test_nothing_in_a_pt_file_is_executed(tmp_path):
    path, canary = tmp_path / "evil.pt", tmp_path / "canary"
    torch.save({"a": torch.ones(1), "b": Canary(canary)}, path)
    with pytest.raises(UserError, match="evil.pt"):
        load_pt(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)["b"].close()
    assert canary.exists(), "the canary must be able to sing"


def test_old_torch_files_are_refused_plainly(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"a": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before PyTorch 1.6[\s\S]*remedy"):
        load_pt(path)


def test_open_pt_wants_tensors_only(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"a": torch.ones(2), "step": 3}, path)
    with pytest.raises(UserError, match="'step' is not a tensor"):
        open_pt(path)
    torch.save({"a": torch.ones(2)}, path)
    assert torch.equal(open_pt(path)["a"], torch.ones(2))
    with pytest.raises(UserError, match="no such file"):
        open_pt(tmp_path / "absent.pt")


def test_config_json_must_be_an_object(tmp_path):
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match="not a JSON object"):
        read_model_config(tmp_path)


def test_the_folder_is_flushed(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(tensor_files, "fsync_folder", flushed.append)
    write(tmp_path, [1], 10)
    assert flushed == [tmp_path]
