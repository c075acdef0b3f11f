"""Hooks that multiply gates into a model, at the points that the pruning space names; they can be removed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle

from cook.pruning.units import GatePoint, UnitGroup

_Key = tuple[str, int | tuple[int, ...]]
"""A group's name, and the number of consecutive features that share one gate."""


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
        self._fixed = self._expanded(fixed)
        self._values = self._fixed
        self._handles: list[RemovableHandle] = []
        self._corrected: list[tuple[torch.nn.Module, Any]] = []
        for group in groups:
            for gate in (group.gate, *group.more_gates):
                self._hook(model.get_submodule(gate.module), gate, (group.name, gate.repeat))
            for norm in group.norms:
                self._correct(model.get_submodule(norm.module), (group.name, norm.repeat))

    def set(self, values: Mapping[str, torch.Tensor]) -> None:
        """Sets the gates to use beside the fixed ones: `[units]` per group, in [0, 1]; absent groups stay open.

        The tensors may require grad: ∂L/∂z flows back to them.
        """
        unknown = set(values) - set(self._groups)
        assert not unknown, f"no gate was attached for {sorted(unknown)}"
        self._values = self._fixed | self._expanded(values)

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

    def _expanded(self, values: Mapping[str, torch.Tensor]) -> dict[_Key, torch.Tensor]:
        """The values per feature, for every number of features that share one."""
        expanded: dict[_Key, torch.Tensor] = {}
        for name, value in values.items():
            group = self._groups[name]
            assert value.shape == (group.size,), f"{name} has {group.size} units, its mask is {tuple(value.shape)}"
            gates, norms = (group.gate, *group.more_gates), group.norms
            for repeat in {*(gate.repeat for gate in gates), *(norm.repeat for norm in norms)}:
                if isinstance(repeat, tuple):
                    each = torch.tensor(repeat, device=value.device)
                    expanded[name, repeat] = value.repeat_interleave(each, output_size=sum(repeat))
                else:
                    expanded[name, repeat] = value.repeat_interleave(repeat) if repeat > 1 else value
        return expanded

    def _hook(self, module: torch.nn.Module, gate: GatePoint, key: _Key) -> None:
        if gate.at == "input":
            self._handles.append(module.register_forward_pre_hook(self._input_hook(key)))
        else:
            self._handles.append(module.register_forward_hook(self._output_hook(key)))

    def _correct(self, norm: torch.nn.Module, key: _Key) -> None:
        """Makes a norm compute over the kept features alone; its input is gated already.

        A norm over all features divides by √(Σx²/D + ε), that of the reshaped model by √(Σx²/D' + ε), with D' = Σz. The
        input times √(D/D') and the output times √(D'/D) give the latter, ε included. A LayerNorm also subtracts the
        mean over D' from the kept features alone. The module's forward is replaced, since with ZeRO-3 its weights are
        there only inside of it.
        """
        forward: Callable[[torch.Tensor], torch.Tensor] = norm.forward

        def corrected(x: torch.Tensor) -> torch.Tensor:
            z = self._values.get(key)
            if z is None:
                return forward(x)
            # Without any head, all of x is 0.
            kept = z.to(torch.promote_types(z.dtype, x.dtype)).sum().clamp(min=1e-3)
            scale = (len(z) / kept).sqrt().to(x.dtype)
            if "RMSNorm" in type(norm).__name__:
                return forward(x * scale) / scale
            z = z.to(x.dtype)
            centered = x - z * (x.sum(-1, keepdim=True) / kept).to(x.dtype)
            if type(norm) is not torch.nn.LayerNorm:  # a LayerNorm that uses its weight in its own way
                y, bias = forward(centered * scale), getattr(norm, "bias", None)
                return y / scale if bias is None else (y - bias) / scale + z * bias
            y = F.layer_norm(centered * scale, norm.normalized_shape, eps=norm.eps) / scale
            y = y if norm.weight is None else y * norm.weight
            return y if norm.bias is None else y + z * norm.bias

        self._corrected.append((norm, norm.__dict__.get("forward")))
        norm.forward = corrected

    def _input_hook(self, key: _Key) -> Callable[..., tuple[Any, ...] | None]:
        def gate_input(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            z = self._values.get(key)
            return None if z is None else (inputs[0] * z.to(inputs[0].dtype), *inputs[1:])

        return gate_input

    def _output_hook(self, key: _Key) -> Callable[..., torch.Tensor | None]:
        def gate_output(_module: torch.nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
            z = self._values.get(key)
            if z is None:
                return None
            if isinstance(output, tuple):  # an attention block of which only a bias remains
                return output[0] * z.to(output[0].dtype), *output[1:]
            return output * z.to(output.dtype)

        return gate_output

    def remove(self) -> None:
        """Removes the hooks; the model is as before."""
        for handle in self._handles:
            handle.remove()
        for norm, forward in reversed(self._corrected):
            del norm.forward
            if forward is not None:
                norm.forward = forward
        self._handles, self._corrected, self._values, self._fixed = [], [], {}, {}
