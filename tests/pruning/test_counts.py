from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cook.export.pruned_folder import reshaped_source
from cook.families.cpm_ant import ADAPTER
from cook.families.source import load_model
from cook.pruning.counts import block_parameters, forward_flops, kept_shapes, parameters, unit_flops, unit_parameters
from cook.pruning.mask_set import kept_counts
from cook.pruning.reshape import kept_units
from cook.pruning.restrict import restrict
from tests.models.cpm_ant_tiny import RAGGED, tiny_model
from tests.tiny_families import tiny_source as tiny_stock
from tests.tiny_pruning import config_of, masks_of, tiny_space
from tests.tiny_pruning import tiny_source as tiny_cpm_ant

SPACES = {name: (changes, tiny_space(**changes)) for name, changes in {"plain": {}, "ragged": RAGGED}.items()}


def reshaped_model(changes, masks, space):
    with torch.device("meta"):
        return ADAPTER.build(ADAPTER.shrink(config_of(**changes), space, kept_units(space, masks)).config)


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_counts_are_those_of_the_reshaped_model(name, data):
    changes, space = SPACES[name]
    masks = data.draw(masks_of(space))
    model = reshaped_model(changes, masks, space)
    kept = kept_counts(masks)
    assert parameters(space, kept) == sum(p.numel() for p in model.parameters())
    assert kept_shapes(space, kept) == {name: tuple(p.shape) for name, p in model.named_parameters()}
    inside = sum(p.numel() for name, p in model.named_parameters() if name.startswith("encoder.layers."))
    assert block_parameters(space, kept) == inside


def test_the_published_sizes():
    # The 10B configuration and what the published ladder says of it and of its smallest offspring, in billions.
    sizes = {"vocab_size": 30720, "dim_model": 4096, "dim_ff": 10240, "num_layers": 48, "num_heads": 32}
    changes = sizes | {
        "dim_head": 128,
        "prompt_types": 32,
        "prompt_length": 32,
        "segment_types": 32,
        "position_bias_num_buckets": 512,
        "position_bias_max_distance": 2048,
    }
    space = tiny_space(**changes)
    assert round(parameters(space) / 1e9, 2) == 9.39
    kept = {f"layers.{i}.att": int(i < 25) for i in range(48)} | {f"layers.{i}.ffn": int(i < 21) for i in range(48)}
    for heads, dims, wanted in ((16, 700, 1.15), (4, 350, 0.43)):
        units = {f"layers.{i}.heads": heads for i in range(48)} | {f"layers.{i}.dimff": dims for i in range(48)}
        assert round(parameters(space, kept | units) / 1e9, 2) == wanted


def test_what_a_unit_owns():
    _, space = SPACES["plain"]
    by_name = {group.name: group for group in space.groups}
    assert unit_parameters(space, by_name["layers.0.heads"]) == 4 * 24 * 6
    assert unit_parameters(space, by_name["layers.0.dimff"]) == 3 * 24
    assert unit_parameters(space, by_name["layers.0.att"]) == 4 * 24 * 24 + 24
    assert unit_parameters(space, by_name["layers.0.ffn"]) == 3 * 24 * 20 + 24
    for group in space.groups:  # the same as what the whole model loses
        assert parameters(space) - parameters(space, {group.name: group.size - 1}) == unit_parameters(space, group) or (
            group.size == 1
        )


@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"layers.0.heads": 1, "layers.1.dimff": 3},
        {"layers.0.att": 0, "layers.2.ffn": 0, "layers.1.heads": 0},
    ],
)
def test_flops_are_those_that_torch_counts(kept):
    changes, space = SPACES["plain"]
    masks = {g.name: (torch.arange(g.size) < kept.get(g.name, g.size)).float() for g in space.groups}
    model = tiny_model(**{**changes, **_shape(masks, space)})
    rows, length = 2, 19
    batch = torch.randint(0, 61, (rows, length - 5))
    # Fused attention is not counted on every device; the plain one is.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=batch)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    counted = flops["Global"] - flops["CpmAntForCausalLM.position_bias"]  # built once, whatever the depth
    # The model makes logits for the text alone, not for the 5 positions of the prompt.
    head = 2 * 24 * 61
    ours = forward_flops(space, kept, context=length)
    assert counted == rows * (length * (ours - head) + (length - 5) * head)


def counted_flops(model, ids):
    """What torch counts of a forward pass, its shared table of position biases left out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    return flops["Global"] - flops.get("CpmAntForCausalLM.position_bias", 0)


@pytest.mark.parametrize(("family", "queries"), [("CPM-Ant", 1), ("llama", 2), ("gpt2", 1)])
def test_the_flops_of_a_unit_are_those_that_torch_counts_less_without_it(tmp_path, family, queries):
    source = tiny_cpm_ant(tmp_path)[1] if family == "CPM-Ant" else tiny_stock(family)
    space = source.adapter.space(source.config)
    ids = torch.randint(0, 61, (2, 14), generator=torch.Generator().manual_seed(0))
    length = 14 + source.config.get("prompt_length", 0)
    whole = counted_flops(load_model(source), ids)
    for group in (g for g in space.groups if g.kind != "layer" and g.layer == 1):
        mask = torch.ones(group.size)
        mask[1] = 0
        less = whole - counted_flops(load_model(reshaped_source(source, space, {group.name: mask})), ids)
        assert less == 2 * length * unit_flops(space, group, context=length), group.name
        assert group.members == (queries if group.kind == "heads" else 1)


def _shape(masks, space):
    config = ADAPTER.shrink(config_of(), space, kept_units(space, masks)).config
    return {k: config[k] for k in ("mask_modules", "layer_heads", "layer_dim_ff", "dim_ff")}


def test_flops_by_hand():
    # 3 layers: 4 projections of 24 × 24, an FFN of 3 · 24 · 20, scores and values over 10 keys; 61 logits.
    flops = forward_flops(SPACES["plain"][1], context=10)
    assert flops == 3 * (2 * 4 * 24 * 24 + 2 * 3 * 24 * 20 + 4 * 10 * 24) + 2 * 61 * 24


def test_blocks_that_must_stay_count_in_the_whole_and_not_in_the_target():
    space = SPACES["plain"][1]
    only_ffn = restrict(space, ["w_in.w_0.weight", "w_in.w_1.weight", "w_out.weight"], {})
    flops = [forward_flops(s, context=10) for s in (space, only_ffn)]
    assert flops[0] == flops[1] and parameters(space) == parameters(only_ffn)
    assert block_parameters(only_ffn) == 3 * (3 * 24 * 20 + 24)
