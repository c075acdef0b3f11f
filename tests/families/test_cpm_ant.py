from __future__ import annotations

import pytest
import torch

from cook.families.cpm_ant import ADAPTER
from cook.pruning.attach import AttachedGates
from cook.pruning.mask_set import kept_counts
from cook.pruning.reshape import kept_units
from tests.models.cpm_ant_tiny import RAGGED, random_batch, tiny_model
from tests.tiny_pruning import config_of, random_masks, tiny_space


@pytest.mark.parametrize("changes", [{}, RAGGED, {"gated_ffn": False}])
def test_the_space_is_the_models(changes):
    space, model = tiny_space(**changes), tiny_model(**changes)
    assert space.shapes == {name: tuple(t.shape) for name, t in model.state_dict().items()}
    for group in space.groups:
        module = model.get_submodule(group.gate.module)
        width = {"input": 1, "output": 0}[group.gate.at]
        features = module.weight.shape[width]
        assert features == (group.size * group.gate.repeat if group.gate.repeat else features)
    # Every weight of a layer belongs to exactly one block.
    owned = [piece.path for group in space.of("layer") for piece in group.slices]
    assert sorted(owned) == sorted(path for path in space.shapes if ".layers." in path)


@pytest.mark.parametrize("changes", [{}, RAGGED])
def test_the_task_loss_reaches_every_gate(changes):
    model, space = tiny_model(**changes), tiny_space(**changes)
    attached = AttachedGates(model, space.groups, {})
    z = {g.name: torch.full((g.size,), 0.9, requires_grad=True) for g in space.groups}
    attached.set(z)
    batch = random_batch(0, model.config)
    model(**batch, targets=torch.randint(0, 61, batch["input"].shape)).loss.backward()
    for name, value in z.items():
        assert value.grad is not None and (value.grad != 0).all(), name


@pytest.mark.parametrize("seed", range(6))
def test_pruning_twice_names_the_original_heads(seed):
    config = config_of(num_layers=3)
    for step in range(2):
        space = ADAPTER.space(config)
        masks = random_masks(space, 10 * seed + step, blocks=0.9, units=0.6)
        config = ADAPTER.shrink(config, space, kept_units(space, masks)).config
        after = ADAPTER.space(config)
        kept = kept_counts(masks)
        for group in after.groups:
            assert group.kind == "layer" or group.size == kept[group.name]
    gone = [pair for pair in config["mask_modules"] or []]
    assert all(isinstance(flag, bool) for pair in gone for flag in pair)


def test_equal_sizes_keep_the_plain_fields():
    config = config_of()
    space = ADAPTER.space(config)
    kept = {f"layers.{i}.dimff": tuple(range(i, i + 7)) for i in range(3)} | {"layers.1.ffn": ()}
    shrunk = ADAPTER.shrink(config, space, kept).config
    assert (shrunk["dim_ff"], shrunk["layer_dim_ff"], shrunk["layer_heads"]) == (7, None, None)
    assert shrunk["mask_modules"] == [[False, False], [False, True], [False, False]]
    assert ADAPTER.shrink(config, space, {g.name: tuple(range(g.size)) for g in space.groups}).config == config | {
        "mask_modules": None,
        "layer_dim_ff": None,
        "layer_heads": None,
        "unpruned": None,
    }


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layer_dim_ff": [7, 8, 7]}, "7, 8"),
        ({"layer_heads": [[0, 1], [0, 1, 2, 3], [2, 3]]}, "keep different heads"),
    ],
)
def test_what_cpm_lives_format_cannot_hold_is_said(changes, word):
    answer = ADAPTER.live_format(config_of(**changes), {})
    assert isinstance(answer, str) and word in answer


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layer_dim_ff": [9, 9, 9]},
        {"layer_dim_ff": [9, 0, 9], "mask_modules": [[False, False], [False, True], [False, False]]},
        {"layer_dim_ff": [0, 0, 0], "mask_modules": [[False, True]] * 3},
        {"layer_heads": [[], [0, 1, 2, 3], []], "mask_modules": [[True, False], [False, False], [True, False]]},
    ],
)
def test_what_cpm_lives_format_can_hold_is_held(changes):
    fields, _ = ADAPTER.live_format(config_of(**changes), {})
    native, _ = ADAPTER.read(fields, {})
    assert ADAPTER.space(native).shapes == tiny_space(**changes).shapes
