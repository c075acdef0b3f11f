"""Hooks that multiply gates into a model, at the points that the pruning space names; they can be removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from cook.pruning.units import UnitGroup


class AttachedGates:
    """The hooks of some groups on a model; a group without a value is open.

    Every rank multiplies in every layer and never branches on z, which ZeRO-3 requires. The values stay the same
    until `set` is called again, so activation checkpointing recomputes with the same ones.
    """

    def __init__(self, model: torch.nn.Module, groups: Sequence[UnitGroup], fixed: Mapping[str, torch.Tensor]):
        """Attaches the hooks.

        Args:
            model: The model; its modules are named as in the space.
            groups: The groups that are masked or that learn a mask.
            fixed: 0/1 masks that apply from now on, by group name.
        """
        self._groups = {group.name: group for group in groups}
        self._fixed = {name: self._expanded(self._groups[name], mask) for name, mask in fixed.items()}
        self._values = self._fixed
        self._handles = []
        for group in groups:
            module = model.get_submodule(group.gate.module)
            if group.gate.at == "input":
                self._handles.append(module.register_forward_pre_hook(self._input_hook(group.name)))
            else:
                self._handles.append(module.register_forward_hook(self._output_hook(group.name)))

    def set(self, values: Mapping[str, torch.Tensor]) -> None:
        """Sets the gates to use beside the fixed ones: `[units]` per group, in [0, 1]; absent groups stay open.

        The tensors may require grad: ∂L/∂z flows back to them.
        """
        unknown = set(values) - set(self._groups)
        assert not unknown, f"no gate was attached for {sorted(unknown)}"
        self._values = self._fixed | {name: self._expanded(self._groups[name], z) for name, z in values.items()}

    @contextmanager
    def opened(self, *, fixed: bool) -> Iterator[None]:
        """Opens all gates, for a pass of the model as its own teacher; restores them afterwards.

        Args:
            fixed: Whether to open the gates of the fixed masks too.
        """
        values, self._values = self._values, {} if fixed else self._fixed
        try:
            yield
        finally:
            self._values = values

    @contextmanager
    def holding(self, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Uses other values, as `set` takes them, for a pass of the model as its own teacher."""
        before = self._values
        self.set(values)
        try:
            yield
        finally:
            self._values = before

    @staticmethod
    def _expanded(group: UnitGroup, value: torch.Tensor) -> torch.Tensor:
        assert value.shape == (group.size,), f"{group.name} has {group.size} units, its mask is {tuple(value.shape)}"
        repeat = group.gate.repeat
        if isinstance(repeat, tuple):
            return value.repeat_interleave(torch.tensor(repeat, device=value.device), output_size=sum(repeat))
        return value.repeat_interleave(repeat) if repeat > 1 else value

    def _input_hook(self, name: str) -> Callable[..., tuple[Any, ...] | None]:
        def gate_input(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            z = self._values.get(name)
            return None if z is None else (inputs[0] * z.to(inputs[0].dtype), *inputs[1:])

        return gate_input

    def _output_hook(self, name: str) -> Callable[..., torch.Tensor | None]:
        def gate_output(
            _module: torch.nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor
        ) -> torch.Tensor | None:
            z = self._values.get(name)
            return None if z is None else output * z.to(output.dtype)

        return gate_output

    def remove(self) -> None:
        """Removes the hooks; the model is as before."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._values, self._fixed = [], {}, {}
