"""TensorFlow checkpoints: what an independent writer wrote comes back, and damage is told, never taken for weights."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.families.tf_checkpoint import masked_checksum, open_tf_checkpoint
from tests.models import tf_writer
from tests.models.tf_writer import block, nested, table, varint, whole, write_checkpoint


def tensors() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    made = {f"bert/encoder/layer_{i}/dense/kernel": random.normal(size=(3, i + 1)).astype(np.float32) for i in range(9)}
    kinds = {"float16": (2, 2), "float64": (5,), "int32": (1, 4), "int64": ()}
    for kind, shape in kinds.items():
        made[f"kinds/{kind}"] = (10 * random.normal(size=shape)).astype(kind) if shape else np.array(7)
    made["empty"] = np.zeros((0, 3), np.float32)
    made["large"] = random.normal(size=(50, 40)).astype(np.float32)
    return made


@pytest.mark.parametrize("shards", [1, 3])
def test_everything_comes_back(tmp_path, shards):
    wanted = tensors()
    write_checkpoint(tmp_path / "a.ckpt", wanted, shards=shards)
    found = open_tf_checkpoint(tmp_path / "a.ckpt")
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert torch.equal(found[name].read(), torch.from_numpy(array))


def test_bfloat16(tmp_path):
    values = torch.tensor([1.5, -2.0, 3e38]).bfloat16()
    write_checkpoint(tmp_path / "a.ckpt", {"x": values.view(torch.int16).numpy().view(np.uint16)})
    assert torch.equal(open_tf_checkpoint(tmp_path / "a.ckpt")["x"].read(), values)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compression": 1}, "compressed"),
        ({"extra": {"x": whole(3, 4)}}, "shard 4 of 1"),
        ({"extra": {"x": nested(2, whole(2, 7))}}, "no message"),
        ({"extra": {"x": nested(2, nested(2, whole(1, 1)) * 17)}}, "no tensor has"),
        ({"extra": {"x": nested(2, nested(2, whole(1, 2**64 - 1)))}}, "no tensor has"),
        ({"header": whole(1, 0)}, "without shards"),
        ({"header": whole(1, 1) + whole(2, 1)}, "big-endian"),
        ({"header": b"\x0b"}, "wire type"),
        ({"header": nested(1, b"xy")[:-1]}, "beyond its message"),
    ],
)
def test_an_index_that_is_refused(tmp_path, options, reason):
    write_checkpoint(tmp_path / "a.ckpt", {"x": np.ones(3, np.float32)}, **options)
    with pytest.raises(UserError, match=reason):
        open_tf_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (whole(1, 7), "type number 7"),
        (nested(7, b""), "partitioned"),
        (whole(5, 11), "11 bytes do not match"),
        (whole(4, 5), "ends before x"),
    ],
)
def test_a_tensor_that_is_refused(tmp_path, extra, reason):
    write_checkpoint(tmp_path / "a.ckpt", {"x": np.ones(3, np.float32)}, extra={"x": extra})
    found = open_tf_checkpoint(tmp_path / "a.ckpt")  # nobody has asked for the tensor yet
    with pytest.raises(UserError, match=reason):
        found["x"].read()


def test_missing_files(tmp_path):
    write_checkpoint(tmp_path / "a.ckpt", {"x": np.ones(3, np.float32)})
    with pytest.raises(UserError, match="no such file"):
        open_tf_checkpoint(tmp_path / "b.ckpt")
    (tmp_path / "a.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(UserError, match="data-00000-of-00001"):
        open_tf_checkpoint(tmp_path / "a.ckpt")


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_checkpoint(folder / "a.ckpt", {f"name/{i}": np.full((2, 3), i, np.float32) for i in range(6)})
    return folder


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_wrong_byte_is_never_taken_for_weights(sound, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    files = {path.name: path.read_bytes() for path in sound.iterdir()}
    name = data.draw(st.sampled_from(sorted(files)))
    at = data.draw(st.integers(0, len(files[name]) - 1))
    cut = data.draw(st.booleans())
    files[name] = files[name][:at] + (b"" if cut else bytes([files[name][at] ^ 0x40]) + files[name][at + 1 :])
    for file, content in files.items():
        (folder / file).write_bytes(content)
    try:
        found = {key: tensor.read() for key, tensor in open_tf_checkpoint(folder / "a.ckpt").items()}
    except UserError:
        return
    # Bytes that the format does not use (padding of the footer, the handle of its metadata) change nothing.
    assert {key: set(tensor.flatten().tolist()) for key, tensor in found.items()} == {
        f"name/{i}": {float(i)} for i in range(6)
    }


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),  # the check value of the CRC catalogues
        (bytes(32), 0x8A9136AA),  # RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
    ],
)
def test_the_checksum_has_its_published_values(data, value):
    assert masked_checksum(data) == ((value >> 15 | value << 17) + 0xA282EAD8) % 2**32


WORD = "bert/embeddings/word_embeddings"
HOSTILE = """
    import resource, sys, time
    from pathlib import Path
    import torch  # its own memory comes before the limit
    from cook.base.errors import UserError
    from cook.families.google_bert import open_google_weights
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)
    shapes = {"bert.embeddings.word_embeddings.weight": torch.Size([2, 3])}
    for folder in sys.argv[1:]:
        begun = time.monotonic()
        try:
            list(open_google_weights(Path(folder), shapes).values())
        except UserError as error:
            print(Path(folder).name, "refused:", str(error).replace(chr(10), " ")[:300])
        else:
            print(Path(folder).name, "read")
        assert time.monotonic() - begun < 15, folder
"""


def raw_table(blocks: list[bytes], index: list[tuple[int, int]]) -> bytes:
    """A table whose index names whichever of its blocks, given by number and how often."""
    out, handles = b"", []
    for content in blocks:
        handles.append(varint(len(out)) + varint(len(content)))
        out += content + b"\0" + tf_writer.masked(content + b"\0").to_bytes(4, "little")
    entries = [
        (f"{n:06d}".encode(), handles[number])
        for n, number in enumerate(number for number, times in index for _ in range(times))
    ]
    content = block(entries, every=10**9)
    footer = varint(0) * 2 + varint(len(out)) + varint(len(content))
    out += content + b"\0" + tf_writer.masked(content + b"\0").to_bytes(4, "little")
    return out + footer.ljust(40, b"\0") + (0xDB4775248B80FB57).to_bytes(8, "little")


def entries_that_share(prefix: int, count: int) -> bytes:
    """A block in which each name of `prefix` bytes and more costs seven bytes of the file."""
    content = varint(0) + varint(0) + varint(2) + whole(1, 1) + varint(0) + varint(prefix) + varint(0) + b"a" * prefix
    for number in range(count):
        content += varint(prefix) + varint(3) + varint(0) + number.to_bytes(3, "big")
    return content + bytes(4) + (1).to_bytes(4, "little")


def hostile_folders(root: Path) -> dict[str, str]:
    """Folders by name, and a word of the refusal."""
    said: dict[str, str] = {}
    ones = {WORD: np.ones((2, 3), np.float32)}

    def made(name: str, word: str, index: bytes | None = None, **options) -> Path:
        folder = root / name.replace(" ", "_")
        write_checkpoint(folder / "m.ckpt", ones, **options)
        if index is not None:
            (folder / "m.ckpt.index").write_bytes(index)
        said[folder.name] = word
        return folder

    header, entry = (b"", whole(1, 1)), (WORD.encode(), whole(1, 1) + whole(5, 24))
    for shards in (10**7, 10**12, 2**63):
        made(f"{shards} shards", "no such data file", header=whole(1, shards))
    made("names that share 1000 bytes", "more than", raw_table([entries_that_share(1000, 200_000)], [(0, 1)]))
    made("names that share 100000 bytes", "more than", raw_table([entries_that_share(100_000, 30_000)], [(0, 1)]))
    many = block([header, *((f"a{n:05d}".encode(), b"") for n in range(4000))])
    made("one block 30000 times", "before the end", raw_table([many], [(0, 30_000)]))
    empty = block([]) + bytes(1 << 20)
    made("an empty block 30000 times", "valid index", raw_table([block([header]), empty], [(0, 1), (1, 30_000)]))
    made("names out of order", "not in order", raw_table([block([header, entry, entry])], [(0, 1)]))
    made("a dimension that is a number", "no message", extra={WORD: nested(2, whole(2, 7))})
    made("a million dimensions", "no tensor has", extra={WORD: nested(2, nested(2, whole(1, 2**62)) * 50_000)})
    for field, word in ((4, "ends before"), (5, "do not match")):
        made(f"field {field} huge", word, extra={WORD: whole(field, 2**63 - 1)})
        made(f"field {field} of 70 bits", word, extra={WORD: whole(field, 2**69)})
    made("shard 5", "shard 5 of 1", extra={WORD: whole(3, 5)})
    made("a partitioned variable", "partitioned variable", extra={WORD: nested(7, b"")})
    slices = [
        header,
        (b"\0\xff\x01slice", b""),
        (WORD.encode(), entry[1] + nested(2, nested(2, whole(1, 2)) + nested(2, whole(1, 3))) + nested(7, b"")),
    ]
    made("a partitioned variable and its slices", "partitioned variable", table(slices))
    made("a huge shape", "no weights|lack|read", extra={WORD: nested(2, nested(2, whole(1, 1 << 38)))})
    made("nothing", "magic", b"")
    made("restarts", "restarts", raw_table([block([header])[:-4] + b"\xff" * 4], [(0, 1)]))
    made("not a name", "valid index", table([header, (b"\xff\xfe", b"")]))
    sparse = made("an index of 100 GB", "too large")
    os.truncate(sparse / "m.ckpt.index", 100 << 30)
    data = "m.ckpt.data-00000-of-00001"
    for name, kind in (("m.ckpt.index", "index"), (data, "data")):
        for got, make in (
            ("a pipe", os.mkfifo),
            ("a folder", os.mkdir),
            ("a device", lambda path: os.symlink("/dev/zero", path)),
        ):
            folder = made(f"{kind} {got}", got)
            (folder / name).unlink()
            make(folder / name)
    short = made("short data", "ends before")
    os.truncate(short / data, 5)
    return said


def test_hostile_checkpoints_end_in_one_clear_error_in_bounded_memory_and_time(tmp_path, monkeypatch):
    monkeypatch.setattr(tf_writer, "slow_crc", google_crc32c.value)  # megabytes of it
    said = hostile_folders(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOSTILE), *(str(tmp_path / name) for name in said)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert lines.keys() == said.keys()
    for name, word in said.items():
        assert any(part in lines[name] for part in word.split("|")), (name, lines[name])


NUMBER = st.integers(0, 2**64 - 1) | st.integers(0, 40)
FIELD = (
    st.builds(whole, st.integers(1, 8), NUMBER)
    | st.builds(lambda sizes: nested(2, b"".join(nested(2, whole(1, size)) for size in sizes)), st.lists(NUMBER))
    | st.builds(nested, st.integers(1, 8), st.binary(max_size=6))
    | st.binary(max_size=6)
)
VALUE = st.lists(FIELD, max_size=5).map(b"".join)


@settings(max_examples=200, deadline=None)
@given(header=VALUE, entries=st.dictionaries(st.binary(max_size=5), VALUE, max_size=4), data=st.binary(max_size=40))
def test_sound_tables_of_any_content_are_read_or_refused(tmp_path_factory, header, entries, data):
    folder = tmp_path_factory.mktemp("any")
    records = [(b"", header), *sorted((key, value) for key, value in entries.items() if key)]
    (folder / "m.index").write_bytes(table(records))
    (folder / "m.data-00000-of-00001").write_bytes(data)
    try:
        tensors = open_tf_checkpoint(folder / "m")
    except UserError:
        return
    for tensor in tensors.values():
        try:
            assert tensor.read().nbytes <= len(data)
        except UserError:
            pass
