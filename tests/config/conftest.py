"""A small valid pair of files that tests break one value at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from cook.base.errors import UserErrors
from cook.config.load import load_config
from cook.config.types import RunConfig

BMCOOK: dict[str, Any] = {
    "output_dir": "results/tiny",
    "model": {
        "type": "cpm_ant",
        "config": {
            "vocab_size": 128,
            "dim_model": 32,
            "num_layers": 2,
            "num_heads": 4,
            "dim_head": 8,
            "dim_ff": 48,
            "position_bias_num_buckets": 32,
            "position_bias_max_distance": 64,
            "eps": 1e-6,
            "prompt_types": 3,
            "prompt_length": 4,
            "segment_types": 3,
        },
    },
    "tokenizer": {"type": "sentencepiece", "vocab_size": 128},
    "data": {"type": "python_stdlib", "max_length": 32},
    "training": {"steps": 10, "train_batch_size": 8, "micro_batch_size": 2, "learning_rate": 0.01},
    "pruning": {"is_pruning": True, "pruned_module": ["project_q.weight"], "mask_method": "fine-grained"},
    "stages": [{"name": "pretrain", "training": {"steps": 20}}, {"name": "layer_mask"}, {"name": "att_mask"}],
}
SCHEME: dict[str, Any] = {
    "coarse-grained": {"train_mask": True, "coarse_mask": "results/tiny/layer.pt", "target_sparsity": 0.5},
    "fine-grained": {
        "train_mask": False,
        "coarse_mask": "results/tiny/layer.pt",
        "num_heads": 4,
        "dim_ff": 48,
        "target_num_heads": 2,
        "target_dimff": 24,
        "heads_mask": "results/tiny/heads.pt",
        "dimff_mask": "results/tiny/dimff.pt",
        "prune_mode": "ffn",
    },
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tests run in an empty folder, so that relative paths mean nothing but what they put there."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def bmcook() -> dict[str, Any]:
    return copy.deepcopy(BMCOOK)


@pytest.fixture
def scheme() -> dict[str, Any]:
    return copy.deepcopy(SCHEME)


@pytest.fixture
def load(elsewhere: Path, bmcook: dict[str, Any], scheme: dict[str, Any]) -> Callable[..., RunConfig]:
    """Writes the two (perhaps changed) fixtures to files and loads them."""

    def write_and_load(*overrides: str, world_size: int | None = None) -> RunConfig:
        (elsewhere / "bmcook.json").write_text(json.dumps(bmcook))
        (elsewhere / "l0_pruning.json").write_text(json.dumps(scheme))
        return load_config("bmcook.json", overrides, world_size=world_size)

    return write_and_load


@pytest.fixture
def errors_of(load: Callable[..., RunConfig]) -> Callable[..., list[str]]:
    """The messages of a load that must fail, one string a mistake."""

    def fail(*overrides: str, world_size: int | None = None) -> Sequence[str]:
        with pytest.raises(UserErrors) as caught:
            load(*overrides, world_size=world_size)
        return [str(error) for error in caught.value.errors]

    return fail
