from __future__ import annotations

from dataclasses import replace

import pytest

from cook.base.errors import UserError
from cook.families.cpm_ant import ADAPTER
from cook.pruning.restrict import restrict
from tests.tiny_pruning import tiny_space

GUIDE = [
    "ffn.ffn.w_in.w.weight",
    "ffn.ffn.w_out.weight",
    "self_attention.project_q.weight",
    "self_attention.project_k.weight",
    "self_attention.project_v.weight",
    "self_attention.attention_out.weight",
]
NATIVE = ["ffn.ffn.w_in.w_0.weight", "ffn.ffn.w_in.w_1.weight", *GUIDE[1:]]
SPACE = tiny_space(num_layers=12)


def names(space):
    return {group.name for group in space.groups}


def test_both_spellings_allow_everything():
    for spelling in (GUIDE, NATIVE):
        space = restrict(SPACE, spelling, ADAPTER.aliases)
        assert space == replace(SPACE, hidden=None) and space.unprunable == ()
    older = tiny_space(gated_ffn=False)
    assert restrict(older, GUIDE, ADAPTER.aliases) == replace(older, hidden=None)


def test_hidden_dims_stay_unless_all_matrices_on_the_stream_are_named():
    embeddings = [f"{name}_embedding.weight" for name in ("input", "segment", "prompt")]
    assert restrict(SPACE, [*NATIVE, *embeddings], ADAPTER.aliases) == SPACE
    assert restrict(SPACE, [*NATIVE, *embeddings[1:]], ADAPTER.aliases).hidden is None


@pytest.mark.parametrize("spelling", [GUIDE[:2], NATIVE[:3]])
def test_ffn_alone(spelling):
    space = restrict(SPACE, spelling, ADAPTER.aliases)
    assert names(space) == {f"layers.{i}.{n}" for i in range(12) for n in ("ffn", "dimff")}
    assert {g.name for g in space.unprunable} == names(SPACE) - names(space)
    assert space.shapes == SPACE.shapes


def test_attention_alone():
    space = restrict(SPACE, GUIDE[2:], ADAPTER.aliases)
    assert names(space) == {f"layers.{i}.{n}" for i in range(12) for n in ("att", "heads")}


def test_a_part_of_a_block_is_refused():
    for left_out in range(2, 6):
        part = [name for i, name in enumerate(GUIDE) if i != left_out]
        with pytest.raises(UserError, match="but not") as caught:
            restrict(SPACE, part, ADAPTER.aliases)
        assert GUIDE[left_out] in str(caught.value)
    with pytest.raises(UserError, match="but not .*w_in.w_1.weight"):
        restrict(SPACE, [NATIVE[0], NATIVE[2]], ADAPTER.aliases)


@pytest.mark.parametrize("suffix", ["ffn.w_outer.weight", "out.weight", "ut.weight", "w_out", "w_out.weight.x", ""])
def test_an_unknown_suffix_is_refused(suffix):
    with pytest.raises(UserError, match="matches no weight") as caught:
        restrict(SPACE, [*GUIDE, suffix], ADAPTER.aliases)
    assert repr(suffix) in str(caught.value)


def test_only_whole_components_match():
    layer = "layers.1.self_att.self_attention."
    space = restrict(SPACE, [layer + name.split(".")[1] + ".weight" for name in GUIDE[2:]], {})
    assert names(space) == {"layers.1.att", "layers.1.heads"}  # and not layers.11


def test_a_weight_outside_the_blocks_prunes_nothing():
    with pytest.raises(UserError, match="leaves nothing"):
        restrict(SPACE, ["input_embedding.weight"], ADAPTER.aliases)


def test_a_space_can_be_restricted_again():
    once = restrict(SPACE, GUIDE, ADAPTER.aliases)
    twice = restrict(restrict(once, GUIDE, ADAPTER.aliases), GUIDE[:2], ADAPTER.aliases)
    assert twice == restrict(SPACE, GUIDE[:2], ADAPTER.aliases)
