"""What removed units add on average, kept as a bias: against a product written out in NumPy, for every family."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cook.families.registry import by_config
from cook.families.source import load_model, open_model, with_biases
from cook.pruning.attach import AttachedGates
from cook.pruning.compensation import MeanInputs, compensable, with_bias
from cook.pruning.mask_set import consistent
from cook.pruning.units import PruningSpace
from tests.tiny_families import FAMILIES, MORE, tiny_config, tiny_source

IDS = torch.arange(40).view(2, 20) % 61
WITH_BIAS = ("llama", "gpt2", "gpt_neox", "opt", "bert", "phi", "starcoder2", "granite", "falcon, one key", "electra")


def drawn(space: PruningSpace, seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Random masks and means of the groups whose projections have a bias."""
    random, masks, means = torch.Generator().manual_seed(seed), {}, {}
    for group in compensable(space, space.groups):
        masks[group.name] = (torch.rand(group.size, generator=random) < 0.5).float()
        features = space.shapes[group.slices[-1].path][group.slices[-1].dim]
        means[group.name] = torch.randn(features, generator=random)
    return masks, means


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_compensated_projection_computes_w_of_mixed_features(name):
    source = tiny_source(name)
    space = source.adapter.space(source.config)
    model, (masks, means) = load_model(source), drawn(space)
    attached = AttachedGates(model, space.groups, {})
    attached.compensate(means)
    for group in compensable(space, space.groups):
        module = model.get_submodule(group.gate.module)
        weight, bias = (module.get_parameter(key).detach().double().numpy() for key in ("weight", "bias"))
        weight = weight.T if name == "gpt2" else weight
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1))
        attached.set(masks)
        y = module(x).detach().numpy()
        each = weight.shape[1] // group.size
        z = np.repeat(masks[group.name].double().numpy(), each)
        wanted = (z * x.double().numpy() + (1 - z) * means[group.name].double().numpy()) @ weight.T + bias
        np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5)  # fp32 sums of 20 to 48 products
        with attached.opened(fixed=True):
            np.testing.assert_allclose(module(x).detach().numpy(), x.double().numpy() @ weight.T + bias, atol=1e-5)


@pytest.mark.parametrize("name", WITH_BIAS)
def test_the_bias_replaces_the_means_of_removed_units(name):
    source = tiny_source(name)
    space = source.adapter.space(source.config)
    (masks, means), model = drawn(space), load_model(source)
    assert masks and not all(mask.all() for mask in masks.values())
    attached = AttachedGates(model, space.groups, {})
    attached.set(masks)
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        attached.compensate(means)
        compensated = model(input_ids=IDS).logits
        changed = dict(with_bias(model.state_dict().items(), space, masks, means))
        model.load_state_dict(changed)
        attached.compensate({})
        folded = model(input_ids=IDS).logits
    largest = compensated.abs().max()
    assert (plain - compensated).abs().max() > 1e-2 * largest, "the means make no difference"
    # The same products, summed in another order in fp32.
    assert (folded - compensated).abs().max() <= 1e-5 * largest


@pytest.mark.parametrize("kinds", [("heads",), ("keys",), ("layer", "heads", "keys", "dimff"), ("head_dims", "heads")])
def test_all_gates_before_a_projection_leave_means(kinds):
    source = tiny_source("llama")
    space = source.adapter.space(source.config, "query_head")
    random, model = torch.Generator().manual_seed(2), load_model(source)
    masks = {g.name: (torch.rand(g.size, generator=random) < 0.6).float() for g in space.every if g.kind in kinds}
    masks, (_, means) = consistent(space, masks), drawn(space)
    attached = AttachedGates(model, space.every, {})
    attached.compensate(means)
    attached.set(masks)
    with torch.no_grad():
        compensated = model(input_ids=IDS).logits
        model.load_state_dict(dict(with_bias(model.state_dict().items(), space, masks, means)))
        attached.compensate({})
        folded = model(input_ids=IDS).logits
    assert (folded - compensated).abs().max() <= 1e-5 * compensated.abs().max()  # summed in another order in fp32


def test_biases_may_come_before_their_weights():
    source = tiny_source("gpt2")
    space = source.adapter.space(source.config)
    masks, means = drawn(space)
    items = list(source.tensors.items())
    one, other = (dict(with_bias(each, space, masks, means)) for each in (items, items[::-1]))
    assert one.keys() == other.keys() == source.tensors.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(AssertionError, match="no weight or no bias"):
        list(with_bias([item for item in items if not item[0].endswith("c_proj.bias")], space, masks, means))


def test_gradients_of_gates_contain_the_means():
    source = tiny_source("gpt2")  # no part of it computes in fp32
    space = source.adapter.space(source.config)
    model, (masks, means) = load_model(source, torch.float64), drawn(space)
    attached = AttachedGates(model, space.groups, {})
    attached.compensate({name: mean.double() for name, mean in means.items()})
    z = {name: torch.rand(len(mask), dtype=torch.float64) for name, mask in masks.items()}
    name = "layers.1.dimff"

    def loss(value: torch.Tensor) -> torch.Tensor:
        attached.set(z | {name: value})
        return model(input_ids=IDS).logits.square().mean()

    leaf = z[name].clone().requires_grad_()
    loss(leaf).backward()
    step = torch.zeros_like(leaf)
    step[3] = 1e-6
    with torch.no_grad():
        difference = (loss(z[name] + step) - loss(z[name] - step)) / 2e-6
    assert leaf.grad is not None and float(leaf.grad[3]) == pytest.approx(float(difference), rel=1e-6)


def test_means_are_those_of_the_counted_tokens_alone():
    source = tiny_source("opt")  # its FFN gets all tokens of all rows in one dimension
    space = source.adapter.space(source.config)
    model = load_model(source)
    groups, seen = compensable(space, space.groups), {}
    for group in groups:
        module = model.get_submodule(group.gate.module)
        module.register_forward_pre_hook(
            lambda _m, inputs, name=group.name: seen.setdefault(name, []).append(inputs[0].flatten(0, -2).numpy())
        )
    means = MeanInputs(model, groups)
    counted = [torch.tensor([0, 5, 39]), torch.tensor([7])]
    with torch.no_grad():
        for positions, ids in zip(counted, (IDS, IDS.flip(0)), strict=True):
            means.at(positions)
            model(input_ids=ids)
    found = means.means()
    for group in groups:
        rows = np.concatenate([x[p.numpy()] for x, p in zip(seen[group.name], counted, strict=True)])
        np.testing.assert_allclose(found[group.name].numpy(), rows.astype(np.float64).mean(0), rtol=1e-6, atol=1e-7)
    means.remove()


@pytest.mark.parametrize("name", ["llama, tied", "granite", "gemma", "seed_oss", "olmo", "starcoder2", "qwen3"])
def test_biases_of_zero_are_added_where_the_class_has_a_setting(name):
    fields = dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "attention_out_bias"), False)
    config = tiny_config(name)
    source = tiny_source(name, **{key: value for key, value in fields.items() if key in config})
    wide = with_biases(source)
    model, wider = load_model(source), load_model(wide)
    added = [path for path in wider.state_dict() if path not in model.state_dict()]
    assert added and all(path.endswith(".bias") for path in added)
    space = wide.adapter.space(wide.config)
    kinds = {group.kind for group in compensable(space, space.groups)}
    assert kinds == ({"heads"} if name in ("gemma", "olmo", "qwen3") else {"heads", "dimff"})
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, wider(input_ids=IDS).logits)
    assert with_biases(wide) is wide


@pytest.mark.parametrize("name", [*FAMILIES, *MORE])
def test_any_family_is_widened_or_left_alone(name):
    source = tiny_source(name)
    wide = with_biases(source)
    shapes = by_config(wide.config).space(wide.config).shapes
    assert source.tensors.keys() <= wide.tensors.keys() and wide.tensors.keys() == set(shapes) | source.tensors.keys()
    assert all(not wide.tensors[path].any() for path in wide.tensors.keys() - source.tensors.keys())


def test_a_saved_llama_gets_biases_that_transformers_loads(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path / "model")
    wide = with_biases(open_model(tmp_path / "model"))
    assert wide.config["attention_bias"] is wide.config["mlp_bias"] is True
    model = AutoModelForCausalLM.from_config(LlamaConfig(**wide.config))
    report = model.load_state_dict(dict(wide.tensors), strict=False)
    assert not report.unexpected_keys and not [key for key in report.missing_keys if key != "lm_head.weight"]
    with torch.no_grad():
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        assert torch.equal(whole(input_ids=IDS).logits, model(input_ids=IDS).logits)
