"""The tensors of a model's files are accounted for without reading them."""

from __future__ import annotations

from pathlib import Path

import torch

from cook.base.tensor_files import LazyTensors
from cook.families.cpm_ant import ADAPTER
from cook.pruning.family import ModelSource, Stored


def test_the_files_tensors_behind_the_models_are_found_by_shapes_alone():
    read: list[str] = []

    def reader(name):
        return lambda: read.append(name) or torch.ones(2, 3)

    files = LazyTensors({name: reader(name) for name in "abcd"}, dict.fromkeys("abc", (2, 3)))
    stored = Stored(files)

    def by_value():
        return stored["c"] * float(stored["c"].sum())

    readers = {"x": lambda: torch.cat([stored["a"], stored["b"]]), "y": by_value, "z": lambda: stored["d"]}
    source = ModelSource(adapter=ADAPTER, config={}, tensors=LazyTensors(readers), path=Path("m"), stored=stored)
    assert source.stored_for(["x", "absent"]) == {"a", "b"} and read == []
    assert source.stored_for(["y", "z"]) == {"c", "d"}
    assert set(read) == {"c", "d"}  # whose conversion needs values, and whose shape is unknown
    assert source.tensors["x"].shape == (4, 3) and source.tensors["y"][0, 0] == 6
