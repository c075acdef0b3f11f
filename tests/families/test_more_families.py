"""Every further stock family, from folders that transformers saved: exact, and stock where the class allows it."""

from __future__ import annotations

import copy
import functools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cook.base.errors import UserError
from cook.evaluation.equality import masked_model
from cook.export.pruned_folder import mask_model, prune_to_folder, reshaped_source
from cook.families.registry import by_config
from cook.families.source import load_model, open_model
from cook.pruning.attach import AttachedGates
from cook.recipe.head_units import nearest_heads
from tests.families.tiny_models import EXACT, IDS, check_config, difference, logits_of, some
from tests.tiny_families import GROUPED, MORE, SIZES, draw_weights
from tests.tiny_families import IDS as SPECIAL
from tests.tiny_pruning import masks_of, random_masks

PADDED = torch.ones_like(IDS).index_fill(1, torch.tensor([0, 1]), 0) | torch.tensor([[1], [0]])
LAYERS = 3
WITHOUT_HEADS = "stablelm, in parallel"
FOLDER = tempfile.TemporaryDirectory()


@functools.cache
def opened(name):
    """The model, its source and its space; every weight is drawn."""
    fields = {k: v for k, v in {**SIZES, **GROUPED, **SPECIAL, **MORE[name]}.items() if v is not None}
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    model = draw_weights(AutoModelForCausalLM.from_config(config, dtype=torch.float32)).eval()
    folder = Path(FOLDER.name) / name.replace(", ", "_")
    model.save_pretrained(folder)
    source = open_model(folder)
    return model, source, source.adapter.space(source.config, source.adapter.head_units(source.config)[-1])


@pytest.mark.parametrize("name", MORE)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_masked_and_reshaped_are_equal(name, data):
    model, source, _ = opened(name)
    unit = data.draw(st.sampled_from(source.adapter.head_units(source.config)))
    space = source.adapter.space(source.config, unit)
    masks = data.draw(masks_of(space))
    # A norm over very few dims divides rounding by almost nothing.
    masks["hidden"] = some(space.hidden.size, data.draw(st.integers(8, 32)), data.draw(st.integers(0, 9)))
    small = load_model(check_config(source, space, masks, unit))
    masked = logits_of(model, space, masks, attention_mask=PADDED)
    assert difference(masked, logits_of(small, attention_mask=PADDED), PADDED.bool()) <= EXACT


@pytest.mark.parametrize("name", MORE)
def test_pruning_in_two_steps_and_export_are_exact(name, tmp_path):
    """Any blocks and heads are gone, then others; transformers loads the folder and generates the same."""
    _, source, space = opened(name)
    once = reshaped_source(source, space, random_masks(space, 1, blocks=0.8))
    then = once.adapter.space(once.config, once.adapter.head_units(once.config)[-1])
    masks = random_masks(then, 2, blocks=0.8, units=0.7)
    model = load_model(once)
    pruned = prune_to_folder(once, then, masks, tmp_path / "small")
    small, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", trust_remote_code=pruned.needs_remote_code, output_loading_info=True
    )
    assert not any(report.values())
    assert difference(logits_of(model, then, masks), logits_of(small)) <= EXACT
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": PADDED}
    mask_model(model, then, masks)
    assert torch.equal(model.generate(IDS, **options), small.generate(IDS, **options))


def half(space, kind):
    return {g.name: ((torch.arange(g.size) + g.layer) % 2).float() for g in space.of(kind)}


@pytest.mark.parametrize("name", MORE)
def test_what_the_stock_class_holds_needs_no_remote_code(name, tmp_path):
    """Against the model itself, with zeros in the columns of the products that gather heads and dims."""
    model, source, _ = opened(name)
    space = source.adapter.space(source.config)
    can = source.adapter.abilities
    masks = half(space, "heads") | half(space, "dimff")
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")
    has_heads = can.stock_heads and name != "phi, norms of heads"
    assert pruned.needs_remote_code == (not (can.stock_dims and (has_heads or not space.of("heads"))))
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=pruned.needs_remote_code)
    zeroed = copy.deepcopy(model)
    for group in space.groups:
        if group.name in masks:
            piece = group.slices[-1]
            columns = masks[group.name].repeat_interleave(piece.block)
            weight = zeroed.get_parameter(piece.path)
            weight.data *= columns if piece.dim == 1 else columns[:, None]
    if name not in ("olmo2", "olmo3"):  # their norms are over the heads that there are
        assert difference(logits_of(zeroed), logits_of(small)) <= EXACT
    assert difference(logits_of(model, space, masks), logits_of(small)) <= EXACT
    assert difference(logits_of(model), logits_of(small)) > 0.01


@pytest.mark.parametrize("name", ["olmo2", "olmo3"])
def test_norms_over_all_heads_are_over_those_that_are_left(name):
    """Against norms written here, which see the features of kept heads only."""
    model, source, space = opened(name)
    masks = {g.name: torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 1]) for g in space.of("heads")}
    masks |= {g.name: torch.tensor([1.0, 1, 0, 1]) for g in space.of("keys")}
    small = load_model(reshaped_source(source, space, masks))
    oracle = copy.deepcopy(model)
    head_dim = source.config["head_dim"]
    for layer in oracle.model.layers:
        attention = layer.self_attn
        for norm, mask in ((attention.q_norm, masks["layers.0.heads"]), (attention.k_norm, masks["layers.0.keys"])):
            kept = mask.repeat_interleave(head_dim).bool()

            def forward(x, norm=norm, kept=kept):
                return x * (x[..., kept].square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt() * norm.weight

            norm.forward = forward
        attention.o_proj.weight.data *= masks["layers.0.heads"].repeat_interleave(head_dim)
    assert difference(logits_of(oracle), logits_of(small)) <= EXACT
    # Zeros in the weights do not have the effect of these masks.
    witness, how = masked_model(source, space, masks, torch.float32)
    assert difference(logits_of(witness), logits_of(small)) <= EXACT and "masked by cook" in how


@pytest.mark.parametrize("name", [name for name in MORE if name != WITHOUT_HEADS])
def test_whole_layers_are_left_out(name):
    model, source, space = opened(name)
    masks = {g.name: torch.tensor([float(g.layer != 1)]) for g in space.of("layer")}
    small = reshaped_source(source, space, masks)
    assert small.config["model_type"] == source.config["model_type"]
    assert small.adapter.space(small.config).num_layers == 2
    assert difference(logits_of(model, space, masks), logits_of(load_model(small))) <= EXACT


@pytest.mark.parametrize("name", MORE)
def test_gradients_reach_every_gate(name):
    model, _, space = opened(name)
    z = {group.name: torch.full((group.size,), 0.7, requires_grad=True) for group in space.every}
    attached = AttachedGates(model, space.every, {})
    attached.set(z)
    model(input_ids=IDS, labels=IDS).loss.backward()
    attached.remove()
    model.zero_grad()
    assert [name for name, gate in z.items() if gate.grad is None or not gate.grad.ne(0).all()] == []


@pytest.mark.parametrize("name", MORE)
def test_packed_samples_do_not_see_each_other(name):
    model, source, _ = opened(name)
    sizes = [4, 6]
    batch = {
        "input": torch.cat([IDS[:1, : sum(sizes) - 1], torch.tensor([[7, 0, 0]])], 1),
        "position": torch.tensor([[*range(4), *range(6), 0, 0]]),
    }
    assert source.adapter.mixes_samples(source.config) == (name in ("bloom", "falcon, alibi"))
    if source.adapter.mixes_samples(source.config):
        batch = {"input": IDS, "position": torch.arange(9).expand(2, -1)}
        assert torch.equal(model(**source.adapter.inputs(batch)).logits, model(input_ids=IDS).logits)
        return
    with torch.no_grad():
        packed = model(**source.adapter.inputs(batch)).logits
        for begin, size in ((0, 4), (4, 6)):
            alone = model(input_ids=batch["input"][:, begin : begin + size]).logits
            assert difference(alone, packed[:, begin : begin + size]) <= EXACT


def test_heads_with_modules_of_their_own_stay():
    _, source, space = opened(WITHOUT_HEADS)
    assert not space.of("heads") and not space.of("keys") and space.of("dimff") and space.hidden
    with pytest.raises(UserError, match="the heads of this StableLM model cannot be pruned"):
        nearest_heads(source.adapter, source.config, 0.5)


def test_the_slopes_of_kept_heads_are_those_of_the_whole_model():
    """With the slopes of their new places, heads compute something else."""
    model, source, space = opened("bloom")
    masks = {g.name: torch.tensor([0.0, 1, 1, 1, 1, 0]) for g in space.of("heads")}
    small = load_model(reshaped_source(source, space, masks))
    expected = logits_of(model, space, masks)
    assert difference(expected, logits_of(small)) <= EXACT
    for block in small.transformer.h:
        block.self_attention.slopes = {"of": 6, "heads": [0, 1, 2, 3]}
    assert difference(expected, logits_of(small)) > 1e-3


def test_the_first_heads_alone_keep_their_slopes_when_they_are_pruned_again():
    _, source, space = opened("bloom")
    small = reshaped_source(source, space, {g.name: torch.tensor([1.0, 0, 0, 0, 0, 0]) for g in space.of("heads")})
    again = small.adapter.space(small.config)
    assert reshaped_source(small, again, {}).config["structure"]["slopes"] == small.config["structure"]["slopes"] != {}


def test_products_split_at_numbers_of_the_whole_model_are_refused():
    config = opened("bloom")[1].config | {"slow_but_exact": True, "pretraining_tp": 2}
    with pytest.raises(UserError, match="slow_but_exact"):
        by_config(config).space(config)
