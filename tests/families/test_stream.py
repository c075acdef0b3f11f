"""Fewer hidden dims: the masked and the reshaped model are equal, and so is a stock model planted in a larger one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from cook.export.pruned_folder import mask_model, prune_to_folder, reshaped_source
from cook.families.source import load_model, open_model
from cook.families.stock_models import weight_shapes
from cook.families.stream import hidden_dims
from cook.families.tables import LLAMA
from cook.pruning.attach import AttachedGates
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
from tests.tiny_families import CAUSAL, FAMILIES, tiny_config, tiny_source
from tests.tiny_pruning import masks_of

BERT = tiny_source("bert", architectures=["BertForSequenceClassification"])
TINY = TinyModels({name: tiny_source(name) for name in FAMILIES} | {"bert, classes": BERT}, every_unit=False)
SOURCES, MODELS, CASES, SPACES, both = TINY.sources, TINY.models, TINY.cases, TINY.spaces, TINY.both
STOCK = ("llama", "llama, tied", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")


@pytest.mark.parametrize("case", CASES, ids=str)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_masked_and_reshaped_are_equal(case, data):
    space = SPACES[case]
    masks = data.draw(masks_of(space))
    # A norm over very few dims divides rounding by almost nothing.
    masks["hidden"] = some(32, data.draw(st.integers(8, 32)), data.draw(st.integers(0, 99)))
    padding = torch.ones_like(IDS)
    padding[1, : data.draw(st.integers(0, 4))] = 0
    masked, small = both(case, masks, attention_mask=padding)
    real = padding.bool() if masked.ndim == 3 else None
    assert difference(masked, small, real) <= EXACT


@pytest.mark.parametrize("case", CASES[:1] + CASES[-1:], ids=str)
def test_masks_of_hidden_dims_change_the_model(case):
    model, masks = MODELS[case[0]], {"hidden": some(32, 20, 1)}
    assert difference(logits_of(model), logits_of(model, SPACES[case], masks)) > 0.01


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_config_describes_the_weights(case):
    source, space = SOURCES[case[0]], SPACES[case]
    masks = {
        "hidden": some(32, 20, 2),
        "layers.1.dimff": (torch.arange(20) % 2).float(),
        "layers.0.att": torch.zeros(1),
    }
    small = check_config(source, space, masks, case[1])
    # No weight on the stream was forgotten: none has the old size.
    again = small.adapter.space(small.config, case[1])
    assert again.hidden.size == 20
    # What was pruned can be pruned again.
    twice = {"hidden": some(20, 12, 3)}
    model, smaller = load_model(small), load_model(reshaped_source(small, again, twice))
    assert difference(logits_of(model, again, twice), logits_of(smaller)) <= EXACT


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in CAUSAL], ids=str)
def test_the_cache_and_generation(case):
    model, space = MODELS[case[0]], SPACES[case]
    masks = {
        "hidden": some(32, 20, 4),
        "layers.0.att": torch.zeros(1),
        "layers.2.dimff": (torch.arange(20) % 3 > 0).float(),
    }
    small = load_model(reshaped_source(SOURCES[case[0]], space, masks))
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.tensor([[0] * 2 + [1] * 7, [1] * 9])}
    attached = mask_model(model, space, masks)
    masked = model.generate(IDS, **options)
    attached.remove()
    assert torch.equal(masked, small.generate(IDS, **options))
    assert torch.equal(masked, small.generate(IDS, **options, use_cache=False))


@pytest.mark.parametrize("name", STOCK)
def test_a_planted_stock_model_comes_out(name):
    """A model that transformers builds with 24 hidden dims, as a part of one with 32 whose other weights are drawn."""
    small = tiny_source(name, seed=7, hidden_size=24)
    big = tiny_source(name, seed=8)
    mask = some(32, 24, 5)
    kept = mask.nonzero().flatten()
    tensors = {}
    for path, weight in big.tensors.items():
        planted = small.tensors[path].detach().clone()
        if name.startswith("gemma") and path in ("model.embed_tokens.weight", "model.norm.weight"):
            # The embedding is multiplied by √32 in one model and by √24 in the other, and 1 is added to the norm.
            ratio = (24 / 32) ** 0.5
            planted = planted * ratio if "embed" in path else (planted + 1) / ratio - 1
        dims = [kept if new < old else torch.arange(old) for new, old in zip(planted.shape, weight.shape, strict=True)]
        tensors[path] = weight.detach().clone()
        tensors[path][torch.meshgrid(*dims, indexing="ij")] = planted
    space = big.adapter.space(big.config, "kv_group")
    whole = type(big)(**vars(big) | {"tensors": tensors})
    found = reshaped_source(whole, space, {"hidden": mask})
    assert found.config["hidden_size"] == 24 and found.config["model_type"] == small.config["model_type"]
    assert found.config.keys() - {"architectures"} == small.config.keys() - {"architectures"}
    for path, weight in found.tensors.items():
        torch.testing.assert_close(weight, small.tensors[path].detach(), rtol=1e-6, atol=1e-6)
    model = load_model(whole)
    assert difference(logits_of(load_model(small)), logits_of(model, space, {"hidden": mask})) <= EXACT


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_of_soft_gates_is_that_of_finite_differences(case):
    model, space = load_model(SOURCES[case[0]], torch.float64), SPACES[case]
    compute_norms_in_fp64(model)
    model.config._attn_implementation = "sdpa"  # Gemma 2's own computes softmax in fp32
    for module in model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
    generator = torch.Generator().manual_seed(0)
    z = (0.3 + 0.7 * torch.rand(32, dtype=torch.float64, generator=generator)).requires_grad_()
    attached = AttachedGates(model, [space.hidden], {})

    def loss(values):
        attached.set({"hidden": values})
        return model(input_ids=IDS).logits.square().mean()

    loss(z).backward()
    assert z.grad.ne(0).all()
    with torch.no_grad():
        for unit in (0, 13, 31):
            step = torch.zeros(32, dtype=torch.float64)
            step[unit] = 1e-6
            measured = (loss(z + step) - loss(z - step)) / 2e-6
            # The differences lose about half the digits of fp64.
            assert float(z.grad[unit]) == pytest.approx(float(measured), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("name, kept", [("llama, tied", 24), ("gemma2", 24), ("gemma2", 20), ("gpt2", 20)])
def test_exports_load_with_transformers(tmp_path, name, kept):
    # Llama's and Gemma's configs want a multiple of the number of heads.
    is_stock = name in STOCK and kept == 24
    case = TINY.case(name)
    source, space = SOURCES[name], SPACES[case]
    masks = {"hidden": some(32, kept, 6)}
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")
    assert pruned.needs_remote_code != is_stock
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small", trust_remote_code=not is_stock)
    masked, small = both(case, masks)
    assert difference(masked, logits_of(model)) <= EXACT
    assert difference(small, logits_of(load_model(open_model(tmp_path / "small")))) <= EXACT


def test_a_stock_class_holds_a_hidden_size_that_its_heads_fill():
    source = SOURCES["gpt2"]
    space = SPACES["gpt2", "kv_group"]
    masks = {"hidden": some(32, 24)} | {f"layers.{n}.heads": torch.tensor([1.0, 0, 1, 1]) for n in range(3)}
    small = reshaped_source(source, space, masks)
    assert (small.config["model_type"], small.config["n_embd"], small.config["n_head"]) == ("gpt2", 24, 3)
    assert difference(*both(("gpt2", "kv_group"), masks)) <= EXACT


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model, "norm", torch.nn.GroupNorm(1, 32, affine=False)),
        lambda model: setattr(model.model.layers[1], "extra", torch.nn.Linear(32, 5)),
        lambda model: setattr(model.model.layers[1], "scale", torch.nn.Parameter(torch.ones(32))),
    ],
)
def test_a_model_with_anything_else_on_the_stream_keeps_its_hidden_size(change):
    model = MODELS["llama, tied"]
    model = type(model)(model.config)
    assert hidden_dims(LLAMA, model.config, model, weight_shapes(model)).size == 32
    change(model)
    assert hidden_dims(LLAMA, model.config, model, weight_shapes(model)) is None


def test_the_hidden_size_of_an_encoder_without_a_head_stays():
    config = tiny_config("bert", architectures=["BertModel"])
    source = SOURCES["bert"]
    assert source.adapter.space(config).hidden is None


def test_a_model_that_lost_all_its_blocks_is_read():
    """The size of its stream is not in the config."""
    source, space = SOURCES["gpt2"], SPACES["gpt2", "kv_group"]
    masks = {"hidden": some(32, 8)} | {group.name: torch.zeros(1) for group in space.of("layer")}
    small = reshaped_source(source, space, masks)
    again = small.adapter.space(small.config)
    assert again.hidden is None and reshaped_source(small, again, {}).config == small.config
