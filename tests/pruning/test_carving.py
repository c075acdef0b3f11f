"""Experts planted in an FFN are found; the assignment is the best one; names and weights of the blocks."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from transformers import LlamaConfig, LlamaForCausalLM

from cook.base.errors import UserError
from cook.families.source import open_model
from cook.pruning.carving import (
    _assigned,
    active_experts,
    active_when_carved,
    carve,
    carved_weights,
    described,
    expert_sizes,
    ffn_groups,
)
from cook.pruning.ffn_samples import FfnSamples
from tests.tiny_experts import random_carvings, with_experts
from tests.tiny_families import tiny_source


def planted(seed: int, *, tokens: int = 400, hidden: int = 12, experts: int = 4, size: int = 5, shared: int = 5):
    """Inputs, energies and the planted place of each dim: each token has one topic, at which one expert is active."""
    random = torch.Generator().manual_seed(seed)
    topics = torch.linalg.qr(torch.randn(hidden, experts, generator=random)).Q.T
    topic = torch.randint(experts, (tokens,), generator=random)
    inputs = 2 * topics[topic] + 0.3 * torch.randn(tokens, hidden, generator=random)
    place = torch.arange(experts).repeat_interleave(size)
    place = torch.cat([torch.full((shared,), -1), place])[torch.randperm(shared + experts * size, generator=random)]
    energy = torch.where(place == -1, 3.0, torch.where(place == topic[:, None], 1.0, 0.01))
    return inputs, energy * (0.5 + torch.rand(energy.shape, generator=random)), place


@pytest.mark.parametrize("seed", range(5))
def test_planted_experts_are_found(seed):
    inputs, energy, place = planted(seed)
    carving = carve(inputs, energy, expert_sizes(25, experts=5, shared=1, active=0.4))
    groups = carving.order.split(5)
    assert set(place[groups[0]].tolist()) == {-1}
    found = [set(place[group].tolist()) for group in groups[1:]]
    assert sorted(map(tuple, found)) == [(0,), (1,), (2,), (3,)]
    # One of the four experts holds all but 15 dims' hundredths of the energy.
    assert carving.kept > 0.98
    scores = torch.sigmoid(inputs @ carving.weight.T) + carving.bias
    expert_of = torch.tensor([place[group[0]] for group in groups[1:]])
    strongest = torch.stack([energy[:, place == topic].sum(1) for topic in range(4)], 1).argmax(1)
    assert (expert_of[scores.argmax(1)] == strongest).float().mean() > 0.98


def test_activations_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite"):
        carve(torch.full((3, 4), torch.nan), torch.ones(3, 10), expert_sizes(10, experts=3, shared=1, active=0.7))


def test_dims_with_the_same_energy_at_all_tokens_can_be_carved():
    carving = carve(torch.randn(30, 4), torch.zeros(30, 10), expert_sizes(10, experts=3, shared=1, active=0.7))
    assert sorted(carving.order.tolist()) == list(range(10))
    assert carving.weight.isfinite().all() and carving.bias.isfinite().all()


@pytest.mark.parametrize("seed", range(6))
def test_the_assignment_has_the_largest_gain_of_all(seed):
    random = torch.Generator().manual_seed(seed)
    sizes = expert_sizes(41, experts=5, shared=seed % 2, active=1.0)
    capacities = [sizes.shared, *[sizes.size] * sizes.routed]
    gain = torch.rand(41, 1, generator=random) * torch.rand(41, len(capacities), generator=random).round(decimals=1)
    found = _assigned(gain, sizes)
    assert found.bincount(minlength=len(capacities)).tolist() == capacities
    seats = torch.arange(len(capacities)).repeat_interleave(torch.tensor(capacities))
    rows, columns = linear_sum_assignment(gain[:, seats].numpy(), maximize=True)
    assert gain[torch.arange(41), found].sum().item() == pytest.approx(gain[:, seats][rows, columns].sum().item())


@pytest.mark.parametrize(
    ("experts", "shared", "active", "wanted"), [(8, 1, 0.5, 3), (8, 3, 0.5, 1), (8, 0, 0.25, 2), (8, 2, 1.0, 6)]
)
def test_the_share_counts_the_shared_experts(experts, shared, active, wanted):
    assert active_experts(experts, shared, active) == wanted
    sizes = expert_sizes(1536, experts=experts, shared=shared, active=active)
    assert sizes.active_dims == round(1536 * active)
    assert sizes.shared + sizes.routed * sizes.size == 1536


def test_dims_that_do_not_divide_evenly_are_shared():
    sizes = expert_sizes(21, experts=4, shared=0, active=0.5)
    assert (sizes.shared, sizes.size, sizes.routed, sizes.active) == (1, 5, 4, 2)
    with pytest.raises(UserError, match="more experts than an FFN block has dims"):
        expert_sizes(3, experts=4, shared=0, active=0.5)


def test_blocks_are_chosen_by_the_name_of_their_first_product():
    source = tiny_source("llama")
    space = source.adapter.space(source.config)
    assert [g.layer for g in ffn_groups(space, (), {})] == [0, 1, 2]
    assert [g.layer for g in ffn_groups(space, ("layers.1.mlp.gate_proj", "2.mlp.up_proj"), {})] == [1, 2]
    with pytest.raises(UserError, match="first_FFN_module: 'c_fc' is not") as caught:
        ffn_groups(space, ("c_fc",), {})
    assert "mlp.gate_proj, mlp.up_proj" in str(caught.value)
    ant = tiny_source("llama").adapter  # aliases stand for all of a block's first products
    assert ffn_groups(space, ("w_in",), {**ant.aliases, "w_in.weight": ("mlp.gate_proj.weight",)}) == space.of("dimff")


def test_samples_are_the_blocks_inputs_and_energies(tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=31, **sizes)).save_pretrained(tmp_path)
    source = open_model(tmp_path)
    group = source.adapter.space(source.config).of("dimff")[1]
    model = LlamaForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(31, (2, 5))
    with torch.no_grad():
        samples = FfnSamples(model, [group])
        samples.at(torch.tensor([3, 6]))
        model(ids)
        samples.remove()
        states = model(ids, output_hidden_states=True)
        layer = model.model.layers[1]
        kept = {}
        handle = layer.post_attention_layernorm.register_forward_hook(lambda _m, _i, out: kept.update(x=out))
        model(ids)
        handle.remove()
    assert states.hidden_states is not None
    x = kept["x"].flatten(0, 1)[[3, 6]]
    inner = torch.nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
    columns = layer.mlp.down_proj.weight.detach().norm(dim=0)
    found, energy = samples.of(group, columns)
    torch.testing.assert_close(found, x, rtol=8e-3, atol=1e-4)  # kept in bf16: 8 bits
    torch.testing.assert_close(energy, (inner * columns).square().detach(), rtol=2e-2, atol=1e-8)


def test_active_when_carved_are_counted_from_the_weights_of_unused_dims():
    source = tiny_source("llama")
    carvings = random_carvings(source)
    made = with_experts(source, carvings)
    space = made.adapter.space(made.config)
    total = sum(tensor.numel() for tensor in made.tensors.values())
    # 3 of 5 routed experts of 3 dims are unused in each of 3 layers: 3 columns of 32, and 2 biases.
    assert active_when_carved(space, made.adapter.experts(made.config)) == total - 3 * 9 * (3 * 32 + 2)


def test_weights_are_reordered_in_all_parts_of_a_fused_product():
    source = tiny_source("phi3")
    carvings = random_carvings(source)
    weights = carved_weights(source.tensors, carvings)
    order = carvings[0][1].order
    before, after = (w["model.layers.0.mlp.gate_up_proj.weight"] for w in (source.tensors, weights))
    assert torch.equal(after, torch.cat([before[:20][order], before[20:][order]]))
    path, entry = described(*carvings[0])
    assert path == "model.layers.0.mlp.router" and entry["ins"] == {"model.layers.0.mlp.gate_up_proj": [0, 20]}
