"""Samples of the inputs and activations of FFN blocks, read by hooks in forward passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from cook.pruning.carving import entry_points
from cook.pruning.units import UnitGroup


class FfnSamples:
    """Keeps the input and the activations of some blocks at the positions that are named before each forward pass.

    Args:
        model: The model.
        groups: The FFN dims of the blocks.
    """

    def __init__(self, model: torch.nn.Module, groups: Sequence[UnitGroup]):
        self._positions = torch.empty(0, dtype=torch.long)
        self._inputs: dict[str, list[torch.Tensor]] = {group.name: [] for group in groups}
        self._inner: dict[str, list[torch.Tensor]] = {group.name: [] for group in groups}
        self._handles = []
        for group in groups:
            for path, kept in zip(entry_points(group), (self._inputs, self._inner), strict=True):
                hook = self._hook(kept[group.name])
                self._handles.append(model.get_submodule(path).register_forward_pre_hook(hook))

    def at(self, positions: torch.Tensor) -> None:
        """The positions of the next batch to keep, as indices of its flattened `[batch, length]`."""
        self._positions = positions

    def _hook(self, kept: list[torch.Tensor]) -> Callable[..., None]:
        def keep(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
            rows = inputs[0].detach().flatten(0, -2)
            # Half the memory; a sample needs no more digits, but fp16's range would be too small.
            kept.append(rows[self._positions.to(rows.device)].to("cpu", torch.bfloat16))

        return keep

    def of(self, group: UnitGroup, out_columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A block's inputs `[T, H]` and the energies of its dims `[T, F]`, h²·‖w‖², fp32; they are kept no longer.

        Args:
            group: The block's dims.
            out_columns: The norm of each dim's weights in the output projection, `[F]`.
        """
        inputs, inner = (torch.cat(kept.pop(group.name)).float() for kept in (self._inputs, self._inner))
        return inputs, (inner * out_columns.float()).square()

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()
