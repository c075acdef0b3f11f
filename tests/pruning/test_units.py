from __future__ import annotations

from cook.pruning.restrict import restrict
from tests.tiny_pruning import tiny_space


def test_groups_go_from_the_bottom_up_and_know_their_block():
    space = tiny_space(mask_modules=[[True, False], [False, True], [False, False]])
    names = [group.name for group in space.groups]
    assert names == [
        "layers.0.ffn",
        "layers.0.dimff",
        "layers.1.att",
        "layers.1.heads",
        "layers.2.att",
        "layers.2.heads",
        "layers.2.ffn",
        "layers.2.dimff",
    ]
    assert [g.name for g in space.of("heads")] == ["layers.1.heads", "layers.2.heads"]
    assert [g.name for g in space.of("layer", "ffn")] == ["layers.0.ffn", "layers.2.ffn"]
    for group in space.groups:
        assert space.block(group).name == f"layers.{group.layer}.{group.site}"


def test_every_slice_lies_in_its_weight():
    space = tiny_space()
    for group in space.groups:
        for piece in group.slices:
            assert space.shapes[piece.path][piece.dim] == group.size * piece.block


def test_groups_that_must_stay_know_their_block():
    space = restrict(tiny_space(), ["w_in.w_0.weight", "w_in.w_1.weight", "w_out.weight"], {})
    heads = next(g for g in space.unprunable if g.name == "layers.1.heads")
    assert space.block(heads).name == "layers.1.att"
