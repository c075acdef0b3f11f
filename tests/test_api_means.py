"""What removed units leave behind, in the Python API: against a stock model that is changed by hand."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import cook
from cook.base.errors import UserError
from tests.test_api import batches, gpt2, llama

Tensors = dict[str, torch.Tensor]


def by_hand(model: LlamaForCausalLM, masks: Tensors, means: Tensors) -> LlamaForCausalLM:
    """The stock model with weights of removed units set to 0, and what they add on average as a bias; without cook."""
    config = copy.deepcopy(model.config)
    config.attention_bias = config.mlp_bias = True
    changed = LlamaForCausalLM(config).eval()
    for name, value in changed.named_parameters():
        value.data = dict(model.named_parameters()).get(name, torch.zeros_like(value)).detach().clone()
    for number, layer in enumerate(changed.model.layers):
        for kind, projection in (("heads", layer.self_attn.o_proj), ("dimff", layer.mlp.down_proj)):
            name = f"layers.{number}.{kind}"
            if name in masks:
                weight, mask = projection.weight.detach().double().numpy(), masks[name].numpy()
                gone = np.repeat(mask == 0, weight.shape[1] // len(mask))
                bias = weight[:, gone] @ means[name].double().numpy()[gone]
                projection.bias.data = torch.from_numpy(bias).float()
                projection.weight.data[:, torch.from_numpy(gone)] = 0.0
    return changed


def seen_by(model: LlamaForCausalLM) -> Tensors:
    """Means of the features before each output projection, over all tokens but the last of each row."""
    seen: dict[str, list[torch.Tensor]] = {}
    copied = copy.deepcopy(model)
    for number, layer in enumerate(copied.model.layers):
        for kind, projection in (("heads", layer.self_attn.o_proj), ("dimff", layer.mlp.down_proj)):
            rows = seen.setdefault(f"layers.{number}.{kind}", [])
            projection.register_forward_pre_hook(lambda _, x, rows=rows: rows.append(x[0][:, :-1].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches():
            copied(**batch)
    return {name: torch.cat(rows).double().mean(0).float() for name, rows in seen.items()}


@pytest.mark.parametrize("keep", [{"dims": 0.5}, {"heads": 0.5}, {"params": 0.6}])
def test_the_small_model_has_the_means_of_removed_units_as_biases(keep, tmp_path):
    model = llama().train()
    means = cook.mean_inputs(model, batches())
    wanted = seen_by(model)
    assert means.keys() == wanted.keys() and model.training
    for name in means:  # fp32 features, averaged in fp64
        torch.testing.assert_close(means[name], wanted[name], rtol=1e-5, atol=1e-7)
    masks = cook.learn_masks(model.eval(), batches(), keep, steps=12, means=means)
    small = cook.reshape(model, masks, means=means)
    assert cook.verify(model, masks, small, means=means) < 1e-5
    small.save_pretrained(tmp_path)
    loaded, stock = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True), by_hand(model, masks, means)
    with torch.no_grad():
        for batch in batches():
            # fp32: the sums of the products are in another order.
            torch.testing.assert_close(loaded(**batch).logits, stock(**batch).logits, rtol=1e-5, atol=1e-5)
    # Without the means it is another model, which the comparison sees.
    assert cook.verify(model, masks, small) > 1e-4
    assert cook.verify(model, masks, cook.reshape(model, masks), means=means) > 1e-4


def test_a_budget_counts_the_biases():
    model, means = llama(), cook.mean_inputs(llama(), batches())
    masks = cook.learn_masks(model, batches(), {"params": 0.6}, steps=12, means=means)
    after = sum(p.numel() for p in cook.reshape(model, masks, means=means).parameters())
    before = sum(p.numel() for p in model.parameters())
    assert abs(after - 0.6 * before) < 0.005 * before  # all biases are 0.03 of it, a dim 0.004


@pytest.mark.parametrize("make", [llama, gpt2])
def test_each_of_several_sizes_leaves_its_own_means(make):
    model = make()
    means = cook.mean_inputs(model, batches())
    masks = cook.learn_nested_masks(model, batches(), {"dims": [15, 10, 5]}, steps=9, means=means)
    for mask in masks.values():
        assert cook.verify(model, mask, cook.reshape(model, mask, means=means), means=means) < 1e-5
    for large, small in itertools.pairwise(masks.values()):
        assert all(bool((small[name] <= large[name]).all()) for name in small)


def test_gates_learn_with_the_means_and_a_resumed_loop_has_them():
    def steps(gates: Any, model: torch.nn.Module, first: int, last: int) -> None:
        for step in range(first, last):
            gates.before_forward()
            model(**batches()[step % 4], labels=batches()[step % 4]["input_ids"]).loss.backward()
            gates.after_backward()

    values = {}
    for kind in ("plain", "means", "resumed"):
        model = llama()
        means = None if kind == "plain" else cook.mean_inputs(model, batches())
        gates = cook.attach(model, {"dims": 0.5}, steps=6, means=means)
        steps(gates, model, 0, 3)
        if kind == "resumed":
            state = gates.state_dict()
            model = llama()
            with pytest.raises(UserError, match="the means of the saved ones"):
                cook.attach(llama(), {"dims": 0.5}, steps=6).load_state_dict(state)
            gates = cook.attach(model, {"dims": 0.5}, steps=6, means={name: mean + 1 for name, mean in means.items()})
            gates.load_state_dict(state)
        steps(gates, model, 3, 6)
        values[kind] = gates.state_dict()["values"]
    assert torch.equal(values["means"], values["resumed"]) and not torch.equal(values["means"], values["plain"])


def test_a_class_without_biases_and_missing_batches_are_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 20}
    config = MistralConfig(vocab_size=61, num_key_value_heads=4, **sizes)
    with pytest.raises(UserError, match="the output projections need a bias"):
        cook.mean_inputs(MistralForCausalLM(config), batches())
    with pytest.raises(UserError, match="there are no batches"):
        cook.mean_inputs(llama(), [])
