from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from cook.pruning.attach import AttachedGates
from cook.pruning.units import GatePoint, UnitGroup
from tests.models.cpm_ant_tiny import random_batch, tiny_model
from tests.tiny_pruning import random_masks, tiny_space

SPACE = tiny_space()


def zeroed(seed, masks):
    """The same model with the masked units' output weights set to zero by hand: what a 0/1 mask means."""
    model = tiny_model(seed)
    with torch.no_grad():
        for layer, block in enumerate(model.encoder.layers):
            out, w_out = block.self_att.self_attention.attention_out.weight, block.ffn.ffn.w_out.weight
            heads, dims = masks.get(f"layers.{layer}.heads"), masks.get(f"layers.{layer}.dimff")
            for head in range(4):
                if heads is not None and heads[head] == 0:
                    out[:, 6 * head : 6 * head + 6] = 0
            if dims is not None:
                w_out[:, dims == 0] = 0
            out *= masks.get(f"layers.{layer}.att", torch.ones(1))
            w_out *= masks.get(f"layers.{layer}.ffn", torch.ones(1))
    return model


@pytest.mark.parametrize("seed", range(5))
def test_a_mask_is_zeroed_output_weights(seed):
    model, batch = tiny_model(seed), random_batch(seed, tiny_model(seed).config)
    masks = random_masks(SPACE, seed)
    attached = AttachedGates(model, SPACE.groups, {})
    attached.set(masks)
    torch.testing.assert_close(model(**batch).logits, zeroed(seed, masks)(**batch).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_a_soft_gate_multiplies_once(seed):
    model, batch = tiny_model(seed), random_batch(seed, tiny_model(seed).config)
    random = torch.Generator().manual_seed(seed)
    z = {g.name: torch.rand(g.size, generator=random) for g in SPACE.groups}
    scaled = tiny_model(seed)
    with torch.no_grad():
        for layer, block in enumerate(scaled.encoder.layers):
            out, w_out = block.self_att.self_attention.attention_out.weight, block.ffn.ffn.w_out.weight
            out *= z[f"layers.{layer}.heads"].repeat_interleave(6) * z[f"layers.{layer}.att"]
            w_out *= z[f"layers.{layer}.dimff"] * z[f"layers.{layer}.ffn"]
    AttachedGates(model, SPACE.groups, {}).set(z)
    torch.testing.assert_close(model(**batch).logits, scaled(**batch).logits, rtol=1e-5, atol=1e-5)


def test_fixed_masks_hold_beside_learned_gates():
    model, batch = tiny_model(0), random_batch(0, tiny_model(0).config)
    masks = random_masks(SPACE, 0)
    fixed = {name: mask for name, mask in masks.items() if name.endswith(("att", "ffn"))}
    learned = {name: mask for name, mask in masks.items() if name not in fixed}
    attached = AttachedGates(model, SPACE.groups, fixed)
    only_fixed = model(**batch).logits
    torch.testing.assert_close(only_fixed, zeroed(0, fixed)(**batch).logits, rtol=1e-5, atol=1e-5)
    attached.set(learned)
    torch.testing.assert_close(model(**batch).logits, zeroed(0, masks)(**batch).logits, rtol=1e-5, atol=1e-5)
    attached.set({})
    assert torch.equal(model(**batch).logits, only_fixed)


def test_removed_hooks_leave_the_model_as_it_was():
    model, batch = tiny_model(0), random_batch(0, tiny_model(0).config)
    before = model(**batch).logits
    forwards = {name: module.forward.__func__ for name, module in model.named_modules()}
    attached = AttachedGates(model, SPACE.groups, {})
    assert torch.equal(model(**batch).logits, before)
    attached.set(random_masks(SPACE, 0))
    assert not torch.equal(model(**batch).logits, before)
    attached.remove()
    assert torch.equal(model(**batch).logits, before)
    assert {name: module.forward.__func__ for name, module in model.named_modules()} == forwards
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_gradient_of_z_is_that_of_numeric_differences():
    model = tiny_model(2).double()
    batch = random_batch(2, model.config)
    targets = torch.randint(0, 61, batch["input"].shape, generator=torch.Generator().manual_seed(0))
    attached = AttachedGates(model, SPACE.groups, {})
    z = {g.name: torch.full((g.size,), 0.8, dtype=torch.float64) for g in SPACE.groups}

    def loss(values):
        attached.set(values)
        return model(**batch).logits.log_softmax(-1).gather(-1, targets[..., None]).mean()

    leaves = {name: value.clone().requires_grad_() for name, value in z.items()}
    loss(leaves).backward()
    for name in ("layers.0.att", "layers.1.heads", "layers.2.dimff", "layers.2.ffn"):
        for unit in range(min(4, len(z[name]))):
            ends = []
            for step in (1e-5, -1e-5):
                moved = z[name].clone()
                moved[unit] += step
                with torch.no_grad():
                    ends.append(float(loss(z | {name: moved})))
            assert leaves[name].grad[unit].item() == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-5, abs=1e-9)


def test_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(1).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        attached = AttachedGates(model, SPACE.groups, {})
        z = {g.name: torch.full((g.size,), 0.7, requires_grad=True) for g in SPACE.groups}
        attached.set(z)
        batch = random_batch(1, model.config)
        model(**batch, labels=batch["input"] % 61).loss.backward()
        gradients.append({name: value.grad for name, value in z.items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


def test_gates_are_opened_for_a_while():
    masks = random_masks(SPACE, 0)
    fixed = {name: mask for name, mask in masks.items() if name.endswith("att")}
    fixed["layers.0.att"] = torch.zeros(1)
    model, batch = tiny_model(0), random_batch(0, tiny_model(0).config)
    dense, held = model(**batch).logits, zeroed(0, fixed)(**batch).logits
    attached = AttachedGates(model, SPACE.groups, fixed)
    attached.set({name: mask for name, mask in masks.items() if name not in fixed})
    masked = model(**batch).logits
    with attached.opened(fixed=True):
        assert torch.equal(model(**batch).logits, dense)
    with attached.opened(fixed=False):
        torch.testing.assert_close(model(**batch).logits, held, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError), attached.opened(fixed=True):
        raise RuntimeError
    assert torch.equal(model(**batch).logits, masked) and not torch.equal(masked, dense)


def test_half_precision_stays_half():
    model = tiny_model(0).bfloat16()
    attached = AttachedGates(model, SPACE.groups, {})
    attached.set({g.name: torch.ones(g.size) for g in SPACE.groups})
    assert model(**random_batch(0, model.config)).logits.dtype == torch.bfloat16


def test_values_of_the_wrong_shape_or_name_are_our_mistake():
    attached = AttachedGates(tiny_model(0), SPACE.groups, {})
    with pytest.raises(AssertionError, match="layers.9"):
        attached.set({"layers.9.att": torch.ones(1)})
    with pytest.raises(AssertionError, match="layers.0.heads has 4 units"):
        attached.set({"layers.0.heads": torch.ones(1)})  # one number would pass as the gate of all heads


class Products(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = torch.nn.Linear(6, 4), Conv1D(5, 4)

    def forward(self, x):
        return self.conv(torch.tanh(self.linear(x)))


GROUPS = [
    UnitGroup(
        kind="heads", site="att", layer=0, size=3, slices=(), gate=GatePoint(module="linear", at="input", repeat=2)
    ),
    UnitGroup(kind="dimff", site="ffn", layer=0, size=4, slices=(), gate=GatePoint(module="conv", at="input")),
]


def passed(*, tokens=50, is_tapped=False, **gates):
    """The output and all gradients of a pass with gates, by name, and the shapes of what was kept for the backward."""
    model, kept = Products().double(), []
    attached = AttachedGates(model, GROUPS, {})
    z = {name: torch.tensor(value, dtype=torch.float64, requires_grad=True) for name, value in gates.items()}
    attached.set({f"layers.0.{name}": value for name, value in z.items()})
    if is_tapped:
        model.linear.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0].detach()))
    x = torch.linspace(-1, 1, tokens * 6, dtype=torch.float64).view(tokens, 6).sin()
    y = model(x)
    (y**2).sum().backward()
    return {"y": y.detach()} | {n: p.grad for n, p in (*model.named_parameters(), *z.items())}, kept, x


def test_gates_that_multiply_weights_give_the_gradients_of_gates_that_multiply_inputs(monkeypatch):
    """In double precision, with closed gates too, whose gradient must be that of opening them again."""
    gates = {"heads": [0.5, 0.0, 1.0], "dimff": [0.0, 0.3, 1.0, 0.8]}
    by_weight, _, _ = passed(**gates)
    monkeypatch.setattr(AttachedGates, "_folds", lambda *_: False)
    by_input, _, _ = passed(**gates)
    assert by_weight.keys() == by_input.keys() and "heads" in by_input
    for name, expected in by_input.items():
        torch.testing.assert_close(by_weight[name], expected, rtol=1e-12, atol=1e-12)
    assert by_input["heads"][1] != 0


def test_gates_multiply_weights_only_where_that_is_cheaper_and_nobody_reads_the_input():
    model, z = Products(), torch.ones(6, requires_grad=True)
    attached = AttachedGates(model, GROUPS, {})
    many, few = torch.ones(50, 6), torch.ones(2, 6)
    assert attached._folds(model.linear, many, z) and not attached._folds(model.linear, few, z)
    assert not attached._folds(model.linear, many, z.detach())
    model.linear.weight.requires_grad_(False)
    assert not attached._folds(model.linear, many, z)
    model.linear.weight.requires_grad_(True)
    model.linear.weight.ds_id = 0  # as ZeRO-3 marks it
    assert not attached._folds(model.linear, many, z)
    _, kept, x = passed(is_tapped=True, heads=[0.5, 0.0, 1.0])
    torch.testing.assert_close(kept[0], x * torch.tensor([0.5, 0.5, 0, 0, 1, 1], dtype=x.dtype), rtol=0, atol=0)


@pytest.mark.parametrize("norm", [torch.nn.RMSNorm(6), torch.nn.LayerNorm(6)])
def test_gates_of_a_norm_that_are_all_equal_multiply_what_it_gives(norm):
    """Up to the rounding of double precision. A fraction of all features is not free, though the norm divides by it."""
    torch.manual_seed(0)
    norm = norm.double()
    torch.nn.init.normal_(norm.weight)
    model, x = torch.nn.Sequential(norm), torch.randn(4, 6, dtype=torch.float64)
    expected = 0.3 * model(x)
    gate = GatePoint(module="0", at="statistics")
    group = UnitGroup(kind="hidden", site="stream", layer=-1, size=6, slices=(), gate=gate)
    AttachedGates(model, [group], {}).set({"hidden": torch.full((6,), 0.3, dtype=torch.float64)})
    torch.testing.assert_close(model(0.3 * x), expected, rtol=1e-12, atol=1e-12)
