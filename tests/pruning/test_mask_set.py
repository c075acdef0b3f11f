from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.export.pruned_folder import reshaped_source
from cook.pruning.mask_set import (
    coarse_from_tensors,
    coarse_to_tensors,
    consistent,
    fine_from_tensors,
    fine_to_tensors,
    kept_counts,
    kept_groups,
    without_empty_blocks,
)
from cook.pruning.restrict import restrict
from tests.models.cpm_ant_tiny import RAGGED
from tests.tiny_families import tiny_source
from tests.tiny_pruning import tiny_space

SPACE = tiny_space()
HOLED = tiny_space(mask_modules=[[True, False], [False, True], [False, False]])
ATTENTION = ["project_q.weight", "project_k.weight", "project_v.weight", "attention_out.weight"]


def blocks(att, ffn):
    named = {f"layers.{i}.att": z for i, z in enumerate(att)} | {f"layers.{i}.ffn": z for i, z in enumerate(ffn)}
    return {name: torch.tensor([float(z)]) for name, z in named.items() if z is not None}


@given(st.lists(st.booleans(), min_size=6, max_size=6))
def test_coarse_masks_come_back(bits):
    masks = blocks(bits[:3], bits[3:])
    tensors = coarse_to_tensors(SPACE, masks)
    assert tensors["self_att_layer_z"].tolist() == bits[:3] and tensors["ffn_layer_z"].tolist() == bits[3:]
    assert tensors["cross_att_layer_z"].shape == (0,)
    back = coarse_from_tensors(SPACE, tensors, "file")
    assert {k: v.item() for k, v in back.items()} == {k: v.item() for k, v in masks.items()}


def test_blocks_that_the_model_lacks_count_as_removed():
    tensors = coarse_to_tensors(HOLED, {})
    assert tensors["self_att_layer_z"].tolist() == [0, 1, 1] and tensors["ffn_layer_z"].tolist() == [1, 0, 1]
    assert set(coarse_from_tensors(HOLED, tensors, "file")) == {g.name for g in HOLED.of("layer")}
    tensors["ffn_layer_z"][1] = 1
    with pytest.raises(UserError, match="file: ffn_layer_z keeps layer 1.*lacks"):
        coarse_from_tensors(HOLED, tensors, "file")


@pytest.mark.parametrize(
    ("key", "shape"), [("self_att_layer_z", 4), ("ffn_layer_z", 2), ("cross_att_layer_z", 2), ("ffn_layer_z", (3, 1))]
)
def test_another_models_coarse_mask_is_refused(key, shape):
    tensors = coarse_to_tensors(SPACE, {}) | {key: torch.ones(shape)}
    with pytest.raises(UserError, match=f"file: {key}"):
        coarse_from_tensors(SPACE, tensors, "file")


def test_rows_of_fine_masks_are_the_kept_blocks_from_the_bottom():
    masks = blocks([1, 0, 1], [0, 1, 1])
    masks |= {"layers.0.heads": torch.tensor([1.0, 0, 0, 0]), "layers.2.heads": torch.tensor([0, 1.0, 1, 0])}
    masks |= {"layers.1.dimff": torch.eye(20)[0], "layers.2.dimff": torch.eye(20)[5]}
    tensors = fine_to_tensors(SPACE, masks)
    assert tensors["heads_z"].tolist() == [[1, 0, 0, 0], [0, 1, 1, 0]]
    assert tensors["dimff_z"].shape == (2, 20) and tensors["dimff_z"].argmax(1).tolist() == [0, 5]
    for kind in ("heads", "dimff"):
        back = fine_from_tensors(SPACE, masks, tensors, kind, "file")
        assert all(torch.equal(back[name], masks[name]) for name in back) and len(back) == 2
    assert [g.name for g in kept_groups(SPACE, masks, "heads")] == ["layers.0.heads", "layers.2.heads"]
    assert kept_counts(masks)["layers.2.heads"] == 2
    assert set(fine_to_tensors(SPACE, {k: v for k, v in masks.items() if "dimff" not in k})) == {"heads_z"}


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (4, 4), (12,), (0, 4), (3, 4, 1)])
def test_another_models_fine_mask_is_refused(shape):
    with pytest.raises(UserError, match="file: heads_z does not fit"):
        fine_from_tensors(SPACE, {}, {"heads_z": torch.ones(shape)}, "heads", "file")


@pytest.mark.parametrize("kind", ["heads", "dimff"])
def test_rows_of_smaller_blocks_end_in_0(kind):
    ragged = tiny_space(**RAGGED)
    sizes = {g.name: g.size for g in ragged.of(kind)}
    assert len({*sizes.values()}) > 1
    masks = {name: (torch.arange(size) != size // 2).float() for name, size in sizes.items()}
    rows = fine_to_tensors(ragged, masks)[f"{kind}_z"]
    assert rows.shape == (len(sizes), max(sizes.values()))
    for row, (name, size) in zip(rows, sizes.items(), strict=True):
        assert torch.equal(row[:size], masks[name]) and not row[size:].any()
    again = fine_from_tensors(ragged, {}, {f"{kind}_z": rows}, kind, "file")
    assert again.keys() == masks.keys() and all(torch.equal(again[name], masks[name]) for name in masks)
    for wrong in (torch.ones_like(rows), rows[:, :-1], torch.nn.functional.pad(rows, (0, 1))):
        with pytest.raises(UserError, match=f"{kind}_z does not fit"):
            fine_from_tensors(ragged, {}, {f"{kind}_z": wrong}, kind, "file")


def test_blocks_outside_pruned_module_stay_in_the_files():
    space = restrict(SPACE, ATTENTION, {})
    tensors = coarse_to_tensors(space, blocks([1, 0, 1], [None] * 3))
    assert tensors["ffn_layer_z"].tolist() == [1, 1, 1]
    # What the restricted space wrote reads the same in the whole one.
    assert kept_counts(coarse_from_tensors(SPACE, tensors, "f"))["layers.0.ffn"] == 1
    assert set(coarse_from_tensors(space, tensors, "f")) == {f"layers.{i}.att" for i in range(3)}
    tensors["ffn_layer_z"][1] = 0
    with pytest.raises(UserError, match="removes layer 1's block, which pruned_module does not allow"):
        coarse_from_tensors(space, tensors, "f")


def test_rows_of_blocks_outside_pruned_module_stay_too():
    space = restrict(SPACE, [f"encoder.layers.1.self_att.self_attention.{name}" for name in ATTENTION], {})
    masks = {"layers.1.heads": torch.tensor([1.0, 0, 1, 0])}
    tensors = fine_to_tensors(space, masks)
    assert tensors["heads_z"].tolist() == [[1] * 4, [1, 0, 1, 0], [1] * 4]
    back = fine_from_tensors(space, {}, tensors, "heads", "f")
    assert list(back) == ["layers.1.heads"] and torch.equal(back["layers.1.heads"], masks["layers.1.heads"])
    tensors["heads_z"][2, 0] = 0
    with pytest.raises(UserError, match="prunes layers.2.heads, which pruned_module"):
        fine_from_tensors(space, {}, tensors, "heads", "f")


def test_a_block_without_units_counts_as_removed():
    masks = {"layers.0.heads": torch.zeros(4), "layers.1.heads": torch.tensor([0, 0, 1.0, 0])}
    masks |= {"layers.2.dimff": torch.zeros(20), "layers.0.dimff": torch.ones(20)}
    found = without_empty_blocks(SPACE, masks)
    assert {name for name, mask in found.items() if not mask.any()} - set(masks) == {"layers.0.att", "layers.2.ffn"}
    assert all(torch.equal(found[name], mask) for name, mask in masks.items())
    coarse, fine = coarse_to_tensors(SPACE, found), fine_to_tensors(SPACE, found)
    assert coarse["self_att_layer_z"].tolist() == [0, 1, 1] and coarse["ffn_layer_z"].tolist() == [1, 1, 0]
    assert fine["heads_z"].sum(1).tolist() == [1, 4] and fine["dimff_z"].sum(1).tolist() == [20, 20]
    back = coarse_from_tensors(SPACE, coarse, "f")
    assert kept_counts(fine_from_tensors(SPACE, back, fine, "heads", "f")) == {"layers.1.heads": 1, "layers.2.heads": 4}


def test_files_of_a_model_that_lost_all_blocks_of_a_kind():
    found = without_empty_blocks(SPACE, {f"layers.{n}.heads": torch.zeros(4) for n in range(3)})
    coarse, fine = coarse_to_tensors(SPACE, found), fine_to_tensors(SPACE, found)
    assert coarse["self_att_layer_z"].tolist() == [0] * 3 and fine["heads_z"].shape == (0, 4)
    back = coarse_from_tensors(SPACE, coarse, "f")
    assert fine_from_tensors(SPACE, back, fine, "heads", "f") == {}
    with pytest.raises(UserError, match="f: heads_z does not fit"):
        fine_from_tensors(SPACE, back, {"heads_z": torch.ones(1, 4)}, "heads", "f")


def test_keys_go_with_their_query_heads_and_these_with_them():
    source = tiny_source("llama")  # 8 query heads of 4 key-value heads
    space = source.adapter.space(source.config, "query_head")
    heads = torch.tensor([1.0, 0, 0, 0, 1, 1, 1, 1])
    made = consistent(space, {"layers.1.heads": heads})
    assert made["layers.1.keys"].tolist() == [1, 0, 1, 1] and torch.equal(made["layers.1.heads"], heads)
    made = consistent(space, {"layers.1.heads": heads, "layers.1.keys": torch.tensor([1.0, 1, 1, 0])})
    assert made["layers.1.keys"].tolist() == [1, 0, 1, 0]
    assert made["layers.1.heads"].tolist() == [1, 0, 0, 0, 1, 1, 0, 0]
    assert consistent(space, made).keys() == made.keys() == {"layers.1.heads", "layers.1.keys"}
    even = {"layers.0.heads": torch.tensor([1.0, 0] * 4)}
    assert consistent(space, even).keys() == even.keys()
    with pytest.raises(AssertionError, match="without their keys"):
        reshaped_source(source, space, {"layers.1.heads": torch.ones(8), "layers.1.keys": torch.tensor([1.0, 1, 1, 0])})


def test_query_heads_in_a_file_of_whole_groups_are_refused():
    source = tiny_source("llama")
    space = source.adapter.space(source.config)
    with pytest.raises(UserError, match="keeps only a part of a key-value group"):
        fine_from_tensors(space, {}, {"heads_z": torch.tensor([[1.0, 0, 1, 1, 1, 1, 1, 1]] * 3)}, "heads", "file")
