"""The Python API on stock models, against stock transformers and the product's own training step."""

from __future__ import annotations

import copy
import itertools
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

import cook
from cook.base.errors import UserError
from tests.recipe.tiny_run import own_environment
from tests.warm import interpreter

ATT, FFN = 2 * 32 * 48 + 2 * 32 * 24 + 32, 3 * 32 * 20 + 32
"""Parameters of a block of `llama`, with its norm."""
LENGTH = 16
"""Tokens per row."""
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def llama(kv_heads: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=kv_heads,
        head_dim=6,
        intermediate_size=20,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=61, n_embd=32, n_layer=3, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0, attn_pdrop=0.0
    )
    return GPT2LMHeadModel(config).eval()


def batches(count: int = 4) -> list[dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(61, (2, LENGTH), generator=made)} for _ in range(count)]


def zeroed(model: LlamaForCausalLM, masks: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """The stock model with the masked dims' weights set to 0 by hand: what the masks mean, without cook."""
    model = copy.deepcopy(model)
    for number, layer in enumerate(model.model.layers):
        gone = masks[f"layers.{number}.dimff"] == 0
        with torch.no_grad():
            layer.mlp.down_proj.weight[:, gone] = 0.0
    return model


def test_a_reshaped_model_computes_what_the_stock_model_does_with_zeroed_weights(tmp_path):
    model = llama()
    masks = cook.learn_masks(model, batches(), {"dims": 0.5}, steps=12)
    small = cook.reshape(model, masks)
    assert isinstance(small, LlamaForCausalLM) and small.config.intermediate_size == 10
    small.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        wanted = zeroed(model, masks)(**batches()[0]).logits
        for other in (small, loaded):
            # fp32: the sums of the products are in another order.
            torch.testing.assert_close(other(**batches()[0]).logits, wanted, rtol=1e-5, atol=1e-5)
    assert cook.verify(model, masks, small) < 1e-5


def test_verify_sees_another_mask():
    model = llama()
    masks = cook.learn_masks(model, batches(), {"dims": 0.5}, steps=6)
    small = cook.reshape(model, masks)
    assert cook.verify(model, masks | {"layers.1.dimff": 1 - masks["layers.1.dimff"]}, small) > 1e-2


def counted_flops(model: PreTrainedModel) -> int:
    """FLOPs of the products for a row of `LENGTH` tokens, as PyTorch counts them; it counts no fused attention."""
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, LENGTH, dtype=torch.long))
    return counter.get_total_flops()


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize(
    "keep", [{"params": 0.8}, {"flops": 0.7}, {"blocks": 0.7}, {"heads": 0.5}, {"heads": 2, "dims": 8}]
)
def test_every_budget_is_met_and_exact(make, keep):
    model = make()
    before = sum(p.numel() for p in model.parameters())
    plan = cook.plan(model, keep, context=LENGTH)
    masks = cook.learn_masks(model, batches(), keep, steps=12, context=LENGTH)
    small = cook.reshape(model, masks)
    after = sum(p.numel() for p in small.parameters())
    assert plan.parameters[0] == before
    # Blocks go whole, and a unit of attention is some hundred parameters of these tiny models. With a budget of FLOPs,
    # the parameters depend on which units go.
    assert abs(after - plan.parameters[1]) < (0.2 if "blocks" in keep else 0.1 if "flops" in keep else 0.05) * before
    if "params" in keep:
        assert abs(after - keep["params"] * before) < 0.05 * before
    if "flops" in keep:
        assert abs(counted_flops(small) / counted_flops(model) - keep["flops"]) < 0.03
    assert cook.verify(model, masks, small) < 1e-5


@pytest.mark.parametrize(
    "make, keep, options",
    [
        (llama, {"hidden": 0.75, "heads": 0.5, "dims": 0.5}, {"round_to": 4}),
        (llama, {"params": 0.6}, {"hidden": True}),
        (llama, {"flops": 0.4}, {"hidden": True, "round_to": 4}),
        (gpt2, {"hidden": 0.75}, {}),
        (gpt2, {"params": 0.6}, {"hidden": True}),
    ],
)
def test_hidden_dims_are_units_too(make, keep, options):
    model = make()
    plan = cook.plan(model, keep, **options)
    masks = cook.learn_masks(model, batches(), keep, steps=8, **options)
    small = cook.reshape(model, masks)
    assert cook.verify(model, masks, small) < 1e-5
    kept = int(masks["hidden"].sum())
    assert kept < 32 and small.get_input_embeddings().weight.shape == (61, kept)
    if "hidden" in keep:
        assert kept == 24 and plan.units["hidden dimensions"] == (32, 24)
    after = sum(p.numel() for p in small.parameters())
    if "params" in keep:
        # A hidden dimension is the largest unit.
        assert abs(after - 0.6 * plan.parameters[0]) <= 0.6 * plan.parameters[0] / kept / 2 + 1
    for name, mask in masks.items():
        if name.endswith(("hidden", "dimff")):
            assert int(mask.sum()) % options.get("round_to", 1) == 0


@pytest.mark.parametrize(
    "make, keep, units",
    [
        (llama, {"params": 0.6}, ["all"]),
        (llama, {"flops": 0.6}, ["dims", "head_dims"]),
        (llama, {"memory_mib": 0.06}, ["blocks", "heads", "head_dims"]),
        (llama, {"head_dims": 4, "dims": 0.5}, []),
        (gpt2, {"params": 0.6}, ["all"]),
        (gpt2, {"head_dims": 0.5}, []),
    ],
)
def test_head_dims_and_blocks_are_units_too(make, keep, units):
    model = make()
    plan = cook.plan(model, keep, units=units)
    masks = cook.learn_masks(model, batches(), keep, steps=8, units=units)
    small = cook.reshape(model, masks)
    assert cook.verify(model, masks, small) < 1e-5
    after, kinds = sum(p.numel() for p in small.parameters()), {name.rpartition(".")[2] for name in masks}
    if "params" in keep:  # a head dimension, or a hidden one, is the largest unit
        assert abs(after - 0.6 * plan.parameters[0]) <= 0.03 * plan.parameters[0]
        assert kinds == {"att", "ffn", "heads", "dimff", "head_dims", "hidden"} | ({"keys"} if make is llama else set())
    elif "flops" in keep:
        assert kinds == {"dimff", "head_dims"} and after < plan.parameters[0]
    elif "head_dims" in keep:
        kept = int(masks["head_dims"].sum())
        assert kept == (2 if make is llama else 4) and plan.units["head dimensions"][1] == 4
        assert make is gpt2 or small.config.head_dim == 4 and small.config.model_type == "llama"


def test_useless_head_dims_are_those_that_go():
    model = llama()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight *= 20.0
            if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
                weight.view(-1, 6, 32)[:, [1, 4]] = 0.0
        model.lm_head.weight *= 20.0
    masks = cook.learn_masks(model, batches(8), {"head_dims": 4}, steps=40)
    assert masks["head_dims"].tolist() == [1, 0, 1]


def test_unknown_or_pinned_units_are_refused():
    with pytest.raises(UserError, match="experts"):
        cook.plan(llama(), {"params": 0.6}, units=["experts"])


def test_useless_hidden_dims_are_those_that_go():
    model = llama()
    useless = [1, 5, 7, 20, 30]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight *= 20.0
                weight[useless] = 0.0
        model.model.embed_tokens.weight *= 20.0
        model.model.embed_tokens.weight[:, useless] = 0.0
        model.lm_head.weight *= 20.0
    masks = cook.learn_masks(model, batches(8), {"hidden": 27}, steps=40)
    assert (masks["hidden"] == 0).nonzero().flatten().tolist() == useless


@pytest.mark.parametrize(
    "unit, wanted", [("auto", "query_head"), ("query_head", "query_head"), ("kv_group", "kv_group")]
)
def test_one_budget_chooses_query_heads_or_whole_groups(unit, wanted):
    model, keep = llama(), {"params": 0.6}
    plan = cook.plan(model, keep, head_unit=unit)
    assert plan.head_unit == wanted
    masks = cook.learn_masks(model, batches(), keep, steps=12, head_unit=unit)
    numbers = [masks[f"layers.{n}.heads"].view(4, -1).sum(1).tolist() for n in range(3)]
    assert any(len(set(layer) - {0}) > 1 for layer in numbers) == (wanted == "query_head"), numbers
    small = cook.reshape(model, masks)
    assert cook.verify(model, masks, small) < 1e-5
    assert abs(sum(p.numel() for p in small.parameters()) - plan.parameters[1]) < 0.03 * plan.parameters[0]
    assert torch.equal(
        small.generate(batches()[0]["input_ids"], max_new_tokens=4, do_sample=False),
        small.generate(batches()[0]["input_ids"], max_new_tokens=4, do_sample=False, use_cache=False),
    )


@pytest.mark.parametrize("unit", ["layer", "block"])
def test_a_search_removes_what_does_nothing(unit):
    model = llama().train()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gone = name.startswith("model.layers.1.") or (unit == "block" and "layers.2.mlp" in name)
            if gone and ("o_proj" in name or "down_proj" in name):
                weight.zero_()
            elif "o_proj" in name or "down_proj" in name:
                weight *= 20.0
        # The model's own predictions, which it is sure of, as labels: every other block is worth something.
        model.lm_head.weight *= 1000.0
        data = batches()
        for batch in data:
            predicted = model(**batch).logits.argmax(-1)
            batch["labels"] = torch.cat([batch["input_ids"][:, :1], predicted[:, :-1]], 1)
    seen = []
    # One layer of three; or two FFN blocks and an attention block.
    keep = 2 / 3 if unit == "layer" else 1 - (2 * FFN + ATT) / (3 * FFN + 3 * ATT)
    masks = cook.search_blocks(model, data, keep, unit=unit, on_measure=lambda n, loss: seen.append((n, loss)))
    gone = {name for name, mask in masks.items() if not mask.all()}
    assert gone == {"layers.1.att", "layers.1.ffn"} | ({"layers.2.ffn"} if unit == "block" else set())
    assert [n for n, _ in seen] == list(range(1, len(seen) + 1)) and all(loss > 0 for _, loss in seen)
    assert model.training and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    small = cook.reshape(model, masks)
    assert cook.verify(model, masks, small) < 1e-5
    with pytest.raises(UserError, match="no batches"):
        cook.search_blocks(model, [], keep)


@pytest.mark.parametrize("keep", [{"params": [0.85, 0.7]}, {"dims": [15, 10, 5]}])
def test_several_sizes_are_nested_and_each_is_exact(keep):
    model, seen = llama(), []
    before = sum(p.numel() for p in model.parameters())
    masks = cook.learn_nested_masks(model, batches(), keep, steps=12, on_step=lambda *step: seen.append(step[2]))
    [(key, sizes)] = keep.items()
    assert list(masks) == sizes and len(seen) == 12 and not any(m._forward_pre_hooks for m in model.modules())
    for size, mask in masks.items():
        small = cook.reshape(model, mask)
        assert cook.verify(model, mask, small) < 1e-5
        if key == "params":
            assert abs(sum(p.numel() for p in small.parameters()) - size * before) < 0.05 * before
        else:
            assert {int(z.sum()) for z in mask.values()} == {size}
    for large, small in itertools.pairwise(masks.values()):
        assert all(bool((small[name] <= large[name]).all()) for name in small)


def test_sizes_descend_and_have_the_same_units():
    for keep in ({"params": [0.5, 0.8]}, {"params": [0.5, 0.5]}, {"params": []}, {"heads": [4], "dims": [8]}, {}):
        with pytest.raises(UserError, match="keep: "):
            cook.learn_nested_masks(llama(), batches(), keep)
    with pytest.raises(UserError, match="different units of attention"):
        cook.learn_nested_masks(llama(kv_heads=2), batches(), {"heads": [6, 4]})


def test_heads_of_equal_blocks_are_the_units_that_are_asked_for():
    for unit, pairs in (("kv_group", {0.0, 2.0}), ("query_head", {1.0})):
        masks = cook.learn_masks(llama(), batches(), {"heads": 4}, steps=6, head_unit=unit)
        assert {
            n for mask in masks.values() for n in mask.repeat_interleave(8 // len(mask)).view(4, 2).sum(1).tolist()
        } == pairs


def test_the_model_is_left_as_it_was():
    model = llama().train()
    next(model.parameters()).requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grads = {name: p.requires_grad for name, p in model.named_parameters()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    cook.learn_masks(model, batches(), {"dims": 0.5}, steps=4, teacher="self")
    assert {name: p.requires_grad for name, p in model.named_parameters()} == grads and model.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(p.grad is None for p in model.parameters())


def test_useless_dimensions_are_those_that_go():
    model = llama()
    useless = {0: [1, 5, 7], 1: [0, 2, 19], 2: [4, 8, 11]}
    with torch.no_grad():
        for number, dims in useless.items():
            down = model.model.layers[number].mlp.down_proj.weight
            down *= 20.0
            down[:, dims] = 0.0
        # The model's own predictions, which it is sure of, as labels: every other dimension is worth something.
        model.lm_head.weight *= 20.0
        data = batches(8)
        for batch in data:
            predicted = model(**batch).logits.argmax(-1)
            batch["labels"] = torch.cat([batch["input_ids"][:, :1], predicted[:, :-1]], 1)
    masks = cook.learn_masks(model, data, {"dims": 17}, steps=80, teacher="self")
    for number, dims in useless.items():
        assert (masks[f"layers.{number}.dimff"] == 0).nonzero().flatten().tolist() == dims


def test_a_teacher_that_is_another_model_gives_the_masks_of_itself_as_teacher():
    model = llama()
    own = cook.learn_masks(model, batches(), {"dims": 0.5}, steps=8, teacher="self")
    other = cook.learn_masks(model, batches(), {"dims": 0.5}, steps=8, teacher=copy.deepcopy(model))
    assert all(torch.equal(own[name], other[name]) for name in own)


def test_accumulated_micro_batches_give_the_masks_of_the_whole_batch():
    whole, parts = llama(), llama()
    rows = torch.cat([batch["input_ids"] for batch in batches(2)])
    one = cook.attach(whole, {"dims": 0.5}, steps=10)
    two = cook.attach(parts, {"dims": 0.5}, steps=10)
    for _ in range(10):
        one.before_forward()
        whole(input_ids=rows, labels=rows).loss.backward()
        one.after_backward()
        for half in rows.chunk(2):
            two.before_forward()
            (parts(input_ids=half, labels=half).loss / 2).backward()
        two.after_backward()
    # fp32 gradients in another order move the gates by less than this.
    torch.testing.assert_close(one.gates.values, two.gates.values, rtol=0, atol=1e-3)


def test_a_gradient_that_is_not_finite_moves_nothing():
    model = llama()
    gates = cook.attach(model, {"dims": 0.5}, steps=10)
    values = gates.gates.values.clone()
    gates.before_forward()
    (model(input_ids=batches()[0]["input_ids"]).logits.sum() * float("nan")).backward()
    assert not gates.after_backward() and gates.step == 0
    assert torch.equal(gates.gates.values, values)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ({}, "is empty"),
        ({"parameters": 0.5}, "unknown parameters"),
        ({"params": 0.5, "dims": 0.5}, "use it without other keys"),
        ({"params": 0.01}, "cannot be reached with heads and FFN dimensions alone"),
        ({"dims": 0.0}, "a share above 0"),
        ({"dims": 1.5}, "a share above 0"),
        ({"heads": 3}, "heads=3 cannot be reached"),
    ],
)
def test_what_cannot_be_kept_is_refused(keep, words):
    with pytest.raises(UserError, match=words):
        cook.plan(llama(), keep)


def test_masks_of_another_model_are_refused():
    masks = cook.learn_masks(llama(), batches(), {"dims": 0.5}, steps=2)
    with pytest.raises(UserError, match="of another model"):
        cook.reshape(gpt2(), masks)
    with pytest.raises(UserError, match="not a transformers model"):
        cook.plan(torch.nn.Linear(2, 2), {"dims": 0.5})
    with pytest.raises(UserError, match="ran out"):
        cook.learn_masks(llama(), iter(batches(2)), {"dims": 0.5}, steps=3)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_run(path):
    environment = own_environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [interpreter(), str(path)], cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.strip().splitlines()[-1].rsplit(" ", 1)[1]) < 1e-5
