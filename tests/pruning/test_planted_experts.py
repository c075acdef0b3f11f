"""Planted useless experts: those that do harm and those that hardly any token needs are removed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cook import attach
from cook.export.pruned_folder import mask_model
from cook.families.registry import by_config
from cook.families.source import load_model
from tests.tiny_families import tiny_source

SIZES = {"num_hidden_layers": 2, "num_local_experts": 6, "intermediate_size": 16}
USELESS, STEPS = 2, 80
SEEDS = range(10)


def planted(seed, name="mixtral"):
    """A frozen model, its space, and two experts drawn at random in each layer."""
    source = tiny_source(name, seed, **SIZES)
    model = load_model(source).requires_grad_(False)
    space, random = by_config(source.config).space(source.config), torch.Generator().manual_seed(seed)
    useless = {g.name: sorted(torch.randperm(g.size, generator=random)[:USELESS].tolist()) for g in space.of("experts")}
    return model, space, useless


def learn(model, targets, batches, seed):
    """What is removed from each layer, by the divergence from `targets`."""
    live = attach(model, {"experts": SIZES["num_local_experts"] - USELESS}, steps=STEPS, seed=seed)
    for step in range(STEPS):
        ids, wanted = batches[step % len(batches)], targets[step % len(batches)]
        live.before_forward()
        logits = F.log_softmax(model(input_ids=ids).logits, -1)
        (F.kl_div(logits, wanted, reduction="sum", log_target=True) / ids.numel()).backward()
        live.after_backward()
    masks = live.masks()
    live.remove()
    return {name: (mask == 0).nonzero().flatten().tolist() for name, mask in masks.items()}


def outputs(model, batches):
    return [F.log_softmax(model(input_ids=ids).logits, -1) for ids in batches]


def texts(seed):
    random = torch.Generator().manual_seed(1000 + seed)
    return [torch.randint(3, 61, (6, 12), generator=random) for _ in range(8)]


@pytest.mark.parametrize("seed", SEEDS)
def test_experts_that_the_target_lacks_are_removed(seed):
    """The target is the model without them: every token that chooses them is led away from it."""
    model, space, useless = planted(seed)
    masks = {g.name: torch.ones(g.size).index_fill(0, torch.tensor(useless[g.name]), 0) for g in space.of("experts")}
    batches = texts(seed)
    attached = mask_model(model, space, masks)
    targets = outputs(model, batches)
    attached.remove()
    assert learn(model, targets, batches, seed) == useless


def scores(model, group, batches):
    """The router's logits for all tokens, `[tokens, experts]`."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(group.gate.module).register_forward_hook(lambda _m, _i, out: found.append(out[0]))
    for ids in batches:
        model(input_ids=ids)
    hook.remove()
    return torch.cat(found)


@pytest.mark.parametrize("seed", SEEDS)
def test_rarely_used_experts_are_removed(seed):
    """The target is the model itself; all experts are equally strong, and few tokens choose the planted ones."""
    model, space, useless = planted(seed, "gpt_oss")
    batches = texts(seed)
    for group in space.of("experts"):
        router, rare = model.get_submodule(group.gate.module), useless[group.name]
        logits = scores(model, group, batches)
        router.weight.data /= logits.std(0)[:, None]
        router.bias.data = -(logits.mean(0) - router.bias) / logits.std(0)
        router.bias.data[rare] -= 1.5
        used = scores(model, group, batches).topk(2, dim=-1).indices.flatten().bincount(minlength=6)
        often = [expert for expert in range(6) if expert not in rare]
        assert 0 < used[rare].sum() and used[rare].max() < used[often].min() / 2, "what is planted is not rare"
    assert learn(model, outputs(model, batches), batches, seed) == useless
