"""Every family computes a step's passes on a device other than the CPU: with gates, packed rows and a teacher."""

from __future__ import annotations

import pytest
import torch

from cook.families.registry import by_config
from cook.pruning.compensation import compensable, with_bias
from cook.pruning.mask_set import consistent, fits
from cook.pruning.reshape import reshaped, restored
from tests.absent_device import AbsentDevice, backward_without_engine
from tests.families.device_passes import NAMES, config_named, passes
from tests.tiny_families import FAMILIES, MOE


@pytest.mark.parametrize("name", NAMES)
def test_no_pass_of_a_family_mixes_devices(name):
    passes(name, "meta", AbsentDevice())


@pytest.mark.parametrize("name", ["llama", "cpm_ant"])
def test_the_backward_pass_without_an_engine_is_that_of_the_engine(name):
    """On values: `scripts/check_devices.py` uses it on fake tensors of a card."""
    passes(name, "meta", AbsentDevice(), backward=backward_without_engine)
    torch.manual_seed(0)
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)
    found = []
    for backward in (torch.Tensor.backward, backward_without_engine):
        a, b = (torch.nn.functional.gelu(x @ w) * x).split(4, -1)  # several outputs, and a leaf that is used twice
        backward((a.softmax(-1) * b + a).sum())
        found.append((x.grad, w.grad))
        x.grad = w.grad = None
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", [*FAMILIES, *MOE, "cpm_ant"])
def test_weights_are_cut_put_back_and_compensated_where_they_are(name):
    config = config_named(name)
    adapter = by_config(config)
    space = adapter.space(config, adapter.head_units(config)[-1])
    groups = [group for group in space.every if group.kind != "layer"]
    halves = {group.name: (torch.arange(group.size) >= group.size // 2).float() for group in groups}
    masks = consistent(space, {group.name: halves[group.name] for group in groups if fits(group, halves[group.name])})
    features = {g.name: space.shapes[g.slices[-1].path][g.slices[-1].dim] for g in compensable(space, space.groups)}
    means = {name: torch.ones(count) for name, count in features.items()}
    whole = {path: torch.empty(shape, device="meta") for path, shape in space.shapes.items()}
    with AbsentDevice():
        weights = dict(with_bias(whole.items(), space, masks, means))
        small = dict(reshaped(weights, space, masks))
        back = dict(restored(small.items(), whole, space, masks, None))
    assert all(tensor.is_meta for tensor in (*small.values(), *back.values()))
    assert {path: tuple(tensor.shape) for path, tensor in back.items()} == dict(space.shapes)


def test_mixed_devices_are_found():
    with pytest.raises(AssertionError, match="of the device and of the CPU"):
        passes("llama", "meta", AbsentDevice(), batch_on="cpu")
    with AbsentDevice() as device, pytest.raises(AssertionError):
        bool(torch.ones(3, device="meta").sum() > 1) and torch.ones(3, device="meta") * torch.ones(3)
    assert device.waits == ["aten._local_scalar_dense.default"]
