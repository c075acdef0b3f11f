"""The plan that --dry-run prints: parameters, memory and tokens, worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cook.base.errors import UserError
from cook.config.load import load_config
from cook.config.types import RunConfig
from cook.config.tasks import PlanOptions
from cook.recipe.dry_run import plan_facts, setup_of, show_plan
from cook.recipe.estimate import state_bytes
from cook.recipe.plan import plan_stage, recipe
from tests.recipe.tiny_run import ATT_FIRST, contents, write_run


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str, stages: tuple[str, ...] = ATT_FIRST, world_size: int = 1, **changes: Any) -> RunConfig:
        write_run(tmp_path, stages, **changes)
        return load_config("bmcook.json", overrides, world_size=world_size)

    return make


ATT = 4 * 32 * 32 + 32  # four projections and a norm
FFN = 3 * 32 * 24 + 32
REST = (420 + 3 * 4 + 3) * 32 + (32 + 3 * 3) * 4 + 32  # tokens, prompts, segments, position bias, last norm
WHOLE = 3 * (ATT + FFN) + REST


def test_the_plan_of_the_whole_recipe(config, tmp_path, capsys):
    loaded = config()
    before = contents(tmp_path)
    show_plan(plan_facts(loaded, recipe(loaded), world_size=1))
    assert contents(tmp_path) == before
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    # A third of 9 blocks' parameters at most 0.35: the last FFN block and the last attention block.
    layers, heads, dims = ATT + FFN, 2 * 4 * 32 * 16, 2 * 3 * 32 * 14
    counts = [WHOLE, WHOLE - layers, WHOLE - layers - heads, WHOLE - layers - heads - dims]
    shown = [f"{count / 1000:.1f}k" for count in counts]
    expected = {
        "pretrain": (0, 0),
        "layer_mask": (0, 1),
        "layer_finetune": (1, 1),
        "att_mask": (1, 2),
        "att_finetune": (2, 2),
        "ffn_mask": (2, 3),
        "ffn_finetune": (3, 3),
    }
    for stage, (start, end) in expected.items():
        assert f"{shown[start]}  {shown[end]}" in " ".join(lines[stage].split()).replace(" ", "  "), lines[stage]
        assert "≤ 960" in lines[stage]  # 6 steps of 4 rows of 40 tokens
    assert "the end of layer_finetune" in lines["att_mask"] and "fresh weights" in lines["pretrain"]


JOINT = ("pretrain", "joint_mask", "joint_finetune")


@pytest.mark.parametrize(
    ("joint", "learns", "removed"),
    [
        ({}, "heads, dims", 3 * (2 * 4 * 32 * 8 + 14 * 3 * 32)),
        ({"target_sparsity": 0.35}, "layers, heads, dims", ATT + FFN + 2 * (2 * 4 * 32 * 8 + 14 * 3 * 32)),
        # Half of 12 heads of 1024 and 72 dims of 96 parameters, the last of each block first: 6 heads and 36 dims.
        ({"scope": "global", "target_params": 0.5}, "heads, dims (uneven)", 6 * 1024 + 36 * 96),
        ({"scope": "global"}, "heads, dims (uneven)", 3 * (2 * 4 * 32 * 8 + 14 * 3 * 32)),
    ],
)
def test_the_plan_of_a_joint_recipe(config, capsys, joint, learns, removed):
    loaded = config(stages=JOINT, joint={"train_mask": True, **joint})
    show_plan(plan_facts(loaded, recipe(loaded), world_size=1))
    lines = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()}
    whole, left = (f"{count / 1000:.1f}k" for count in (WHOLE, WHOLE - removed))
    assert f" {learns} 6 " in lines["joint_mask"] and f" {whole} {left} " in lines["joint_mask"]
    assert f" – 6 ≤ 960 {left} {left} " in lines["joint_finetune"]


def test_the_plan_of_uneven_heads(config, capsys):
    loaded = config("fine-grained.scope=global", stages=("pretrain", "layer_mask", "att_mask"))
    show_plan(plan_facts(loaded, recipe(loaded), world_size=1))
    lines = {line.split()[0]: " ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.strip()}
    left = f"{(WHOLE - ATT - FFN - 2 * 2 * 4 * 32 * 8) / 1000:.1f}k"
    assert " layers 6 " in lines["layer_mask"] and " heads (uneven) 6 " in lines["att_mask"]
    assert f" {left} " in lines["att_mask"], lines


N = 1000
# Rajbhandari et al. 2020, figure 1 (K = 12, Ψ parameters): 16 Ψ, 4 + 12/N, 2 + 14/N, 16/N.
HALF = {1: {1: 16.0, 2: 4 + 12 / 2, 4: 4 + 12 / 4}, 2: {2: 2 + 14 / 2, 4: 2 + 14 / 4}, 3: {2: 16 / 2, 4: 16 / 4}}
# fp32: weights 4, gradients 4, two moments 8; ZeRO keeps a master copy of its own, 4 more.
FULL = {0: {1: 16.0, 2: 16.0}, 1: {2: 8 + 12 / 2}, 2: {2: 4 + 16 / 2}, 3: {2: 20 / 2, 4: 20 / 4}}


@pytest.mark.parametrize(
    ("precision", "zero", "ranks", "expected"),
    [
        (precision, zero, ranks, value)
        for precision, table in (("bf16", HALF), ("fp32", FULL))
        for zero, row in table.items()
        for ranks, value in row.items()
    ],
)
def test_the_memory_of_a_rank_is_zeros_formula(config, precision, zero, ranks, expected):
    loaded = config(
        f"training.precision={precision}",
        f"deepspeed.zero_optimization.stage={zero}",
        "training.micro_batch_size=1",
        world_size=ranks,
    )
    assert sum(state_bytes(N, setup_of(plan_stage(loaded, "pretrain"), ranks))) == pytest.approx(N * expected)


def test_frozen_weights_need_no_gradients_and_no_states(config):
    loaded = config("training.train_weights=false")
    assert state_bytes(WHOLE, setup_of(plan_stage(loaded, "layer_mask"), 1)) == (4 * WHOLE, 0, 0)


def test_an_absent_zero_stage_is_the_one_that_will_be_used(config):
    loaded = config(deepspeed={}, world_size=2, training__micro_batch_size=1)
    assert sum(state_bytes(N, setup_of(plan_stage(loaded, "pretrain"), 2))) == pytest.approx(N * FULL[2][2])


def test_an_unusable_deepspeed_config_is_found_before_the_run(config):
    loaded = config(deepspeed={"comms_logger": {"enabled": "auto"}})
    with pytest.raises(UserError, match="comms_logger.enabled"):
        show_plan(plan_facts(loaded, recipe(loaded), world_size=1))


def test_what_deepspeed_would_refuse_is_found_before_the_plan(config, tmp_path, capsys):
    loaded = config('deepspeed={"zero_optimization": {"stage": 2, "cpu_offload": true}}')
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"deepspeed\.zero_optimization\.cpu_offload"):
        show_plan(plan_facts(loaded, recipe(loaded), world_size=1))
    assert contents(tmp_path) == before and capsys.readouterr().out == ""


def test_a_stage_with_fixed_masks_needs_the_memory_of_the_smaller_model(config):
    for options, counts in (((), (1, 1)), (("training.remove_masked=false",), (0, 0))):
        loaded = config(*options)
        found = {row["stage"]: row for row in plan_facts(loaded, recipe(loaded), world_size=1)["stages"]}
        for stage, smaller in zip(("layer_finetune", "ffn_finetune"), counts, strict=True):
            count = found[stage]["parameters_before"] if smaller else WHOLE
            assert found[stage]["state_bytes_per_rank"] == 16 * count  # fp32 at ZeRO 0
