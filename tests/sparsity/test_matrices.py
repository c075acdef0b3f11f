from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from cook.base.errors import UserError
from cook.families.registry import by_config
from cook.pruning.units import GatePoint, PruningSpace, UnitGroup, WeightSlice
from cook.sparsity.matrices import ROLES, encoder_matrices, matrices_of, restricted
from cook.sparsity.pattern_masks import make_masks, sparsity_table
from cook.sparsity.spec import NAMES, PatternSpec
from tests.tiny_families import FAMILIES, MORE_ENCODERS, tiny_config
from tests.tiny_pruning import tiny_space


def test_the_matrices_of_a_stock_encoder():
    config = BertConfig(
        vocab_size=9,
        hidden_size=12,
        num_hidden_layers=11,
        num_attention_heads=3,
        intermediate_size=20,
        max_position_embeddings=8,
    )
    with torch.device("meta"):
        model = BertForSequenceClassification(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    matrices = encoder_matrices(shapes, head_size=4)
    assert [(m.layer, m.role) for m in matrices] == [(layer, role) for layer in range(11) for role in ROLES]
    one = {m.role: m for m in matrices[60:]}
    assert one["output"].path == "bert.encoder.layer.10.output.dense.weight"
    assert one["attention_output"].path == "bert.encoder.layer.10.attention.output.dense.weight"
    assert (one["intermediate"].inputs, one["intermediate"].outputs) == (12, 20)
    assert all(shapes[m.path] == m.shape for m in matrices)
    with pytest.raises(UserError, match="not the weights"):
        encoder_matrices({"pooler.dense.weight": (4, 4)}, head_size=4)


def test_the_matrices_of_a_pruning_space():
    space = tiny_space()
    matrices = matrices_of(space)
    assert {m.layer for m in matrices} == set(range(space.num_layers))
    for m in matrices:
        assert m.shape == space.shapes[m.path]
    roles = [m.role for m in matrices if m.layer == 0]
    assert roles == ["query", "key", "value", "attention_output", "intermediate", "intermediate", "output"]
    by_role = {m.role: m for m in matrices if m.layer == 0}
    assert by_role["attention_output"].path.endswith("attention_out.weight")
    assert by_role["output"].path.endswith("w_out.weight")
    heads = next(g for g in space.groups if g.kind == "heads")
    assert by_role["query"].head_size * heads.size == by_role["query"].outputs == by_role["attention_output"].inputs


def test_pruned_module_chooses():
    matrices = matrices_of(tiny_space())
    chosen = restricted(matrices, ["project_q.weight", "w_out.weight"])
    assert {m.role for m in chosen} == {"query", "output"}
    with pytest.raises(UserError, match="'roject_q.weight' matches no matrix"):
        restricted(matrices, ["roject_q.weight"])


def test_a_fused_weight_is_one_matrix():
    shapes = {"0.att.qkv.weight": (8, 24), "0.att.out.weight": (8, 8)}
    qkv = [WeightSlice(path="0.att.qkv.weight", dim=1, block=4, offset=8 * part) for part in range(3)]
    group = UnitGroup(
        kind="heads",
        site="att",
        layer=0,
        size=2,
        gate=GatePoint(module="0.att.out", at="input", repeat=4),
        slices=(*qkv, WeightSlice(path="0.att.out.weight", dim=0, block=4)),
    )
    fused, out = matrices_of(PruningSpace(num_layers=1, shapes=shapes, groups=(group,), logits_weight=""))
    assert (fused.role, fused.inputs, fused.outputs) == ("query", 8, 24) and out.role == "attention_output"
    assert [(part.role, part.outputs) for part in fused.parts] == [("query", 8), ("key", 8), ("value", 8)]
    scores = {path: torch.rand(shape) for path, shape in shapes.items()}
    masks = make_masks(scores, (fused, out), PatternSpec(type=0, granularity=8), sparsity=50.0)
    # Two heads of four dims: the one whose queries, keys, values and outputs weigh more together.
    weight = scores[fused.path].square().view(8, 3, 2, 4).sum((0, 1, 3)) + scores[out.path].square().view(2, -1).sum(1)
    stays = torch.arange(2) == weight.argmax()
    assert torch.equal(masks[fused.path], stays.repeat_interleave(4).repeat(3).expand(8, 24))
    assert torch.equal(masks[out.path], stays.repeat_interleave(4)[:, None].expand(8, 8))
    masks = make_masks(scores, (fused, out), PatternSpec(type=5, block=4), sparsity=50.0)
    assert masks[fused.path].shape == (8, 24) and masks[fused.path].float().mean() == 0.5


@pytest.mark.parametrize("name", [*FAMILIES, *MORE_ENCODERS, "cohere", "falcon", "mpt"])
def test_every_pattern_finds_its_matrices_in_every_family(name):
    config = tiny_config(name)
    space = by_config(config).space(config)
    matrices = matrices_of(space)
    random = torch.Generator().manual_seed(0)
    scores = {m.path: torch.rand(m.shape, generator=random) for m in matrices}
    for kind in NAMES:
        spec = PatternSpec(type=kind, granularity=2, block=2, local_granularities=(2, 2))
        masks = make_masks(scores, matrices, spec, sparsity=50.0)
        assert {path: mask.shape for path, mask in masks.items()} == {m.path: m.shape for m in matrices}
        wanted = 0.75 if kind == "local_kn" else 0.5  # along both sides
        assert sparsity_table(matrices, masks).total == pytest.approx(wanted, abs=0.06), kind
        if kind == "whole_head":
            assert whole_units(space, masks) == {False, True}


def test_heads_of_a_fused_weight_whose_keys_are_shared():
    config = tiny_config("phi3")
    config["num_key_value_heads"] = config["num_attention_heads"] // 2
    space = by_config(config).space(config)
    matrices = matrices_of(space)
    fused = next(m for m in matrices if m.parts)
    queries, keys, values = fused.parts
    assert keys.outputs == values.outputs == queries.outputs // 2 and queries.head_size == 2 * keys.head_size
    random = torch.Generator().manual_seed(0)
    scores = {m.path: torch.rand(m.shape, generator=random) for m in matrices}
    masks = make_masks(scores, matrices, PatternSpec(type=0, granularity=2), sparsity=50.0)
    assert whole_units(space, masks) == {False, True}


def whole_units(space, masks):
    """Whether the heads are kept, each with all the slices that the space says are its own."""
    found = set()
    for group in (g for g in space.groups if g.kind == "heads"):
        for unit in range(group.size):
            pieces = [
                masks[s.path].narrow(s.dim, s.offset + unit * s.block, s.block) for s in group.slices if s.path in masks
            ]
            kept = torch.cat([piece.flatten() for piece in pieces])
            assert kept.all() or not kept.any(), (group.name, unit)
            found.add(bool(kept.all()))
    return found
