"""The passes of a step of any family, on a device that is not there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from cook.data.token_loss import model_inputs, summed_cross_entropy
from cook.distill.distiller import Distiller, model_teacher
from cook.distill.taps import Pair, Place
from cook.families.registry import by_config
from cook.pruning.attach import AttachedGates
from tests.models.cpm_ant_tiny import SIZES
from tests.tiny_families import FAMILIES, MOE, MORE, tiny_config

NAMES = (*FAMILIES, *MOE, *MORE, "cpm_ant")


def config_named(name: str) -> dict[str, Any]:
    return {"model_type": "cook_cpm_ant", **SIZES} if name == "cpm_ant" else tiny_config(name)


def passes(
    name: str,
    device: str,
    *modes: contextlib.AbstractContextManager[Any],
    batch_on: str | None = None,
    backward: Callable[[torch.Tensor], None] = torch.Tensor.backward,
) -> None:
    """A step's passes with gates on every unit, packed rows and a teacher whose hidden states are compared too.

    Args:
        name: The family.
        device: The type of the device.
        modes: In which its tensors exist.
        batch_on: The device of the batch; None: the same.
        backward: Computes the gradients of a loss.
    """
    config = config_named(name)
    adapter = by_config(config)
    space = adapter.space(config)
    with contextlib.ExitStack() as stack:
        for mode in (_without_autocast(), *modes):
            stack.enter_context(mode)
        with torch.device(device):
            models = [adapter.build(config) for _ in range(2)]
        # PyTorch's grouped products of experts take only bf16 where there are no values.
        model, teacher = map(_in_bf16, models) if name in MOE else models
        gates = AttachedGates(model, space.every, {})
        z = {group.name: torch.ones(group.size, device=device, requires_grad=True) for group in space.every}
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
        batch = _packed_batch(batch_on or device)
        out = model(**adapter.inputs(model_inputs(batch)))
        loss = summed_cross_entropy(out.logits, batch) + distiller(batch, out.logits)
        assert loss.device.type == device and out.logits.shape == (*batch["input"].shape, config["vocab_size"])
        backward(loss)
    assert all(value.grad is not None and value.grad.device.type == device for value in z.values())


def _packed_batch(device: str) -> dict[str, torch.Tensor]:
    """Two rows of several texts each."""
    ids, segment = torch.arange(16).view(2, 8), torch.full((2, 8), 2)
    rest = {"length": torch.full((2,), 8), "context": torch.zeros(2, 8, dtype=torch.bool), "segment": segment}
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 0, 1]])
    batch = {"input": ids, "position": position, "span": (position == 0).cumsum(1) - 1, "targets": ids, **rest}
    return {name: value.to(device) for name, value in batch.items()}


@contextlib.contextmanager
def _without_autocast() -> Iterator[None]:
    """PyTorch knows no autocast for devices that are not there."""
    is_enabled, autocast = torch.is_autocast_enabled, torch.autocast
    torch.is_autocast_enabled = lambda *kind: False
    torch.autocast = lambda *kind, **options: contextlib.nullcontext()  # type: ignore[assignment, misc]
    try:
        yield
    finally:
        torch.is_autocast_enabled, torch.autocast = is_enabled, autocast  # type: ignore[misc]


def _in_bf16(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():  # not `to`, which needs values to swap the parameters of some families
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.detach().to(torch.bfloat16))
    return model
