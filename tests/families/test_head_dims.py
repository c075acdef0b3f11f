"""Fewer head dims: the masked and the reshaped model are equal, in stock classes where these can hold the result."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cook.base.errors import UserError
from cook.export.pruned_folder import mask_model, prune_to_folder, reshaped_source
from cook.families.cpm_ant import ADAPTER
from cook.families.head_dims import units_of_head
from cook.families.rotary import Turned
from cook.families.source import load_model
from cook.pruning.attach import AttachedGates
from cook.pruning.family import ModelSource
from cook.pruning.mask_set import consistent
from cook.pruning.reshape import filled_up, kept_units, reshaped
from cook.recipe.head_units import nearest_head_dim
from tests.families.tiny_models import (
    EXACT,
    IDS,
    TinyModels,
    check_config,
    compute_norms_in_fp64,
    difference,
    logits_of,
    some,
)
from tests.models.cpm_ant_tiny import tiny_model
from tests.tiny_families import CAUSAL, FAMILIES, MOE, MORE, MORE_ENCODERS, tiny_source
from tests.tiny_pruning import config_of, masks_of

NEIGHBOURS = ("ernie4_5", "glm", "glm4", "cohere2")
"""Families whose rotary positions turn dims 2i and 2i + 1."""
SOURCES = {name: tiny_source(name) for name in (*FAMILIES, *NEIGHBOURS)}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SOURCES["llama 3"] = tiny_source(
    "llama", rope_parameters=LLAMA3 | {"original_max_position_embeddings": 16}, head_dim=16
)
SOURCES["gpt_neox, half turned"] = tiny_source(
    "gpt_neox", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
)
LATE = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "llama_4_scaling_beta": 0.5, "mscale_all_dim": 1.0}
SOURCES["ministral3, late"] = tiny_source("ministral3", rope_parameters=LATE | {"original_max_position_embeddings": 4})
SOURCES["deepseek_v3, dense"] = tiny_source("deepseek_v3", q_lora_rank=None, first_k_dense_replace=3)
SOURCES["gpt2, unscaled"] = tiny_source("gpt2", scale_attn_weights=False)
MODEL = tiny_model()
SOURCES["cpm_ant"] = ModelSource(adapter=ADAPTER, config=config_of(), tensors=MODEL.state_dict(), path=Path("cpm_ant"))
TINY = TinyModels(SOURCES, every_unit=False)
CASES, SPACES, both = TINY.cases, TINY.spaces, TINY.both
STOCK = (
    "ministral3, late",
    "llama",
    "llama, tied",
    "llama 3",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt_oss",
    "deepseek_v3, dense",
    *NEIGHBOURS,
)


def inputs_of(name, padding):
    if name != "cpm_ant":
        return {"input_ids": IDS, "attention_mask": padding}
    return {"input_ids": IDS}


def half(size, seed):
    return some(size, max(1, size // 2), seed)


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=2, deadline=None)
@given(data=st.data())
def test_masked_and_reshaped_are_equal(case, data):
    space = SPACES[case]
    masks = data.draw(masks_of(space))
    size = space.head_dims.size
    masks["head_dims"] = some(size, data.draw(st.integers(1, size)), data.draw(st.integers(0, 99)))
    if data.draw(st.booleans()):
        masks["hidden"] = some(space.hidden.size, data.draw(st.integers(8, 24)), data.draw(st.integers(0, 99)))
    padding = torch.ones_like(IDS)
    padding[1, : data.draw(st.integers(0, 4))] = 0
    masked, small = both(case, masks, **inputs_of(case[0], padding))
    assert difference(masked, small, padding.bool() if case[0] != "cpm_ant" else None) <= EXACT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_config_describes_the_weights(case):
    source, space = SOURCES[case[0]], SPACES[case]
    size = space.head_dims.size
    heads, dims = space.of("heads")[0], space.of("dimff")[0]
    masks = {"head_dims": half(size, 1), dims.name: half(dims.size, 2)}
    masks[heads.name] = torch.ones(heads.size).index_fill(0, torch.tensor([0]), 0)
    small = check_config(source, space, masks, case[1])
    # What was pruned can be pruned again.
    again = small.adapter.space(small.config, case[1])
    left = int(masks["head_dims"].sum()) * space.head_dims.members
    assert again.head_dims.size * again.head_dims.members == left
    twice = {"head_dims": half(again.head_dims.size, 3)}
    model, smaller = load_model(small), load_model(reshaped_source(small, again, twice))
    assert difference(logits_of(model, again, twice), logits_of(smaller)) <= EXACT


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_class_keeps_the_frequencies_of_the_pairs(name, tmp_path):
    source = SOURCES.get(name) or tiny_source(name)
    space, whole = source.adapter.space(source.config), load_model(source)
    masks = {"head_dims": half(space.head_dims.size, 5)}
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")
    assert not pruned.needs_remote_code
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    before = dict(whole.named_buffers())
    for path, frequencies in model.named_buffers():
        if path.endswith("inv_freq"):  # every bit, or distant tokens would be turned by another angle
            kept = masks["head_dims"][: len(before[path])].bool()  # units that are not turned come last
            torch.testing.assert_close(frequencies, before[path][kept], rtol=0, atol=0)
    assert difference(logits_of(whole, space, masks), logits_of(model)) <= EXACT
    # Behind the length for which `longrope` has other factors than before it.
    far = {"position_ids": torch.arange(9).expand(2, 9) + 60}
    assert difference(logits_of(whole, space, masks, **far), logits_of(model, **far)) <= EXACT


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in CAUSAL], ids=str)
def test_the_cache_and_generation(case):
    model, space = TINY.models[case[0]], SPACES[case]
    masks = {"head_dims": half(space.head_dims.size, 4), "layers.0.att": torch.zeros(1)}
    small = load_model(reshaped_source(SOURCES[case[0]], space, masks))
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.tensor([[0] * 2 + [1] * 7, [1] * 9])}
    attached = mask_model(model, space, masks)
    masked = model.generate(IDS, **options)
    attached.remove()
    assert torch.equal(masked, small.generate(IDS, **options))


WITH_GRADIENTS = ("llama", "qwen3", "phi3", "glm", "deepseek_v3, dense", "gpt2", "gpt_neox, half turned")


@pytest.mark.parametrize("name", [*WITH_GRADIENTS, "bert", "cpm_ant"])
def test_each_unit_has_a_gradient_and_matters(name):
    case = TINY.case(name)
    model, space = load_model(SOURCES[name], torch.float64), SPACES[case]
    compute_norms_in_fp64(model)
    random = torch.Generator().manual_seed(0)
    z = (0.3 + 0.7 * torch.rand(space.head_dims.size, dtype=torch.float64, generator=random)).requires_grad_()
    attached = AttachedGates(model, [space.head_dims], {})

    def loss(values):
        attached.set({"head_dims": values})
        return model(input_ids=IDS).logits.square().mean()

    loss(z).backward()
    assert z.grad.ne(0).all()
    with torch.no_grad():
        step = torch.zeros_like(z).index_fill(0, torch.tensor([1]), 1e-6)
        measured = (loss(z + step) - loss(z - step)) / 2e-6
        # The differences lose about half the digits of fp64.
        assert float(z.grad[1]) == pytest.approx(float(measured), rel=1e-5, abs=1e-8)


STAY = ("deepseek_v3, one group",)
"""Models of families whose heads can have fewer dimensions otherwise."""


@pytest.mark.parametrize("name", [*MOE, *MORE, *MORE_ENCODERS])
def test_in_every_other_family_they_are_exact_or_stay(name):
    source = tiny_source(name)
    space = source.adapter.space(source.config, source.adapter.head_units(source.config)[-1])
    assert (space.head_dims is not None) == (source.adapter.abilities.head_dims and name not in STAY)
    if space.head_dims is None:
        with pytest.raises(UserError, match="the size of heads of this"):
            nearest_head_dim(source.adapter, space, 0.5)
        return
    alone = {"head_dims": half(space.head_dims.size, 1)}
    others = {g.name: some(g.size, g.size - 1, 2) for g in space.of("heads") if g.layer == 1}
    model = load_model(source)
    for masks in (alone, consistent(space, alone | others | {"layers.0.ffn": torch.zeros(1)})):
        small = load_model(reshaped_source(source, space, masks))
        assert difference(logits_of(model, space, masks), logits_of(small)) <= EXACT
    gone = {"layers.0.ffn": torch.zeros(1)}
    for first, second in ((alone, others | gone), (others, alone | gone)):  # a reshaped model loses other units
        again = reshaped_source(source, space, consistent(space, first))
        left = again.adapter.space(again.config, again.adapter.head_units(again.config)[-1])
        masks = consistent(left, second)
        small = load_model(reshaped_source(again, left, masks))
        assert difference(logits_of(load_model(again), left, masks), logits_of(small)) <= EXACT


def test_a_table_of_positions_is_made_anew_and_cut(tmp_path):
    """GPT-J's is not stored: transformers computes it for whole heads when it loads a model."""
    source = tiny_source("gptj")
    space, whole = source.adapter.space(source.config), load_model(source)
    masks = {"head_dims": half(space.head_dims.size, 2), "layers.0.att": torch.zeros(1)}
    prune_to_folder(source, space, masks, tmp_path / "small")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    wanted, far = logits_of(whole, space, masks), {"position_ids": torch.arange(9).expand(2, 9) + 40}
    assert all(difference(wanted, logits_of(model)) <= EXACT for model in (loaded, copy.deepcopy(loaded), again))
    assert difference(logits_of(whole, space, masks, **far), logits_of(again, **far)) <= EXACT


def test_units_are_what_is_turned_together():
    assert units_of_head(6, Turned(6)) == ((0, 3), (1, 4), (2, 5))
    assert units_of_head(8, Turned(4)) == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert units_of_head(8, Turned(4, neighbours=True)) == ((0, 1), (2, 3), (4, 6), (5, 7))
    assert units_of_head(3, Turned(0)) == ((0,), (1,), (2,))
    assert units_of_head(7, Turned(4)) is None  # no unit of two dims for the last one


def test_models_whose_frequencies_change_at_run_time_keep_their_head_dims():
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    config = tiny_source("llama", rope_parameters=dynamic)
    assert config.adapter.space(config.config).head_dims is None


@pytest.mark.parametrize(("name", "kind"), [("llama", "head_dims"), ("gemma", "hidden"), ("qwen3", "head_dims")])
def test_moments_are_cut_as_gradients_are(name, kind):
    """The small model's gradients are an oracle: its loss is that of the masked one, as a function of other weights."""
    source = tiny_source(name)
    space = source.adapter.space(source.config)
    masks = {kind: some(next(g.size for g in space.every if g.kind == kind), 6 if kind == "hidden" else 2, 3)}
    whole, small = load_model(source, torch.float64), load_model(reshaped_source(source, space, masks), torch.float64)
    for model in (whole, small):
        compute_norms_in_fp64(model)
    attached = mask_model(whole, space, masks)
    for model in (whole, small):
        model(input_ids=IDS).logits.square().mean().backward()
    attached.remove()
    shrunk = source.adapter.shrink(source.config, space, kept_units(space, masks))
    gradients = {path: p.grad for path, p in whole.named_parameters()}
    gradients |= {path: gradients[space_tied(gradients, path)] for path in space.shapes if path not in gradients}
    wanted = {path: p.grad for path, p in small.named_parameters()}
    for moment in (1, 2):
        cut = reshaped({path: g**moment for path, g in gradients.items()}, space, masks, moment=moment)
        changed = 0
        for path in cut:
            found, own = cut[path], wanted.get(shrunk.renamed.get(path, path))
            if own is not None:
                # Parts of the models compute in fp32.
                torch.testing.assert_close(found, own**moment, rtol=1e-4, atol=1e-4 * float((own**moment).abs().max()))
                changed += 1
            back = filled_up(dict(cut), space, masks, moment=moment)[path]
            kept = back != 0
            torch.testing.assert_close(back[kept], (gradients[path] ** moment)[kept], rtol=1e-9, atol=1e-12)
        assert changed > 5


def space_tied(gradients, path):
    """The parameter that a tied weight is."""
    assert path == "lm_head.weight"
    return next(name for name in gradients if name.endswith("embed_tokens.weight"))
