"""Every stock family: a masked model and the reshaped one compute the same, whatever the masks."""

from __future__ import annotations

import json
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
from cook.families.stock_models import config_object, weight_shapes
from cook.pruning.attach import AttachedGates
from cook.pruning.counts import kept_shapes, parameters
from cook.pruning.mask_set import (
    coarse_from_tensors,
    coarse_to_tensors,
    consistent,
    fine_from_tensors,
    fine_to_tensors,
    kept_counts,
)
from tests.tiny_families import CAUSAL, FAMILIES, tiny_source
from tests.tiny_pruning import masks_of

EXACT = 1e-5
"""Relative, fp32: rounding of sums taken in another order."""
SOURCES = {name: tiny_source(name) for name in FAMILIES}
MODELS = {name: load_model(source) for name, source in SOURCES.items()}
CASES = [(n, unit) for n, s in SOURCES.items() for unit in s.adapter.head_units(s.config)]
SPACES = {(name, unit): SOURCES[name].adapter.space(SOURCES[name].config, unit) for name, unit in CASES}
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


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


def difference(a, b, real=None):
    a, b = (a, b) if real is None else (a[real], b[real])
    assert a.isfinite().all()
    return float((a - b).abs().max() / a.abs().max())


@torch.no_grad()
def both(case, masks, **inputs):
    """Logits of the masked and of the reshaped model."""
    model, space = MODELS[case[0]], SPACES[case]
    small = load_model(reshaped_source(SOURCES[case[0]], space, masks))
    attached = mask_model(model, space, masks)
    try:
        return model(**inputs).logits, small(**inputs).logits
    finally:
        attached.remove()


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_masked_and_reshaped_are_equal(case, data):
    space = SPACES[case]
    masks = data.draw(masks_of(space))
    padding = torch.ones_like(IDS)
    padding[1, : data.draw(st.integers(0, 4))] = 0
    masked, small = both(case, masks, input_ids=IDS, attention_mask=padding)
    assert difference(masked, small, padding.bool()) <= EXACT


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_the_config_describes_the_weights(case, data):
    source, space = SOURCES[case[0]], SPACES[case]
    masks = data.draw(masks_of(space))
    small = reshaped_source(source, space, masks)
    with torch.device("meta"):
        fresh = source.adapter.build(small.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in small.tensors.items()}
    assert weight_shapes(fresh) == shapes
    counts = kept_counts(masks)
    assert sorted(shapes.values()) == sorted(kept_shapes(space, counts).values())
    assert parameters(space, counts) == sum(p.numel() for p in fresh.parameters())
    # What was pruned can be pruned again, and describes itself the same way.
    again = small.adapter.space(small.config, case[1])
    assert dict(again.shapes) == shapes
    assert reshaped_source(small, again, {}).config == small.config


@pytest.mark.parametrize(
    "make, case",
    [(make, case) for make in (uniform_masks, ragged_masks) for case in CASES if case[0] in CAUSAL]
    + [(query_masks, case) for case in CASES if case[1] == "query_head"],
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


@pytest.mark.parametrize("case", [case for case in CASES if case[1] == "query_head"], ids=str)
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
    outputs = []
    for gates in ({heads.name: one}, {heads.name: one, keys.name: z}, {keys.name: z}, {}):
        attached = mask_model(small, again, gates)
        outputs.append(small(input_ids=IDS).logits.detach())
        attached.remove()
    assert torch.equal(outputs[0], outputs[1])
    assert difference(outputs[0], outputs[2]) > 1e-3 < difference(outputs[2], outputs[3])


@pytest.mark.parametrize(
    "make, case",
    [(ragged_masks, case) for case in CASES] + [(query_masks, case) for case in CASES if case[1] == "query_head"],
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
    mask_model(model, then, masks)
    with torch.no_grad():
        assert difference(model(input_ids=IDS).logits, small(input_ids=IDS).logits) <= EXACT


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
    masks = uniform_masks(SPACES[case])
    assert difference(both(case, {}, input_ids=IDS)[0], both(case, masks, input_ids=IDS)[0]) > 0.01


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
    """Stock transformers loads the uniform results without remote code, and the ragged ones with it."""
    expected = {}
    for name, source in SOURCES.items():
        space = SPACES[name, "kv_group"]
        for kind, masks in (("stock", uniform_masks(space)), ("ragged", ragged_masks(space))):
            folder = tmp_path / f"{name.replace(', ', '_')}_{kind}"
            prune_to_folder(source, space, masks, folder)
            is_stock = "auto_map" not in json.loads((folder / "config.json").read_text())
            attached = mask_model(MODELS[name], space, masks)
            with torch.no_grad():
                logits = MODELS[name](input_ids=IDS).logits
            generated = MODELS[name].generate(IDS, max_new_tokens=4, do_sample=False) if name in CAUSAL else None
            attached.remove()
            expected[str(folder)] = (is_stock, logits, generated)
            assert difference(logits, load_model(open_model(folder))(input_ids=IDS).logits.detach()) <= EXACT
            if is_stock:
                config = json.loads((folder / "config.json").read_text())
                assert config["model_type"] == source.config["model_type"] and config["architectures"]
    assert any(is_stock for is_stock, *_ in expected.values())
    torch.save((IDS, expected), tmp_path / "expected.pt")
    script = """
        import importlib.util, sys, torch
        assert importlib.util.find_spec("cook") is None
        from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
        ids, expected = torch.load(sys.argv[1])
        for folder, (is_stock, logits, generated) in expected.items():
            auto_class = AutoModelForMaskedLM if generated is None else AutoModelForCausalLM
            model, report = auto_class.from_pretrained(
                folder, trust_remote_code=None if is_stock else True, output_loading_info=True)
            assert not any(report.values()), report
            with torch.no_grad():
                assert (model(input_ids=ids).logits - logits).abs().max() <= 1e-5 * logits.abs().max(), folder
            if generated is not None:
                assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False), generated), folder
            if not is_stock:
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
def test_fewer_dims_in_all_layers_need_no_remote_code(tmp_path, name):
    source, space = SOURCES[name], SPACES[name, "kv_group"]
    masks = {g.name: (torch.arange(g.size) % 2 == g.layer % 2).float() for g in space.of("dimff")}
    prune_to_folder(source, space, masks, tmp_path / "small")
    auto_class = AutoModelForCausalLM if name in CAUSAL else AutoModelForMaskedLM
    model, report = auto_class.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(report.values()) and not [p for p in (tmp_path / "small").iterdir() if p.suffix == ".py"]
    attached = mask_model(MODELS[name], space, masks)
    with torch.no_grad():
        assert difference(MODELS[name](input_ids=IDS).logits, model(input_ids=IDS).logits) <= EXACT
    attached.remove()


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
    masked, reshaped = both((name, "kv_group"), masks, input_ids=IDS)
    assert difference(masked, reshaped) <= EXACT


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("kind", ["heads", "dimff"])
def test_the_last_bias_stays_without_units_and_goes_with_the_block(case, kind):
    """Against a model in which the last product's bias is taken out by hand."""
    source, space = SOURCES[case[0]], SPACES[case]
    site = "att" if kind == "heads" else "ffn"
    without_units = {g.name: torch.zeros(g.size) for g in space.of(kind)}
    without_blocks = {g.name: torch.zeros(1) for g in space.of("layer", site)}
    residues = [path for g in space.of("layer", site) for path in g.residue]
    _, units_gone = both(case, without_units, input_ids=IDS)
    _, blocks_gone = both(case, without_blocks, input_ids=IDS)
    unbiased = replace(source, tensors={n: t * (n not in residues) for n, t in source.tensors.items()})
    small = load_model(reshaped_source(unbiased, space, without_units))
    with torch.no_grad():
        assert difference(blocks_gone, small(input_ids=IDS).logits) <= EXACT
    if residues:
        assert difference(units_gone, blocks_gone) > 1e-3
    else:
        assert difference(units_gone, blocks_gone) <= EXACT
