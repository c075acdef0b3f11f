"""A reshaped model computes what the masked one does, whatever the masks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.evaluation.equality import largest_difference
from cook.export.pruned_folder import mask_model
from cook.families.cpm_ant import ADAPTER
from cook.families.cpm_ant_formats import by_own_sizes
from cook.pruning.attach import AttachedGates
from cook.pruning.counts import parameters
from cook.pruning.mask_set import kept_counts
from cook.pruning.reshape import kept_units, reshaped
from tests.models.cpm_ant_tiny import RAGGED, random_batch, tiny_model
from tests.tiny_pruning import config_of, masks_of, random_masks, tiny_space

CHANGES = {"plain": {}, "ragged": RAGGED, "older FFN": {"gated_ffn": False}}
MODELS = {name: tiny_model(3, **changes) for name, changes in CHANGES.items()}
SPACES = {name: tiny_space(**changes) for name, changes in CHANGES.items()}


def small_model(tensors, config, masks):
    """The reshaped model and its config."""
    space = ADAPTER.space(config)
    shrunk = ADAPTER.shrink(config, space, kept_units(space, masks)).config
    model = ADAPTER.build(shrunk).eval()
    model.load_state_dict(dict(reshaped(tensors, space, masks)), strict=True)
    return model, shrunk


def batches(config, seed):
    ids = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(seed))
    return [
        random_batch(seed, config),
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": torch.tensor([[0] * 3 + [1] * 6, [1] * 9])},
    ]


def difference(model, small, space, masks, seed=0):
    gates = mask_model(model, space, masks)
    try:
        return largest_difference(model, small, batches(model.config, seed))
    finally:
        gates.remove()


@pytest.mark.parametrize("name", CHANGES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_masked_is_reshaped(name, data):
    model, space = MODELS[name], SPACES[name]
    masks = data.draw(masks_of(space))
    small, _ = small_model(model.state_dict(), config_of(**CHANGES[name]), masks)
    assert difference(model, small, space, masks, data.draw(st.integers(0, 99))) <= 1e-5


def hidden_mask(seed, kept, size=24):
    mask = torch.zeros(size)
    mask[torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:kept]] = 1
    return mask


@pytest.mark.parametrize("name", CHANGES)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_masked_is_reshaped_with_fewer_hidden_dims(name, data):
    model, space = MODELS[name], SPACES[name]
    masks = data.draw(masks_of(space))
    masks["hidden"] = hidden_mask(data.draw(st.integers(0, 99)), data.draw(st.integers(6, 24)))
    small, config = small_model(model.state_dict(), config_of(**CHANGES[name]), masks)
    assert config["dim_model"] == int(masks["hidden"].sum()) == ADAPTER.space(config).hidden.size
    assert difference(model, small, space, masks, data.draw(st.integers(0, 99))) <= 1e-5
    assert parameters(space, kept_counts(masks)) == sum(p.numel() for p in small.parameters())


def test_a_small_model_planted_in_a_larger_one_comes_out():
    """Its weights times √(24/16) wherever the model divides by the root of the hidden size."""
    small, big = tiny_model(5, dim_model=16), tiny_model(6)
    mask = hidden_mask(1, 16)
    kept = mask.nonzero().flatten()
    tensors = {name: weight.clone() for name, weight in big.state_dict().items()}
    for name, weight in small.state_dict().items():
        reads = weight.ndim == 2 and not name.endswith(("attention_out.weight", "w_out.weight"))
        scale = (24 / 16) ** 0.5 if reads and "position_bias" not in name else 1.0
        dims = [kept if n < o else torch.arange(o) for n, o in zip(weight.shape, tensors[name].shape, strict=True)]
        tensors[name][torch.meshgrid(*dims, indexing="ij")] = weight * scale
    big.load_state_dict(tensors)
    found, config = small_model(tensors, config_of(), {"hidden": mask})
    before = {"dim_model": 24, "dim_head": 6, "heads": [4] * 3, "dim_ff": [20] * 3}
    plain = {"layer_heads": None, "layer_dim_ff": None, "mask_modules": None}
    assert config == config_of(dim_model=16) | plain | {"unpruned": before}
    assert largest_difference(small, found, batches(small.config, 0)) <= 1e-5
    own = by_own_sizes(found.config, found.state_dict())
    for name, weight in small.state_dict().items():
        torch.testing.assert_close(own[name], weight, rtol=1e-6, atol=1e-7)
    gates = mask_model(big, SPACES["plain"], {"hidden": mask})
    assert largest_difference(small, big, batches(small.config, 0)) <= 1e-5
    gates.remove()


def test_the_gradient_of_soft_hidden_gates_is_that_of_finite_differences():
    model, space = tiny_model(3).double(), SPACES["plain"]
    z = (0.3 + 0.7 * torch.rand(24, dtype=torch.float64)).requires_grad_()
    attached = AttachedGates(model, [space.hidden], {})
    ids = torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(0))

    def loss(values):
        attached.set({"hidden": values})
        return model(input_ids=ids).logits.square().mean()

    loss(z).backward()
    with torch.no_grad():
        for unit in (0, 11, 23):
            step = torch.zeros(24, dtype=torch.float64)
            step[unit] = 1e-6
            measured = (loss(z + step) - loss(z - step)) / 2e-6
            # The differences lose about half the digits of fp64, and the position bias is added in fp32.
            assert float(z.grad[unit]) == pytest.approx(float(measured), rel=1e-4)


EXTREMES = {
    "no heads": ["layers.1.heads"],
    "no dims": ["layers.1.dimff"],
    "no attention": ["layers.0.att"],
    "no FFN": ["layers.2.ffn"],
    "neither": ["layers.0.att", "layers.0.ffn"],
    "all attention": [f"layers.{i}.att" for i in range(3)],
    "all FFN": [f"layers.{i}.ffn" for i in range(3)],
    "everything": [f"layers.{i}.{site}" for i in range(3) for site in ("att", "ffn")],
    "block and heads": ["layers.1.att", "layers.1.heads", "layers.1.ffn", "layers.1.dimff"],
}


@pytest.mark.parametrize("name", EXTREMES)
def test_the_extremes(name):
    model, space = MODELS["plain"], SPACES["plain"]
    masks = {g.name: torch.zeros(g.size) for g in space.groups if g.name in EXTREMES[name]}
    small, config = small_model(model.state_dict(), config_of(), masks)
    assert difference(model, small, space, masks) <= 1e-5
    for layer in range(3):
        kinds = (("att", "heads"), ("ffn", "dimff"))
        gone = [any(f"layers.{layer}.{kind}" in EXTREMES[name] for kind in pair) for pair in kinds]
        assert config["mask_modules"][layer] == gone


@pytest.mark.parametrize("seed", range(5))
def test_masks_change_the_model(seed):
    model, space = MODELS["plain"], SPACES["plain"]
    assert difference(model, model, space, {}) == 0
    masked = tiny_model(3)
    mask_model(masked, space, random_masks(space, seed))
    assert largest_difference(model, masked, batches(model.config, 0)) > 0.01


@pytest.mark.parametrize("name", ["dim_model", "dim_head", "heads", "dim_ff"])
def test_the_small_model_divides_by_the_sizes_before(name):
    model, space = MODELS["plain"], SPACES["plain"]
    masks = random_masks(space, 1, blocks=1.0) | {"hidden": hidden_mask(1, 16)}
    masks |= {"head_dims": (torch.arange(space.head_dims.size) % 3 > 0).float()}
    small, config = small_model(model.state_dict(), config_of(), masks)
    assert difference(model, small, space, masks) <= 1e-5
    own = ADAPTER.build(config | {"unpruned": None}).config.sizes_before()
    wrong = ADAPTER.build(config | {"unpruned": config["unpruned"] | {name: own[name]}}).eval()
    wrong.load_state_dict(small.state_dict())
    assert difference(model, wrong, space, masks) > 0.01


def test_heads_keep_their_own_bias():
    # Another choice of as many heads must show: otherwise the test above could not see a shared table cut wrongly.
    model, space = MODELS["plain"], SPACES["plain"]
    masks = {f"layers.{i}.heads": torch.tensor([1.0, 0, 0, 1]) for i in range(3)}
    small, config = small_model(model.state_dict(), config_of(), masks)
    assert difference(model, small, space, masks) <= 1e-5
    wrong = ADAPTER.build(config | {"layer_heads": [[0, 1]] * 3}).eval()
    wrong.load_state_dict(small.state_dict())
    assert difference(model, wrong, space, masks) > 0.01


def combined(space, first, second):
    """Masks on the first model that say what two prunings in turn said."""
    both = {}
    for group in space.groups:
        mask = first.get(group.name, torch.ones(group.size)).clone()
        if group.name in second and len(mask.nonzero()) == len(second[group.name]):
            mask[mask == 1] = second[group.name]
        both[group.name] = mask
    return both


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_pruning_twice_is_pruning_once(data):
    model, space = MODELS["plain"], SPACES["plain"]
    first = data.draw(masks_of(space))
    once, config = small_model(model.state_dict(), config_of(), first)
    second = data.draw(masks_of(ADAPTER.space(config)))
    twice, last = small_model(once.state_dict(), config, second)
    masks = combined(space, first, second)
    direct, wanted = small_model(model.state_dict(), config_of(), masks)
    assert list(direct.state_dict()) == list(twice.state_dict())
    for name, weight in direct.state_dict().items():
        assert torch.equal(twice.state_dict()[name], weight)
    assert difference(model, twice, space, masks) <= 1e-5
    for key in ("mask_modules", "layer_heads", "layer_dim_ff"):
        assert last[key] == wanted[key]


@pytest.mark.parametrize("seed", range(3))
def test_generation_is_the_same_with_a_cache(seed):
    model, space = tiny_model(3), SPACES["plain"]
    masks = random_masks(space, seed, blocks=0.8) | {"layers.0.att": torch.zeros(1)}
    masks |= {"hidden": hidden_mask(seed, 16)} if seed else {}
    small, _ = small_model(model.state_dict(), config_of(), masks)
    mask_model(model, space, masks)
    ids = torch.randint(0, 61, (2, 4), generator=torch.Generator().manual_seed(seed))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    runs = ((model, True), (small, True), (small, False))
    masked, cached, slow = (m.generate(ids, use_cache=use_cache, **options) for m, use_cache in runs)
    assert torch.equal(masked, cached) and torch.equal(cached, slow) and masked.shape == (2, 16)


def test_weights_in_16_bits_are_not_rounded_again():
    space = SPACES["plain"]
    tensors = {name: tensor.bfloat16() for name, tensor in MODELS["plain"].state_dict().items()}
    masks = {"layers.0.heads": torch.tensor([1.0, 0, 1, 1]), "hidden": hidden_mask(1, 16)}
    got = dict(reshaped(tensors, space, masks))
    out = "encoder.layers.0.self_att.self_attention.attention_out.weight"
    columns = torch.cat([torch.arange(6), torch.arange(12, 24)])
    assert torch.equal(got[out], tensors[out][masks["hidden"].bool()][:, columns])
    whole = tiny_model(3)
    whole.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    small, _ = small_model(whole.state_dict(), config_of(), masks)
    assert all(torch.equal(small.state_dict()[name], tensor.float()) for name, tensor in got.items())
    assert difference(whole, small, space, masks) <= 1e-5


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop("input_embedding.weight"), "missing"),
        (lambda t: t.update({"lm_head.weight": torch.ones(1)}), "'lm_head.weight' has no place"),
        (lambda t: t.update({"input_embedding.weight": torch.ones(3, 24)}), "embedding.weight' has another shape"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, word):
    tensors = dict(MODELS["plain"].state_dict())
    change(tensors)
    with pytest.raises(UserError, match=word):
        dict(reshaped(tensors, SPACES["plain"], {}))


@pytest.mark.parametrize(
    "mask",
    [{"layers.9.att": torch.ones(1)}, {"layers.0.heads": torch.ones(3)}, {"layers.0.heads": torch.full((4,), 0.5)}],
)
def test_masks_of_another_space_are_our_mistake(mask):
    with pytest.raises(AssertionError):
        kept_units(SPACES["plain"], mask)
