"""Gates on a live model: removable hooks that multiply z where the pruning space says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from cook.pruning.units import UnitGroup


class AttachedGates:
    """Hooks of some groups on a model; a group without a value is open.

    Every rank multiplies in every layer and never branches on z, as ZeRO-3 needs. Under activation checkpointing the
    values stay as they are until `set` is called again, so the recomputation sees the same ones.
    """

    def __init__(self, model: torch.nn.Module, groups: Sequence[UnitGroup], fixed: Mapping[str, torch.Tensor]):
        """Attaches the hooks.

        Args:
            model: Its modules are named as in the space.
            groups: Those that are masked or learn a mask.
            fixed: 0/1 masks that hold from now on, by group name.
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
        """Gates to use from now on beside the fixed ones, `[units]` a group, in [0, 1]; absent groups stay open.

        The tensors may require grad: ∂L/∂z flows back to them.
        """
        unknown = set(values) - set(self._groups)
        assert not unknown, f"no gate was attached for {sorted(unknown)}"
        self._values = self._fixed | {name: self._expanded(self._groups[name], z) for name, z in values.items()}

    @contextmanager
    def opened(self, *, fixed: bool) -> Iterator[None]:
        """All gates open, for a pass of the model as its own teacher; afterwards they are as they were.

        Args:
            fixed: Those of the fixed masks too.
        """
        values, self._values = self._values, {} if fixed else self._fixed
        try:
            yield
        finally:
            self._values = values

    @staticmethod
    def _expanded(group: UnitGroup, value: torch.Tensor) -> torch.Tensor:
        assert value.shape == (group.size,), f"{group.name} has {group.size} units, its mask is {tuple(value.shape)}"
        return value.repeat_interleave(group.gate.repeat) if group.gate.repeat > 1 else value

    def _input_hook(self, name: str):
        def gate_input(_module: torch.nn.Module, inputs: tuple) -> tuple | None:
            z = self._values.get(name)
            return None if z is None else (inputs[0] * z.to(inputs[0].dtype), *inputs[1:])

        return gate_input

    def _output_hook(self, name: str):
        def gate_output(_module: torch.nn.Module, _inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
            z = self._values.get(name)
            return None if z is None else output * z.to(output.dtype)

        return gate_output

    def remove(self) -> None:
        """Takes the hooks off; the model is as it was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._values, self._fixed = [], {}, {}
