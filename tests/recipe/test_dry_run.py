"""The plan that --dry-run prints: parameters, memory and tokens, worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from cook.base.errors import UserError, UserErrors
from cook.config.load import load_config
from cook.config.tasks import PlanOptions
from cook.config.types import RunConfig
from cook.recipe.cards import CARDS
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
        ({}, "heads, FFN dims", 3 * (2 * 4 * 32 * 8 + 14 * 3 * 32)),
        ({"target_sparsity": 0.35}, "blocks, heads, FFN dims", ATT + FFN + 2 * (2 * 4 * 32 * 8 + 14 * 3 * 32)),
        # Half of 12 heads of 1024 and 72 dims of 96 parameters, the last of each block first: 6 heads and 36 dims.
        ({"scope": "global", "target_params": 0.5}, "heads, FFN dims (uneven)", 6 * 1024 + 36 * 96),
        ({"scope": "global"}, "heads, FFN dims (uneven)", 3 * (2 * 4 * 32 * 8 + 14 * 3 * 32)),
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
    assert " blocks 6 " in lines["layer_mask"] and " heads (uneven) 6 " in lines["att_mask"]
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


def estimates(loaded: RunConfig, world_size: int = 1, **options: Any) -> list[dict[str, Any]]:
    facts = plan_facts(loaded, recipe(loaded), world_size=world_size, options=PlanOptions(**options))
    return [row["estimate"] for row in facts["stages"]]


def test_what_each_stage_needs(config, capsys):
    loaded = config(stages=ATT_FIRST[:2])
    pretrain, mask = estimates(loaded)
    # 2 rows of 40 tokens. Attention: 3 tensors of 32 for the norm, then q, k, v and the result; FFN: 3 of 32, 4 of 24.
    layer = 4 * (3 * 32 + 4 * 32 + 3 * 32 + 4 * 24)
    scores = 2 * 4 * 4 * 40 * 40  # a bias for four heads, and the same with hidden keys masked
    assert pretrain["activation_bytes"] == 80 * (3 * layer + 4 * 4 * 32) + scores
    assert pretrain["checkpointed_activation_bytes"] == 80 * (layer + 3 * 4 * 32 + 4 * 4 * 32) + scores
    # A gate on the result of every block.
    assert mask["activation_bytes"] - pretrain["activation_bytes"] == 80 * 6 * 4 * 32
    assert (pretrain["micro_batch_size"], pretrain["accumulation_steps"], pretrain["sent_bytes_per_step"]) == (2, 2, 0)
    assert "days" not in pretrain
    show_plan(plan_facts(loaded, recipe(loaded), world_size=1))
    out = capsys.readouterr().out
    assert "pretrain:" in out and "cook plan --card H100" in out


def test_a_plan_for_many_gpus_on_a_card(config, capsys):
    settings = ("training.train_batch_size=32", "training.precision=auto")
    loaded = config(*settings, world_size=8, stages=ATT_FIRST[:3])
    options = PlanOptions(gpus=4, hosts=2, card="a100-40", link=25.0, suggest=True)
    facts = plan_facts(loaded, recipe(loaded), world_size=8, options=options)
    assert (facts["ranks"], facts["hosts"], facts["card"]) == (8, 2, "A100-40")
    first = facts["stages"][0]["estimate"]
    assert (first["precision"], first["zero_stage"], first["largest_micro_batch_size"]) == ("half", 1, 4)
    # Stage 1 in bf16: an all-reduce of the gradients and an all-gather of the weights.
    assert first["sent_bytes_per_step"] == round(3 * 2 * WHOLE * 7 / 8)
    assert first["sent_bytes_per_step_by_zero_stage"]["3"] == 2 * round((2 + 2) * WHOLE * 7 / 8)  # two micro-batches
    assert first["days"] == pytest.approx(6 * first["seconds_per_step"] / 86400)
    assert first["tokens_per_second"] == pytest.approx(32 * 40 / first["seconds_per_step"])
    assert facts["suggested"][1:] == ["training.micro_batch_size=4", "training.activation_checkpointing=false"]
    show_plan(facts)
    out = capsys.readouterr().out
    assert "hosts:" in out and "tokens/s" in out and f"  --set {facts['suggested'][0]}" in out
    # A slower network between the hosts makes steps longer.
    slow = estimates(loaded, 8, gpus=4, hosts=2, card="A100-40", link=0.001)
    assert slow[0]["seconds_per_step"] > first["seconds_per_step"]


def test_the_plan_chooses_the_micro_batch_where_the_settings_leave_it_open(config):
    loaded = config('training.micro_batch_size="auto"', stages=ATT_FIRST[:1])
    assert estimates(loaded)[0]["micro_batch_size"] == 4  # all that a rank has, without a card
    assert estimates(loaded, card="H100")[0]["micro_batch_size"] == 4
    fitting = config('training.micro_batch_size="auto"', "training.train_batch_size=1048576", stages=ATT_FIRST[:1])
    found = estimates(fitting, card="RTX4090")[0]
    assert found["micro_batch_size"] == found["largest_micro_batch_size"] < 1048576
    assert found["micro_batch_size"] * found["accumulation_steps"] == 1048576


def test_a_stage_that_changes_a_suggested_setting_is_named(config):
    entries = [{"name": "pretrain", "training": {"micro_batch_size": 1}}]
    loaded = config(f"stages={json.dumps(entries)}")
    facts = plan_facts(loaded, recipe(loaded), world_size=1, options=PlanOptions(card="H100", suggest=True))
    assert "stages.pretrain.training.micro_batch_size=4" in facts["suggested"]


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        ({"gpus": 0, "hosts": 0, "link": 0.0}, ("--gpus", "--hosts", "--link")),
        ({"suggest": True}, ("--suggest needs a card",)),
    ],
)
def test_mistaken_options_are_reported_at_once(options, sentences):
    with pytest.raises(UserErrors) as error:
        PlanOptions(**options).check()
    assert all(sentence in str(error.value) for sentence in sentences)
    assert len(error.value.errors) == len(sentences)


def test_an_unknown_card_is_an_error(config):
    loaded = config()
    with pytest.raises(UserError, match="no such card"):
        plan_facts(loaded, recipe(loaded), world_size=1, options=PlanOptions(card="B1000"))


def test_a_suggestion_that_is_impossible_is_an_error(config, monkeypatch):
    loaded = config(stages=ATT_FIRST[:1])
    small = dataclasses.replace(CARDS["H100"], memory=1000.0)
    monkeypatch.setitem(CARDS, "H100", small)
    with pytest.raises(UserError, match="not even one row per micro-batch fits on H100"):
        plan_facts(loaded, recipe(loaded), world_size=1, options=PlanOptions(card="H100", suggest=True))
