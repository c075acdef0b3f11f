"""Budgets of the mask stages, against counts of the models that they lead to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cook.base.errors import UserError
from cook.config.load import load_config
from cook.config.scheme import GatesConfig
from cook.families.cpm_ant import ADAPTER
from cook.pruning.budgets import constraints
from cook.pruning.counts import forward_flops, parameters
from cook.pruning.gates import Gates
from cook.pruning.mask_set import fine_from_tensors, fine_to_tensors, kept_counts
from cook.pruning.relaxation import Deterministic, HardConcrete
from cook.recipe.inputs import Inputs, final_masks, make_gates, open_inputs, stage_targets
from cook.recipe.plan import Stage, plan_stage
from tests.recipe.test_stock import write_stock_run
from tests.recipe.tiny_run import MODEL, write_run

ATT_UNIT, FFN_UNIT = 4 * 32 * 8, 3 * 32  # of the tiny model: four projections of a head, three of a dim
GLOBAL = {"train_mask": True, "scope": "global"}


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def make(name: str, *, stock: bool = False, **changes: Any) -> tuple[Stage, Inputs, Gates]:
        if stock:
            coarse = {"fine__coarse_mask": "out/masks/layer.pt", "fine__allow_remote_code": True}
            write_stock_run(tmp_path, (name,), name="llama, tied", **(coarse | changes))
        else:
            write_run(tmp_path, **changes)
        stage = plan_stage(load_config("bmcook.json"), name)  # type: ignore[arg-type]
        inputs = open_inputs(stage, must_exist=False)
        gates = make_gates(stage, inputs)
        assert gates is not None
        return stage, inputs, gates

    return make


@pytest.mark.parametrize(
    "relaxation, blocks, heads",
    [
        ("auto", HardConcrete, Deterministic),
        ("deterministic", Deterministic, Deterministic),
        ("hard_concrete", HardConcrete, HardConcrete),
    ],
)
def test_blocks_alone_learn_with_noise_unless_the_scheme_says_otherwise(opened, relaxation, blocks, heads):
    for name, wanted in (("layer_mask", blocks), ("att_mask", heads), ("ffn_mask", heads)):
        stage, inputs, _ = opened(name)
        config = replace(stage.config, gates=GatesConfig(relaxation=relaxation))
        gates = make_gates(replace(stage, config=config), inputs)
        assert gates is not None and type(gates.relaxation) is wanted


def rows(gates: Gates) -> list[tuple]:
    return [(c.name, c.start, len(c.costs), pytest.approx(c.target)) for c in gates.constraints]


BLOCKS = [(f"layers.{n}.heads", 4 * n, 4, 0.5) for n in range(3)]
BLOCKS += [(f"layers.{n}.dimff", 12 + 24 * n, 24, 1 - 10 / 24) for n in range(3)]


def test_staged_masks_have_a_budget_a_block(opened):
    assert rows(opened("att_mask")[2]) == BLOCKS[:3]
    assert rows(opened("ffn_mask")[2]) == [(name, start - 12, size, target) for name, start, size, target in BLOCKS[3:]]
    [blocks] = opened("layer_mask")[2].constraints
    assert (blocks.name, len(blocks.costs), blocks.target) == ("blocks", 6, 0.35)


def test_a_joint_stage_has_the_budgets_of_all_staged_ones_at_once(opened):
    assert rows(opened("joint_mask", joint={"train_mask": True})[2]) == BLOCKS
    _, inputs, gates = opened("joint_mask", joint={"train_mask": True, "target_sparsity": 0.25})
    assert rows(gates) == [("blocks", 0, 6, 0.25)] + [(name, at + 6, size, t) for name, at, size, t in BLOCKS]
    assert [group.kind for group in inputs.learned] == ["layer"] * 6 + ["heads"] * 3 + ["dimff"] * 3
    att, ffn = 4 * 32 * 32 + 32, 3 * 32 * 24 + 32
    wanted = torch.tensor([att, ffn] * 3) / (3 * att + 3 * ffn)
    torch.testing.assert_close(torch.tensor(gates.constraints[0].costs), wanted)


@pytest.mark.parametrize(("name", "size", "target"), [("att_mask", 12, 0.5), ("ffn_mask", 72, 1 - 10 / 24)])
def test_a_global_kind_has_one_budget_of_as_many_units_as_even_blocks(opened, name, size, target):
    stage, inputs, gates = opened(name, fine__scope="global")
    [budget] = gates.constraints
    assert len(budget.costs) == size and len(set(budget.costs)) == 1 and budget.target == pytest.approx(target)
    shapes = set()
    for seed in range(20):
        gates.values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
        kept = kept_counts(final_masks(stage, inputs, gates))
        assert sum(kept.values()) == round(size * (1 - target))
        shapes.add(tuple(kept.values()))
    assert len(shapes) > 5, "every draw left as many units in every block"


def test_a_block_that_loses_its_last_head_keeps_its_row_where_the_layer_mask_is_fixed(opened):
    stage, inputs, gates = opened("att_mask", fine__scope="global")
    gates.values = torch.linspace(1, -1, 12)
    masks = final_masks(stage, inputs, gates)
    tensors = fine_to_tensors(inputs.space, masks)
    assert tensors["heads_z"].sum(1).tolist() == [4, 2, 0] and "layers.2.att" not in masks
    back = fine_from_tensors(inputs.space, {}, tensors, "heads", "file")
    assert kept_counts(back) == kept_counts(masks)
    without = kept_counts(masks) | {"layers.2.att": 0}
    assert parameters(inputs.space, kept_counts(masks)) == parameters(inputs.space, without)


BUDGETS = [
    ({"target_params": 0.4}, 0.4),
    ({"target_flops": 0.6, "flops_length": 100}, 0.6),
    ({"target_flops": 0.35}, 0.35),
    ({}, None),
]


@pytest.mark.parametrize(("budget", "share"), BUDGETS, ids=["params", "flops", "flops of the rows", "even blocks"])
@pytest.mark.parametrize("stock", [False, True], ids=["CPM-Ant", "llama"])
def test_a_global_budget_leaves_its_share_of_what_is_counted(opened, stock, budget, share):
    stage, inputs, gates = opened("joint_mask", stock=stock, joint=GLOBAL | budget)
    [constraint] = gates.constraints
    assert sum(constraint.costs) == pytest.approx(1) and len(constraint.costs) == len(gates.values)
    space, context = inputs.space, budget.get("flops_length", 40)

    def count(kept: dict[str, int]) -> float:
        return forward_flops(space, kept, context=context) if "target_flops" in budget else parameters(space, kept)

    whole = {group.name: group.size for group in inputs.learned}
    # One unit of each stays everywhere, so that norms and biases of emptied blocks play no part in the counts.
    least = count(dict.fromkeys(whole, 1))
    one_less = {name: count(whole) - count(whole | {name: size - 1}) for name, size in whole.items()}
    units = sum(one_less[name] * size for name, size in whole.items())
    assert units == pytest.approx(count(whole) - least + sum(one_less.values()))
    if share is None:
        kept = {"heads": 4 if stock else 2, "keys": 4, "dimff": 10}
        even = {g.name: kept[g.kind] for g in inputs.learned}
        share = 1 - (count(whole) - count(even)) / units
    # With the last query head of a group, its keys and values go.
    own_keys = {name: one_less.get(name.replace("heads", "keys"), 0) for name in one_less if "heads" in name}
    steps = [cost + own_keys.get(name, 0) for name, cost in one_less.items()]
    tried = 0
    for seed in range(60):
        gates.values = torch.rand(len(gates.values), generator=torch.Generator().manual_seed(seed))
        kept = {name: int(mask.sum()) for name, mask in gates.binary().items()}
        if min(kept.values()):
            left = units - (count(whole) - count(kept))
            assert abs(left - share * units) <= max(steps) / 2 * (1 + 1e-9)
            tried += 1
    assert tried > 5, "no draw left something in every block"


def test_flops_weigh_heads_more_the_longer_the_text(opened):
    def head_over_dim(**budget: Any) -> float:
        costs = opened("joint_mask", joint=GLOBAL | budget)[2].constraints[0].costs
        return costs[0] / costs[-1]

    assert head_over_dim(target_params=0.5) == pytest.approx(ATT_UNIT / FFN_UNIT)
    assert head_over_dim(target_flops=0.5, flops_length=1) == pytest.approx((ATT_UNIT + 2 * 8) / FFN_UNIT)
    # At 2048 keys the scores of a head of 8 features cost 64 times as many FLOPs a feature as its projections here.
    assert head_over_dim(target_flops=0.5, flops_length=2048) == pytest.approx((ATT_UNIT + 2 * 2048 * 8) / FFN_UNIT)


def test_a_key_value_group_costs_all_its_query_heads(opened):
    _, inputs, gates = opened(
        "joint_mask", stock=True, joint=GLOBAL | {"target_params": 0.5}, fine__head_unit="kv_group"
    )
    assert {group.kind for group in inputs.learned} == {"heads", "dimff"} and not gates.constraints[0].owners
    costs = gates.constraints[0].costs
    # 2 query heads, a key and a value head of 6 features and the output's columns, against gate, up and down.
    assert costs[0] / costs[-1] == pytest.approx(32 * 6 * (2 + 1 + 1 + 2) / (3 * 32))


def test_a_tiny_budget_leaves_a_single_unit_and_removes_the_other_blocks(opened):
    stage, inputs, gates = opened("joint_mask", joint=GLOBAL | {"target_params": 0.06})
    gates.values = torch.linspace(1, -1, 12 + 72)  # the first head, then nothing that the budget has room for
    masks = final_masks(stage, inputs, gates)
    assert kept_counts(masks)["layers.0.heads"] == 1 and masks["layers.0.heads"].tolist() == [1, 0, 0, 0]
    gone = [f"layers.{n}.{site}" for n in range(3) for site in ("att", "ffn")][1:]
    assert {name for name, mask in masks.items() if name.endswith(("att", "ffn"))} == set(gone)
    space = ADAPTER.space(MODEL)
    assert parameters(space, kept_counts(masks)) == parameters(space, dict.fromkeys(gone, 0) | {"layers.0.heads": 1})


@pytest.mark.parametrize("unit", ["auto", "query_head"])
def test_query_heads_and_their_keys_share_one_budget(opened, unit):
    _, inputs, gates = opened("joint_mask", stock=True, joint=GLOBAL | {"target_params": 0.5}, fine__head_unit=unit)
    assert [group.kind for group in inputs.learned] == ["heads"] * 3 + ["keys"] * 3 + ["dimff"] * 3
    [budget] = gates.constraints
    # A query head is a row of queries and a column of the output; its keys and values are units of their own.
    head, key, dim = budget.costs[0], budget.costs[24], budget.costs[-1]
    assert head / dim == pytest.approx(32 * 6 * 2 / (3 * 32)) and key == pytest.approx(head)
    assert budget.owners == (*(24 + n for n in range(12) for _ in range(2)), *[-1] * (12 + 60))


def test_blocks_that_share_a_number_of_query_heads_take_any_of_them(opened):
    stage, inputs, gates = opened(
        "att_mask", stock=True, fine__scope="global", fine__head_unit="query_head", fine__coarse_mask=None
    )
    [budget] = gates.constraints
    assert [group.kind for group in inputs.learned] == ["heads"] * 3 and len(budget.costs) == 24
    gates.values = torch.rand(24, generator=torch.Generator().manual_seed(3))
    masks = final_masks(stage, inputs, gates)
    numbers = torch.stack([mask.view(4, 2).sum(1) for name, mask in masks.items() if name.endswith("heads")])
    assert numbers.sum() == 12 and set(numbers.flatten().tolist()) == {0, 1, 2}
    for layer, read in enumerate(numbers > 0):
        assert torch.equal(masks.get(f"layers.{layer}.keys", torch.ones(4)), read.float())


def test_uneven_blocks_of_a_stock_family_need_remote_code(opened):
    with pytest.raises(UserError, match="no stock class can load blocks of different sizes"):
        opened("ffn_mask", stock=True, fine__scope="global", fine__allow_remote_code=False)
    # Even blocks learned at once do not.
    opened("joint_mask", stock=True, joint={"train_mask": True}, fine__allow_remote_code=False)


def test_a_joint_stage_wants_units_of_both_kinds(opened):
    with pytest.raises(UserError, match="pruned_module leaves no units of kind 'dimff'"):
        only_attention = [f"self_attention.{name}.weight" for name in ("project_q", "project_k", "project_v")]
        opened(
            "joint_mask", joint=GLOBAL, pruning__pruned_module=[*only_attention, "self_attention.attention_out.weight"]
        )


def test_sections_of_a_block_keep_their_budgets(opened):
    stage, inputs, gates = opened(
        "joint_mask", stock=True, joint={"train_mask": True}, fine__head_unit="query_head", fine__target_num_heads=4
    )
    names = [c.name for c in gates.constraints]
    assert names[:4] == [f"layers.0.heads.{n}" for n in range(4)] and len(names) == 3 * 4 + 3
    assert names == [c.name for c in constraints(inputs.space, inputs.learned, stage_targets(stage))]
