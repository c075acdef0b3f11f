"""TensorFlow checkpoints: what an independent writer wrote comes back, and damage is told, never taken for weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.families.tf_checkpoint import open_tf_checkpoint
from tests.models.tf_writer import nested, whole, write_checkpoint


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
        assert torch.equal(found[name], torch.from_numpy(array))


def test_bfloat16(tmp_path):
    values = torch.tensor([1.5, -2.0, 3e38]).bfloat16()
    write_checkpoint(tmp_path / "a.ckpt", {"x": values.view(torch.int16).numpy().view(np.uint16)})
    assert torch.equal(open_tf_checkpoint(tmp_path / "a.ckpt")["x"], values)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"compression": 1}, "compressed"),
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
        (whole(3, 4), "shard 4 of 1"),
        (whole(5, 11), "11 bytes do not hold"),
        (whole(4, 5), "ends before x"),
    ],
)
def test_a_tensor_that_is_refused(tmp_path, extra, reason):
    write_checkpoint(tmp_path / "a.ckpt", {"x": np.ones(3, np.float32)}, extra={"x": extra})
    found = open_tf_checkpoint(tmp_path / "a.ckpt")  # nobody has asked for the tensor yet
    with pytest.raises(UserError, match=reason):
        found["x"]


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
        found = {key: tensor.clone() for key, tensor in open_tf_checkpoint(folder / "a.ckpt").items()}
    except UserError:
        return
    # Bytes that the format does not use (padding of the footer, the handle of its metadata) change nothing.
    assert {key: set(tensor.flatten().tolist()) for key, tensor in found.items()} == {
        f"name/{i}": {float(i)} for i in range(6)
    }
