"""Every stock family: a masked model and the reshaped one compute the same, whatever the masks."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from cook.export.pruned_folder import mask_model, prune_to_folder, reshaped_source
from cook.families.registry import by_config
from cook.families.source import load_model, open_model
from cook.families.stock_models import config_object
from cook.pruning.attach import AttachedGates
from cook.pruning.mask_set import (
    coarse_from_tensors,
    coarse_to_tensors,
    consistent,
    fine_from_tensors,
    fine_to_tensors,
)
from tests.families.tiny_models import EXACT, IDS, TinyModels, check_config, difference, logits_of
from tests.tiny_families import CAUSAL, FAMILIES, tiny_source
from tests.tiny_pruning import masks_of

TINY = TinyModels({name: tiny_source(name) for name in FAMILIES})
SOURCES, MODELS, CASES, SPACES, both = TINY.sources, TINY.models, TINY.cases, TINY.spaces, TINY.both
HOLD_HEADS = ("llama", "llama, tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
BY_QUERY = [case for case in CASES if case[1] == "query_head"]
BY_GROUP = [case for case in CASES if case[1] == "kv_group"]
FINEST = [TINY.case(name) for name in FAMILIES]


def uniform_masks(space, layers=(0, 2)):
    """The other layers go whole; these keep half of every section, each another half."""
    masks = {g.name: torch.tensor([float(g.layer in layers)]) for g in space.of("layer")}
    for group in space.groups:
        if group.kind in ("heads", "dimff") and group.layer in layers:
            half = (torch.arange(group.section_size) % 2 == group.layer % 2).float()
            masks[group.name] = half.repeat(group.sections)
    return masks


def ragged_masks(space):
    """A layer without attention, one without units of heads, one without units of dims, heads of different number."""
    sizes = {(g.kind, g.layer): g.size for g in space.groups}
    return {
        "layers.0.att": torch.zeros(1),
        "layers.1.heads": torch.zeros(sizes["heads", 1]),
        "layers.2.dimff": torch.zeros(sizes["dimff", 2]),
        "layers.0.dimff": (torch.arange(sizes["dimff", 0]) % 3 > 0).float(),
    }


def query_masks(space):
    """Other numbers of query heads in the key-value groups of a block, none in some; all blocks but one are there."""
    masks = ragged_masks(space) | {"layers.0.att": torch.ones(1)}
    rows = ("00111010", "11101101", "00110100")  # 4 groups of 2
    masks |= {f"layers.{n}.heads": torch.tensor([float(unit) for unit in row]) for n, row in enumerate(rows)}
    return consistent(space, masks)


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=6, deadline=None)
@given(data=st.data())
def test_masked_and_reshaped_are_equal_and_the_config_describes_the_weights(case, data):
    masks = data.draw(masks_of(SPACES[case]))
    padding = torch.ones_like(IDS)
    padding[1, : data.draw(st.integers(0, 4))] = 0
    masked, small = both(case, masks, attention_mask=padding)
    assert difference(masked, small, padding.bool()) <= EXACT
    check_config(SOURCES[case[0]], SPACES[case], masks, case[1])


@pytest.mark.parametrize(
    "make, case",
    [(make, case) for make in (uniform_masks, ragged_masks) for case in BY_GROUP if case[0] in CAUSAL]
    + [(query_masks, case) for case in BY_QUERY],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_the_cache_and_generation(make, case):
    model, space = MODELS[case[0]], SPACES[case]
    masks = make(space)
    small = load_model(reshaped_source(SOURCES[case[0]], space, masks))
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.tensor([[0] * 2 + [1] * 7, [1] * 9])}
    attached = mask_model(model, space, masks)
    masked = model.generate(IDS, **options)
    attached.remove()
    assert torch.equal(masked, small.generate(IDS, **options))
    assert torch.equal(masked, small.generate(IDS, **options, use_cache=False))
    assert torch.equal(masked, small.generate(IDS, **options, cache_implementation="static"))
    assert masked.shape == (2, 17)


@pytest.mark.parametrize("case", BY_QUERY, ids=str)
def test_query_heads_are_taken_out_of_their_groups(case):
    """No weight is stored for what is gone, and the cache has the key-value heads that are read."""
    source, space = SOURCES[case[0]], SPACES[case]
    masks = query_masks(space)
    small = load_model(reshaped_source(source, space, masks))
    numbers = [[int(part.sum()) for part in masks[g.name].split(g.spans)] for g in space.of("heads")]
    assert [len(set(layer) - {0}) for layer in numbers] == [2, 2, 2] and 0 in numbers[0] and 0 in numbers[2]
    cache = small(input_ids=IDS, use_cache=True).past_key_values
    for layer, per_group in enumerate(numbers):
        attention, head = small.model.layers[layer].self_attn, source.config["head_dim"]
        assert attention.o_proj.weight.shape[1] == head * sum(per_group)
        keys = sum(number > 0 for number in per_group)
        assert cache.layers[layer].keys.shape[1] == keys
        inputs = [p.weight.shape[0] for name, p in attention.named_children() if name in ("q_proj", "k_proj", "v_proj")]
        fused = [p.weight.shape[0] for name, p in attention.named_children() if name == "qkv_proj"]
        assert sum(inputs + fused) == head * (sum(per_group) + 2 * keys)
    # A gate on the smaller model acts on the heads that it has.
    again = source.adapter.space(reshaped_source(source, space, masks).config, case[1])
    heads, keys = again.of("heads")[1], again.of("keys")[1]
    assert heads.spans == tuple(n for n in numbers[1] if n) and keys.size == len(heads.spans)
    one = torch.zeros(heads.size)
    one[-1] = 1
    z = torch.tensor([0.0] * (keys.size - 1) + [1])
    z[0] = 1
    gates = ({heads.name: one}, {heads.name: one, keys.name: z}, {keys.name: z}, {})
    outputs = [logits_of(small, again, masks) for masks in gates]
    assert torch.equal(outputs[0], outputs[1])
    assert difference(outputs[0], outputs[2]) > 1e-3 < difference(outputs[2], outputs[3])


@pytest.mark.parametrize(
    "make, case",
    [(ragged_masks, case) for case in BY_GROUP] + [(query_masks, case) for case in BY_QUERY],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_pruning_in_two_steps_is_exact(make, case):
    source, space = SOURCES[case[0]], SPACES[case]
    first = make(space)
    once = reshaped_source(source, space, first)
    then = once.adapter.space(once.config, case[1])
    masks = {g.name: (torch.arange(g.size) % g.section_size > 0).float() for g in then.of("dimff")}
    masks |= {g.name: torch.zeros(1) for g in then.of("layer", "att")[-1:]}
    for group in then.of("heads")[:2]:
        masks[group.name] = (torch.arange(group.size) % 3 != 1).float()
    masks = consistent(then, masks)
    model, small = load_model(once), load_model(reshaped_source(once, then, masks))
    assert difference(logits_of(model, then, masks), logits_of(small)) <= EXACT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_reach_every_gate(case):
    model, space = MODELS[case[0]], SPACES[case]
    z = {group.name: torch.full((group.size,), 0.7, requires_grad=True) for group in space.groups}
    attached = AttachedGates(model, space.groups, {})
    attached.set(z)
    model(input_ids=IDS, labels=IDS).loss.backward()
    attached.remove()
    assert [name for name, gate in z.items() if gate.grad is None or not gate.grad.ne(0).all()] == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_masks_change_the_model(case):
    model, space = MODELS[case[0]], SPACES[case]
    assert difference(logits_of(model), logits_of(model, space, uniform_masks(space))) > 0.01


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mask_files_bring_the_same_masks_back(case):
    space = SPACES[case]
    masks = uniform_masks(space)
    blocks = coarse_from_tensors(space, coarse_to_tensors(space, masks), "x")
    content = fine_to_tensors(space, masks)
    heads = next(g for g in space.groups if g.kind == "heads")
    assert content["heads_z"].shape == (2, heads.size * heads.members)
    back = blocks | {
        name: mask
        for kind in ("heads", "dimff")
        for name, mask in fine_from_tensors(space, blocks, content, kind, "x").items()
    }
    assert back.keys() == masks.keys() and all(torch.equal(back[name], masks[name]) for name in masks)


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_samples_do_not_see_each_other(name):
    source, model = SOURCES[name], MODELS[name]
    sizes = [4, 6]
    batch = {
        "input": torch.cat([IDS[:1, : sum(sizes) - 1], torch.tensor([[7, 0, 0]])], 1),
        "position": torch.tensor([[*range(4), *range(6), 0, 0]]),
    }
    with torch.no_grad():
        packed = model(**source.adapter.inputs(batch)).logits
        for begin, size in ((0, 4), (4, 6)):
            alone = model(input_ids=batch["input"][:, begin : begin + size]).logits
            assert difference(alone, packed[:, begin : begin + size]) <= EXACT


def test_exports_load_where_cook_is_not(tmp_path):
    """With the remote code that they bring along; those of stock classes bring none."""
    expected = {}
    for name, source in SOURCES.items():
        space, folder = SPACES[name, "kv_group"], tmp_path / name.replace(", ", "_")
        masks = ragged_masks(space)
        assert prune_to_folder(source, space, masks, folder).needs_remote_code
        attached = mask_model(MODELS[name], space, masks)
        generated = MODELS[name].generate(IDS, max_new_tokens=4, do_sample=False) if name in CAUSAL else None
        attached.remove()
        logits = logits_of(MODELS[name], space, masks)
        expected[str(folder)] = (logits, generated)
        assert difference(logits, logits_of(load_model(open_model(folder)))) <= EXACT
    torch.save((IDS, expected), tmp_path / "expected.pt")
    script = """
        import importlib.util, sys, torch
        assert importlib.util.find_spec("cook") is None
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
        ids, expected = torch.load(sys.argv[1])
        for folder, (logits, generated) in expected.items():
            auto_class = AutoModelForMaskedLM if generated is None else AutoModelForCausalLM
            model, report = auto_class.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
            assert not any(report.values()), report
            with torch.no_grad():
                assert (model(input_ids=ids).logits - logits).abs().max() <= 1e-5 * logits.abs().max(), folder
            if generated is not None:
                assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated), folder
            model.save_pretrained(folder + "_again")
            again = auto_class.from_pretrained(folder + "_again", trust_remote_code=True)
            assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits), folder
        print("same")
    """
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", textwrap.dedent(script), str(tmp_path / "expected.pt")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0 and "same" in done.stdout, done.stderr


def test_whole_layers_are_renumbered_with_their_types():
    source, space = SOURCES["qwen2"], SPACES["qwen2", "kv_group"]
    small = reshaped_source(source, space, uniform_masks(space, layers=(1, 2))).config
    assert small["model_type"] == "qwen2" and small["num_hidden_layers"] == 2
    assert small["layer_types"] == source.config["layer_types"][1:] and small["max_window_layers"] == 1
    assert config_object(small).head_dim == 6 and by_config(small) is source.adapter


@pytest.mark.parametrize("name", FAMILIES)
def test_what_the_stock_class_holds_needs_no_remote_code(tmp_path, name):
    """Fewer dims in all layers; fewer heads and layers too, where the class has these sizes in its config."""
    source, space = SOURCES[name], SPACES[name, "kv_group"]
    masks = uniform_masks(space)
    if name not in HOLD_HEADS:
        masks = {g.name: (torch.arange(g.size) % 2 == g.layer % 2).float() for g in space.of("dimff")}
    prune_to_folder(source, space, masks, tmp_path / "small")
    auto_class = AutoModelForCausalLM if name in CAUSAL else AutoModelForMaskedLM
    model, report = auto_class.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(report.values()) and not [p for p in (tmp_path / "small").iterdir() if p.suffix == ".py"]
    assert (model.config.model_type, *model.config.architectures) == (source.config["model_type"], type(model).__name__)
    assert difference(logits_of(MODELS[name], space, masks), logits_of(model)) <= EXACT


@pytest.mark.parametrize("name", FAMILIES)
def test_whole_layers_are_left_out_where_they_are_numbers_only(name):
    source, space = SOURCES[name], SPACES[name, "kv_group"]
    masks = {g.name: torch.tensor([float(g.layer != 1)]) for g in space.of("layer")}
    masks |= {g.name: (torch.arange(g.size) % 2 == 0).float() for g in space.of("dimff")}
    small = reshaped_source(source, space, masks)
    # Norms on the residual stream stay, and so does a layer whose number is a part of its arithmetic.
    kept = name in ("gpt2, scores by layer", "opt, norms behind", "bert", "roberta")
    assert len(small.adapter.space(small.config).of("layer", "att")) == 2
    assert small.adapter.space(small.config).num_layers == (3 if kept else 2)
    assert (small.adapter.modeling(small.config) is None) == (not kept)
    assert difference(*both((name, "kv_group"), masks)) <= EXACT


@pytest.mark.parametrize("case", FINEST, ids=str)
@pytest.mark.parametrize("kind", ["heads", "dimff"])
def test_the_last_bias_stays_without_units_and_goes_with_the_block(case, kind):
    """Against a model in which the last product's bias is taken out by hand."""
    source, space = SOURCES[case[0]], SPACES[case]
    site = "att" if kind == "heads" else "ffn"
    without_units = {g.name: torch.zeros(g.size) for g in space.of(kind)}
    without_blocks = {g.name: torch.zeros(1) for g in space.of("layer", site)}
    residues = [path for g in space.of("layer", site) for path in g.residue]
    _, units_gone = both(case, without_units)
    _, blocks_gone = both(case, without_blocks)
    unbiased = replace(source, tensors={n: t * (n not in residues) for n, t in source.tensors.items()})
    small = load_model(reshaped_source(unbiased, space, without_units))
    assert difference(blocks_gone, logits_of(small)) <= EXACT
    if residues:
        assert difference(units_gone, blocks_gone) > 1e-3
    else:
        assert difference(units_gone, blocks_gone) <= EXACT
