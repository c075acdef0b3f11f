"""Every family with experts: a masked model and the reshaped one compute the same, whichever experts are masked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from cook.base.errors import UserError
from cook.export.pruned_folder import mask_model, prune_to_folder, reshaped_source
from cook.families.source import load_model, open_model
from cook.pruning.attach import AttachedGates
from cook.pruning.counts import active_parameters, cache_features, forward_flops, kept_shapes, parameters
from cook.pruning.mask_file import read_masks, write_mask_file
from cook.pruning.mask_set import consistent, fine_to_tensors, kept_counts
from cook.pruning.reshape import reshaped, restored
from tests.families.tiny_models import EXACT, IDS, TinyModels, check_config, difference, logits_of, some
from tests.tiny_families import MOE, given_config, tiny_source

TINY = TinyModels({name: tiny_source(name) for name in MOE})
SOURCES, MODELS, SPACES, both = TINY.sources, TINY.models, TINY.spaces, TINY.both


def even_masks(space, seed=0, *, experts=1, dims=8):
    """All blocks lose the same numbers: `experts` of each section, and all dims of an expert but `dims`."""
    kept = [(g, max(g.least, g.section_size - experts)) for g in space.of("experts")]
    kept += [(g, dims) for g in space.of("dimff")]
    return {g.name: some(g.size, number, seed + place, g.sections) for place, (g, number) in enumerate(kept)}


@st.composite
def any_masks(draw, space):
    """Random masks of blocks, heads, experts, their dims and hidden dims; dims in multiples that kernels need."""
    seed, masks = draw(st.integers(0, 10**6)), {}
    random = torch.Generator().manual_seed(seed)
    fours = {"hidden": (2, 8), "dimff": (1, 4)}
    for place, group in enumerate(space.every):
        if draw(st.integers(0, 3)) == 0:
            continue
        if group.kind in ("heads", "keys"):
            # Norms over the features of very few heads divide rounding by almost nothing.
            masks[group.name] = (torch.rand(group.size, generator=random) < 0.6).float()
            continue
        if group.kind in fours:
            kept = 4 * draw(st.integers(*fours[group.kind]))
        else:
            kept = draw(st.integers(1 if group.kind == "head_dims" else group.least, group.section_size))
        masks[group.name] = some(group.size, kept, seed + place, group.sections)
    return consistent(space, masks)


@pytest.mark.parametrize("case", TINY.cases, ids=str)
@settings(max_examples=3, deadline=None)
@given(data=st.data())
def test_masked_and_reshaped_are_equal(case, data):
    masks = data.draw(any_masks(SPACES[case]))
    assert difference(*both(case, masks)) <= EXACT
    check_config(SOURCES[case[0]], SPACES[case], masks, case[1])


@pytest.mark.parametrize("name", MOE)
def test_hidden_dims_are_known_without_any_attention(name):
    space = SPACES[name, "kv_group"]
    masks = {f"layers.{layer}.att": torch.zeros(1) for layer in range(space.num_layers)}
    masks |= {"hidden": some(space.hidden.size, 8)}
    assert difference(*both((name, "kv_group"), masks)) <= EXACT
    small = check_config(SOURCES[name], space, masks, "kv_group")
    assert small.adapter.space(small.config).hidden.size == 8


@pytest.mark.parametrize("name", MOE)
def test_pruning_in_two_steps_is_exact(name):
    source, space = SOURCES[name], SPACES[name, "kv_group"]
    first = even_masks(space, dims=12)
    first |= {g.name: torch.ones(g.size) for g in space.of("experts")[:1]}  # another number of experts in one layer
    once = reshaped_source(source, space, first)
    then = once.adapter.space(once.config)
    masks = even_masks(then, 1) | {"layers.2.att": torch.zeros(1)}
    model, small = load_model(once), load_model(reshaped_source(once, then, masks))
    assert difference(logits_of(model, then, masks), logits_of(small)) <= EXACT


@pytest.mark.parametrize("name", MOE)
def test_open_gates_change_nothing_and_closed_ones_do(name):
    model, space = MODELS[name], SPACES[name, "kv_group"]
    plain = logits_of(model)
    opened = logits_of(model, space, {g.name: torch.ones(g.size) for g in space.every})
    assert difference(plain, opened) <= EXACT
    assert torch.equal(plain, logits_of(model))
    for kind in ("experts", "dimff"):
        masks = {n: mask for n, mask in even_masks(space).items() if n.endswith(kind)}
        assert difference(plain, logits_of(model, space, masks)) > 1e-3


@pytest.mark.parametrize("name", MOE)
def test_gradients_reach_the_gates_of_experts_that_are_chosen(name):
    model, space = MODELS[name], SPACES[name, "kv_group"]
    groups = [*space.of("heads"), *space.of("experts"), *space.of("dimff")]
    z = {group.name: torch.full((group.size,), 0.7, requires_grad=True) for group in groups}
    attached, chosen = AttachedGates(model, groups, {}), {}
    hooks = [
        model.get_submodule(g.gate.module).register_forward_hook(
            # The last token of a row predicts nothing.
            lambda _m, _i, out, g=g: chosen.update({g.layer: out[2].view(2, 9, -1)[:, :-1].unique().tolist()})
        )
        for g in space.of("experts")
    ]
    attached.set(z)
    model(input_ids=IDS, labels=IDS).loss.backward()
    attached.remove()
    for hook in hooks:
        hook.remove()
    for group in groups:
        gradient = z[group.name].grad
        rows = gradient.view(-1, group.section_size) if group.kind == "dimff" else gradient
        own = rows if group.kind == "heads" else rows[chosen[group.layer]]
        assert own.ne(0).all(), group.name


@pytest.mark.parametrize("name", MOE)
def test_a_folder_of_transformers_is_pruned_to_a_folder_of_its_class(tmp_path, name):
    """transformers writes every expert by itself, and loads what was written with the same class."""
    config = given_config(name)
    torch.manual_seed(0)
    stock = AutoModelForCausalLM.from_config(CONFIG_MAPPING[config.pop("model_type")](**config)).eval()
    for weight in stock.parameters():  # initial weights are so small that experts hardly matter
        weight.data = 0.3 * torch.randn(weight.shape) + (weight.ndim == 1)
    stock.save_pretrained(tmp_path / "whole")
    single = any(".experts.0." in key for key in load_file(tmp_path / "whole/model.safetensors"))
    assert single == (name not in ("granitemoe", "gpt_oss"))
    source = open_model(tmp_path / "whole")
    space = source.adapter.space(source.config)
    masks = even_masks(space)
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")
    assert not pruned.needs_remote_code
    small, report = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert type(small) is type(stock) and not any(report.values())
    whole = load_model(source)
    assert difference(logits_of(stock), logits_of(whole)) <= EXACT
    assert difference(logits_of(whole, space, masks), logits_of(small)) <= EXACT
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    mask_model(whole, space, masks)
    assert torch.equal(whole.generate(IDS, **options), small.generate(IDS, **options))
    stored = sum(p.numel() for p in small.parameters()) + sum(
        buffer.numel() for key, buffer in small.named_buffers() if key in small.state_dict()
    )
    assert parameters(space, kept_counts(masks)) == stored


@pytest.mark.parametrize("name", ["gpt_oss", "deepseek_v3"])
def test_other_numbers_of_experts_per_block_need_remote_code(tmp_path, name):
    source, space = SOURCES[name], SPACES[name, "kv_group"]
    masks = even_masks(space) | {g.name: torch.ones(g.size) for g in space.of("experts")[-1:]}
    masks |= {"layers.0.heads": (torch.arange(space.of("heads")[0].size) % 2).float(), "layers.1.ffn": torch.zeros(1)}
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")
    assert pruned.needs_remote_code
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    masked = logits_of(MODELS[name], space, masks)
    assert difference(masked, logits_of(small)) <= EXACT


@pytest.mark.parametrize("name", MOE)
def test_fewer_heads_leave_all_experts_as_they_were(name):
    source, space = SOURCES[name], SPACES[name, "kv_group"]
    masks = {g.name: (torch.arange(g.size) % 2).float() for g in space.of("heads")}
    small = reshaped_source(source, space, masks)
    inside = [path for path in source.tensors if ".self_attn." not in path]
    assert all(torch.equal(small.tensors[path], source.tensors[path]) for path in inside)
    assert difference(*both((name, "kv_group"), masks)) <= EXACT
    stock = not name.startswith("olmoe")  # whose norms of queries are as wide as the hidden size
    assert (small.config["model_type"] == source.config["model_type"]) == stock


@pytest.mark.parametrize("name", ["qwen2_moe", "qwen3_moe", "deepseek_v3"])
@pytest.mark.parametrize("gone", [0, 1])
def test_layers_with_and_without_experts_are_renumbered(name, gone):
    space = SPACES[name, "kv_group"]
    masks = {g.name: torch.tensor([float(g.layer != gone)]) for g in space.of("layer")}
    small = reshaped_source(SOURCES[name], space, masks)
    assert small.config["num_hidden_layers"] == 2 and small.config["model_type"] == MOE[name]["model_type"]
    assert difference(*both((name, "kv_group"), masks)) <= EXACT


@pytest.mark.parametrize("name", MOE)
def test_packed_samples_do_not_see_each_other(name):
    model, form = MODELS[name], SOURCES[name].adapter.call_form(SOURCES[name].config)
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(**form({"input": IDS[:1], "position": position})).logits
        alone = model(**form({"input": IDS[:1, 4:], "position": position[:, 4:]})).logits
        plain = model(input_ids=IDS[:1]).logits
        form_of_plain = model(**form({"input": IDS[:1], "position": torch.arange(9)[None]})).logits
    assert difference(alone, packed[:, 4:]) <= EXACT
    assert difference(plain, form_of_plain) <= EXACT  # the window of 5 tokens included


def test_mask_files_bring_the_same_masks_back(tmp_path):
    space = SPACES["qwen2_moe", "kv_group"]
    masks = even_masks(space)
    content = fine_to_tensors(space, masks)
    assert content["experts_z"].shape == (2, 5) and content["dimff_z"].shape == (2, 80)
    write_mask_file(tmp_path / "experts.pt", {"experts_z": content["experts_z"]})
    write_mask_file(tmp_path / "dims.pt", {"dimff_z": content["dimff_z"]})
    back = read_masks(space, experts=str(tmp_path / "experts.pt"), dimff=str(tmp_path / "dims.pt"))
    assert back.keys() == masks.keys() and all(torch.equal(back[name], masks[name]) for name in masks)
    content["experts_z"][0, :4] = 0
    write_mask_file(tmp_path / "few.pt", {"experts_z": content["experts_z"]})
    with pytest.raises(UserError, match="at least 2 of every 5"):
        read_masks(space, experts=str(tmp_path / "few.pt"))
    content["dimff_z"][0, :16] = 1
    write_mask_file(tmp_path / "uneven.pt", {"dimff_z": content["dimff_z"]})
    with pytest.raises(UserError, match="the same number of each"):
        read_masks(space, dimff=str(tmp_path / "uneven.pt"))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_units_are_put_back_where_they_were(name):
    source, space = SOURCES[name], SPACES[name, "kv_group"]
    masks = even_masks(space) | {"hidden": some(space.hidden.size, 24, seed=3)}
    small = reshaped(source.tensors, space, masks)
    back = dict(restored(small.items(), source.tensors, space, masks, None))
    assert back.keys() == source.tensors.keys()
    assert all(torch.equal(back[path], weight) for path, weight in source.tensors.items())
    for path, weight in small.items():
        assert weight.shape == kept_shapes(space, kept_counts(masks))[path]


def test_counts_of_experts_are_those_by_hand():
    """Mixtral with 3 layers: width 32, 8 query and 4 key heads of 6, 5 experts of 16 dims, 2 of them per token."""
    space = SPACES["mixtral", "kv_group"]
    attention, expert, router = 32 * 6 * (8 + 8 + 4 + 4), 3 * 32 * 16, 5 * 32
    outside = 2 * 61 * 32 + 32 + 3 * 64
    assert parameters(space) == outside + 3 * (attention + 5 * expert + router)
    assert active_parameters(space) == outside + 3 * (attention + 2 * expert + router)
    scores = 4 * 100 * 8 * 6
    assert forward_flops(space, context=100) == 2 * 61 * 32 + 3 * (2 * (attention + 2 * expert + router) + scores)
    kept = kept_counts(even_masks(space))
    fewer = {"experts": 4 * (expert // 2), "active": 2 * (expert // 2)}
    assert parameters(space, kept) == outside + 3 * (attention + fewer["experts"] + 4 * 32)
    assert active_parameters(space, kept) == outside + 3 * (attention + fewer["active"] + 4 * 32)
    assert forward_flops(space, kept, context=100) == 2 * 61 * 32 + 3 * (
        2 * (attention + fewer["active"] + 4 * 32) + scores
    )


def test_the_cache_of_latents_does_not_depend_on_heads():
    space = SPACES["deepseek_v3", "kv_group"]
    assert cache_features(space) == 3 * (12 + 4) == cache_features(space, {"layers.0.heads": 1, "head_dims": 3})
    cache = MODELS["deepseek_v3"](input_ids=IDS, use_cache=True).past_key_values
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert held == IDS.numel() * cache_features(space)
