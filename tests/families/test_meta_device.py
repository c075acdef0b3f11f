"""Every family computes a step's passes on a device other than the CPU: with gates, packed rows and a teacher."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from cook.data.token_loss import model_inputs, summed_cross_entropy
from cook.distill.distiller import Distiller, model_teacher
from cook.distill.taps import Pair, Place
from cook.families.registry import by_config
from cook.pruning.attach import AttachedGates
from cook.pruning.compensation import compensable, with_bias
from cook.pruning.mask_set import consistent, fits
from cook.pruning.reshape import reshaped, restored
from tests.meta_device import MetaDevice
from tests.tiny_families import FAMILIES, MOE, MORE, tiny_config
from tests.tiny_pruning import config_of

POSITION = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])


def packed_batch() -> dict[str, torch.Tensor]:
    ids, segment = torch.arange(16).view(2, 8), torch.full((2, 8), 2)
    rest = {"length": torch.full((2,), 8), "context": torch.zeros(2, 8, dtype=torch.bool), "segment": segment}
    return {"input": ids, "position": POSITION, "span": (POSITION == 0).cumsum(1) - 1, "targets": ids, **rest}


def passes(
    config: dict[str, Any], batch: dict[str, torch.Tensor], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Runs the passes; the gates' gradients."""
    adapter = by_config(config)
    space = adapter.space(config)
    with torch.device("meta"):
        model, teacher = (adapter.build(config).to(dtype) for _ in range(2))
    gates = AttachedGates(model, space.every, {})
    z = {group.name: torch.ones(group.size, device="meta", requires_grad=True) for group in space.every}
    gates.set(z)
    layers = next(path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList))
    place = Place("pre", f"{layers}.1")
    distiller = Distiller(
        model,
        model_teacher(teacher, adapter.inputs),
        ce_scale=1.0,
        ce_temp=2.0,
        mse_hidn_scale=1.0,
        hidden_pairs=[Pair(place, place)],
    )
    out = model(**adapter.inputs(model_inputs(batch)))
    loss = summed_cross_entropy(out.logits, batch) + distiller(batch, out.logits)
    assert loss.is_meta and out.logits.shape == (*batch["input"].shape, config["vocab_size"])
    loss.backward()
    return {name: value.grad for name, value in z.items()}


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    """Torch knows no autocast for the meta device."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *kind: False)
    monkeypatch.setattr(torch, "autocast", lambda *kind, **options: contextlib.nullcontext())


@pytest.mark.parametrize("name", [*FAMILIES, *MOE, *MORE, "cpm_ant"])
def test_no_pass_of_a_family_mixes_devices(name):
    config = dict(config_of()) if name == "cpm_ant" else tiny_config(name)
    with MetaDevice():
        batch = {key: value.to("meta") for key, value in packed_batch().items()}
        # PyTorch's grouped products of experts take only bf16 on the meta device.
        gradients = passes(config, batch, torch.bfloat16 if name in MOE else torch.float32)
    assert all(gradient is not None and gradient.is_meta for gradient in gradients.values())


@pytest.mark.parametrize("name", [*FAMILIES, *MOE, "cpm_ant"])
def test_weights_are_cut_put_back_and_compensated_where_they_are(name):
    config = dict(config_of()) if name == "cpm_ant" else tiny_config(name)
    adapter = by_config(config)
    space = adapter.space(config, adapter.head_units(config)[-1])
    groups = [group for group in space.every if group.kind != "layer"]
    halves = {group.name: (torch.arange(group.size) >= group.size // 2).float() for group in groups}
    masks = consistent(space, {group.name: halves[group.name] for group in groups if fits(group, halves[group.name])})
    features = {g.name: space.shapes[g.slices[-1].path][g.slices[-1].dim] for g in compensable(space, space.groups)}
    means = {name: torch.ones(count) for name, count in features.items()}
    whole = {path: torch.empty(shape, device="meta") for path, shape in space.shapes.items()}
    with MetaDevice():
        weights = dict(with_bias(whole.items(), space, masks, means))
        small = dict(reshaped(weights, space, masks))
        back = dict(restored(small.items(), whole, space, masks, None))
    assert all(tensor.is_meta for tensor in (*small.values(), *back.values()))
    assert {path: tuple(tensor.shape) for path, tensor in back.items()} == dict(space.shapes)


def test_mixed_devices_are_found():
    config = tiny_config("llama")
    with MetaDevice(), pytest.raises(AssertionError, match="of the device and of the CPU"):
        passes(config, packed_batch())
    with MetaDevice() as device, pytest.raises(AssertionError):
        bool(torch.ones(3, device="meta").sum() > 1) and torch.ones(3, device="meta") * torch.ones(3)
    assert device.waits == ["aten._local_scalar_dense.default"]
