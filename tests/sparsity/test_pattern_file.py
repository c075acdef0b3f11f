from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from safetensors.torch import save_file

from cook.base.errors import UserError
from cook.sparsity.pattern_file import read_pattern_masks, write_pattern_masks
from tests.sparsity.pattern_cases import network, random_scores

MATRICES = network(1, 3, 3, 5, 7)  # sizes that fill no whole byte


def test_masks_come_back(tmp_path):
    masks = {path: score > 1 for path, score in random_scores(MATRICES, 0).items()}
    write_pattern_masks(tmp_path / "a" / "masks.safetensors", masks, {"type": 8, "sparsity": 75.0})
    found, record = read_pattern_masks(tmp_path / "a" / "masks.safetensors", MATRICES)
    assert record == {"type": 8, "sparsity": 75.0}
    assert found.keys() == masks.keys() and all(torch.equal(found[path], masks[path]) for path in masks)
    size = (tmp_path / "a" / "masks.safetensors").stat().st_size
    assert size < 1500 + sum(mask.numel() for mask in masks.values()) / 8


def test_what_is_no_mask_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such mask file"):
        read_pattern_masks(tmp_path / "none", MATRICES)
    (tmp_path / "text").write_text("hello")
    save_file({"x": torch.ones(3)}, tmp_path / "plain.safetensors")
    write_pattern_masks(tmp_path / "cut", {m.path: torch.ones(m.shape, dtype=torch.bool) for m in MATRICES}, {})
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-8])
    for name in ("text", "plain.safetensors", "cut"):
        with pytest.raises(UserError, match="not a file of pattern masks"):
            read_pattern_masks(tmp_path / name, MATRICES)


def test_what_is_no_ordinary_file_is_refused_before_it_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "large").write_bytes(b"")
    os.truncate(tmp_path / "large", 100 << 30)
    for name, word in (("pipe", "a pipe"), ("device", "a device"), ("large", "too large"), (".", "a folder")):
        with pytest.raises(UserError, match=word):
            read_pattern_masks(tmp_path / name, MATRICES)


@pytest.mark.parametrize("change", ["shape", "missing", "strange"])
def test_masks_of_another_model_are_refused(tmp_path, change):
    masks = {m.path: torch.ones(m.shape, dtype=torch.bool) for m in MATRICES}
    write_pattern_masks(tmp_path / "m", masks, {})
    first = MATRICES[0]
    others = {
        "shape": (dataclasses.replace(first, shape=(1, 1)), *MATRICES[1:]),
        "missing": (*MATRICES, dataclasses.replace(first, path="layers.9.query")),
        "strange": MATRICES[1:],
    }[change]
    with pytest.raises(UserError, match="another model"):
        read_pattern_masks(tmp_path / "m", others)
