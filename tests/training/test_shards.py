"""The pieces of DeepSpeed's files are put together by name on any number of ranks, and nothing in them is run.

The files are made here, after DeepSpeed 0.19's layout; `test_engine_and_step.py` reads those of real engines.
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from cook.base.errors import UserError
from cook.training.shards import TAG, Shards, ShardWriter, checkpoint_weights, read_shard

SHAPES = {"a": (5, 3), "b": (7,), "c": (2, 2, 2), "d": (1,)}
"""No size divides by 3."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that is stored under the name of DeepSpeed's."""

    class fragment_address:
        def __init__(self, start: int, numel: int):
            self.start, self.numel = start, numel

    module = types.ModuleType("deepspeed.utils.tensor_fragment")
    fragment_address.__module__, fragment_address.__qualname__ = module.__name__, "fragment_address"
    module.fragment_address = fragment_address  # type: ignore[attr-defined]
    for name, stub in {
        "deepspeed": types.ModuleType("deepspeed"),
        "deepspeed.utils": types.ModuleType("deepspeed.utils"),
        module.__name__: module,
    }.items():
        monkeypatch.setitem(sys.modules, name, stub)
    return fragment_address


def whole(key: str) -> dict[str, torch.Tensor]:
    """A tensor for each parameter, of the weights or of a moment."""
    generator = torch.Generator().manual_seed(sum(map(ord, key)))
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def model_state(**others: Any) -> dict[str, Any]:
    shapes = [{name: torch.Size(shape) for name, shape in SHAPES.items()}]
    module = {name: tensor.bfloat16() for name, tensor in whole("fp32").items()} | {"buffer": torch.arange(3.0)}
    return {
        "module": module,
        "buffer_names": ["buffer"],
        "param_shapes": shapes,
        "frozen_param_shapes": {},
        "shared_params": {"tied": "a"},
        "lr_scheduler": None,
        **others,
    }


def write(folder: Path, name: str, content: Any) -> None:
    (folder / TAG).mkdir(parents=True, exist_ok=True)
    torch.save(content, folder / TAG / name)


def zero_2(folder: Path, ranks: int, address: type) -> None:
    """One flat group, padded at its end, cut into equal shares."""
    flats = {key: torch.cat([t.flatten() for t in whole(key).values()]) for key in ("fp32", "exp_avg", "exp_avg_sq")}
    size = len(flats["fp32"])
    share = -(-size // ranks)
    padded = {key: torch.cat([flat, torch.full((share * ranks - size,), 9.0)]) for key, flat in flats.items()}
    write(folder, "mp_rank_00_model_states.pt", model_state())
    for rank in range(ranks):
        begin, end, at, mapping = rank * share, min(size, (rank + 1) * share), 0, {}
        for name, shape in SHAPES.items():
            numel = torch.Size(shape).numel()
            first, last = max(begin, at), min(end, at + numel)
            if first < last:
                mapping[name] = address(first - begin, last - first)
            at += numel
        mine = {key: flat[begin : begin + share].clone() for key, flat in padded.items()}
        state = {0: {"step": torch.tensor(7.0), "exp_avg": mine["exp_avg"], "exp_avg_sq": mine["exp_avg_sq"]}}
        optimizer = {
            "single_partition_of_fp32_groups": [mine["fp32"][: end - begin]],
            "param_slice_mappings": [mapping],
            "base_optimizer_state": {"state": state, "param_groups": [{"lr": 0.5}]},
            "partition_count": [ranks],
        }
        write(folder, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": optimizer})


def zero_3(folder: Path, ranks: int, _address: type) -> None:
    """Each parameter padded and cut into equal shares; a rank's shares lie one after the other."""
    for rank in range(ranks):
        flats = {}
        for key in ("fp32", "exp_avg", "exp_avg_sq"):
            shares = []
            for tensor in whole(key).values():
                share = -(-tensor.numel() // ranks)
                padded = torch.cat([tensor.flatten(), torch.full((share * ranks - tensor.numel(),), 9.0)])
                shares.append(padded[rank * share : (rank + 1) * share])
            flats[key] = torch.cat(shares)
        state = {0: {"step": torch.tensor(7.0), "exp_avg": flats["exp_avg"], "exp_avg_sq": flats["exp_avg_sq"]}}
        optimizer = {
            "fp32_flat_groups": [flats["fp32"]],
            "partition_count": ranks,
            "optimizer_state_dict": {"state": state, "param_groups": [{"lr": 0.5}]},
        }
        frozen = {"frozen_param_shapes": {"f": torch.Size([5])}} if ranks == 3 else {}
        pieces = {"frozen_param_fragments": {"f": torch.tensor([2.0 * rank, 2.0 * rank + 1])}}
        state = model_state(**frozen, **pieces) | {"module": {"buffer": torch.arange(3.0)}}
        write(folder, f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", state)
        write(folder, f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", {"optimizer_state_dict": optimizer})


@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
@pytest.mark.parametrize("write_stage", [zero_2, zero_3])
def test_weights_and_moments_are_put_together_by_name(tmp_path, address, write_stage, ranks):
    write_stage(tmp_path, ranks, address)
    shards = Shards(tmp_path)
    weights, moments = shards.weights(), shards.moments([])
    for name, tensor in whole("fp32").items():
        assert torch.equal(weights[name], tensor), name
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(moments[key][name], whole(key)[name]), (key, name)
    assert torch.equal(weights["tied"], weights["a"]) and torch.equal(weights["buffer"], torch.arange(3.0))
    assert sorted(set(weights) - set(SHAPES)) == (["buffer", "f", "tied"] if "f" in weights else ["buffer", "tied"])
    if "f" in weights:
        assert weights["f"].tolist() == [0, 1, 2, 3, 4]
    assert shards.counters() == {"step": torch.tensor(7.0)} and shards.groups() == [{"lr": 0.5}]
    assert list(moments) == ["exp_avg", "exp_avg_sq"]


def test_zero_0_stores_the_optimizers_states_in_the_order_of_the_trained_parameters(tmp_path):
    states = {i: {"step": torch.tensor(2.0), "exp_avg": torch.full((2,), float(i))} for i in range(2)}
    optimizer = {"state": states, "param_groups": [{"lr": 0.5}]}
    write(tmp_path, "mp_rank_00_model_states.pt", {"module": {"x": torch.ones(2)}, "optimizer": optimizer})
    shards = Shards(tmp_path)
    moments = shards.moments(["y", "x"])
    assert {name: tensor[0].item() for name, tensor in moments["exp_avg"].items()} == {"y": 0, "x": 1}
    assert shards.counters()["step"] == 2 and list(shards.weights()) == ["x"]


@pytest.mark.parametrize("write_stage", [zero_2, zero_3])
def test_a_rank_whose_file_is_missing_is_noticed(tmp_path, address, write_stage):
    write_stage(tmp_path, 3, address)
    files = sorted((tmp_path / TAG).glob("*optim_states.pt"))
    files[2].unlink()
    with pytest.raises(UserError, match="files of some ranks are missing"):
        Shards(tmp_path)
    files[0].unlink()
    with pytest.raises(UserError, match="not a complete DeepSpeed checkpoint"):
        Shards(tmp_path)


@pytest.mark.parametrize("inner", [None, {}, {"partition_count": 1}])
def test_files_of_another_layout_are_refused(tmp_path, inner):
    content = {} if inner is None else {"optimizer_state_dict": inner}
    write(tmp_path, "mp_rank_00_model_states.pt", model_state())
    write(tmp_path, "zero_pp_rank_0_mp_rank_00_optim_states.pt", content)
    with pytest.raises(UserError, match="not a checkpoint in the format of DeepSpeed"):
        Shards(tmp_path)


class Harmful:
    """Unpickled, it would make a folder."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_nothing_in_a_file_is_run(tmp_path):
    mark = tmp_path / "it ran"
    write(tmp_path, "mp_rank_00_model_states.pt", {"module": {}, "optimizer": Harmful(mark)})
    file = tmp_path / TAG / "mp_rank_00_model_states.pt"
    for read in (read_shard, lambda path: ShardWriter([object] * 4).load(str(path)), lambda path: Shards(tmp_path)):
        with pytest.raises(UserError, match="not a readable .pt file"):
            read(file)
    assert not mark.exists()


@pytest.mark.parametrize("latest", ["..", ".", "../..", "/", "", "gone"])
def test_a_pointer_leads_to_no_other_folder(tmp_path, latest):
    inner = tmp_path / "checkpoint"
    inner.mkdir()
    (inner / "latest").write_text(latest)
    with pytest.raises(UserError, match="names a folder that does not exist"):
        checkpoint_weights(inner)


def test_a_failing_write_is_remembered_until_all_ranks_have_come_through(tmp_path):
    writer = ShardWriter([object] * 4)
    writer.begin()
    writer.makedirs(str(tmp_path / "engine"))
    for name in ("gone/a.pt", "engine/b.pt"):
        writer.save({"x": torch.ones(1)}, str(tmp_path / name))
    assert isinstance(writer.failure, FileNotFoundError) and "gone" in str(writer.failure)
    assert [path.name for path in writer.written] == ["a.pt", "b.pt"]
    writer.begin()
    assert writer.failure is None and writer.written == []
