"""Hooks that multiply gates into a model, at the points that the pruning space names; they can be removed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from cook.pruning.routing import routed
from cook.pruning.units import GatePoint, UnitGroup

Layout = tuple[int | tuple[int, ...], tuple[int, ...]]
"""How gates lie along features: `repeat` and `features` of a gate point."""
Expanded = dict[Layout, torch.Tensor]
"""A group's value of each feature, by layout."""


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
        self._model, self._groups = model, {group.name: group for group in groups}
        self._fixed = {name: self._expanded(self._groups[name], mask) for name, mask in fixed.items()}
        self._values: dict[str, Expanded] = self._fixed
        self._handles: list[RemovableHandle] = []
        self._mixing: list[RemovableHandle] = []
        self._replaced: list[tuple[torch.nn.Module, Any]] = []
        for group in groups:
            for gate in group.gates:
                self._hook(model.get_submodule(gate.module), gate, group.name)

    def set(self, values: Mapping[str, torch.Tensor]) -> None:
        """Sets the gates to use beside the fixed ones: `[units]` per group, in [0, 1]; absent groups stay open.

        The tensors may require grad: ∂L/∂z flows back to them.
        """
        unknown = set(values) - set(self._groups)
        assert not unknown, f"no gate was attached for {sorted(unknown)}"
        self._values = self._fixed | {name: self._expanded(self._groups[name], z) for name, z in values.items()}

    def compensate(self, means: Mapping[str, torch.Tensor]) -> None:
        """From now on gates mix features with their means: z · x + (1 − z) · mean (`cook.pruning.compensation`).

        Args:
            means: The mean of each input feature of the output projection, `[features]`, by group name. Where other
                groups have gates there too, as keys and head dimensions, z is the product of all.
        """
        for handle in self._mixing:
            handle.remove()
        self._mixing = []
        for name, mean in means.items():
            module = self._groups[name].gate.module
            here = [(owner, _layout(gate)) for owner, gate in gates_before(module, self._groups.values())]
            hook = self._mixing_hook(here, mean)  # registered after the hooks of the gates
            self._mixing.append(self._model.get_submodule(module).register_forward_pre_hook(hook))

    def _mixing_hook(self, here: Sequence[tuple[str, Layout]], mean: torch.Tensor) -> Callable[..., Any]:
        def add_mean(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            values = [z for z in (self._at(name, layout) for name, layout in here) if z is not None]
            if not values:
                return None
            x, *others = inputs
            return x + ((1 - math.prod(values[1:], start=values[0])) * mean).to(x.dtype), *others

        return add_mean

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
    def _expanded(group: UnitGroup, value: torch.Tensor) -> Expanded:
        """The value of each feature, for every way in which the group's gates lie along features."""
        assert value.shape == (group.size,), f"{group.name} has {group.size} units, its mask is {tuple(value.shape)}"
        layouts = {_layout(gate) for gate in group.gates}
        return {layout: _spread(value, layout) for layout in layouts}

    def _at(self, name: str, layout: Layout) -> torch.Tensor | None:
        """The values of a group's gates, one per feature of this layout; None if they are open."""
        return self._values[name][layout] if name in self._values else None

    def _hook(self, module: torch.nn.Module, gate: GatePoint, name: str) -> None:
        if gate.at == "input":
            self._handles.append(module.register_forward_pre_hook(self._found(self._input_hook(gate, name))))
            self._replace(module, self._folded(module, gate, name))
        elif gate.at == "output":
            self._handles.append(module.register_forward_hook(self._found(self._output_hook(gate, name))))
        elif gate.at in ("softmax", "sigmoid"):
            hook = self._found(self._router_hook(gate, name))
            # Before the hooks by which transformers collects the logits for the loss that balances experts.
            self._handles.append(module.register_forward_hook(hook, prepend=True))
        else:
            self._replace(module, (self._scaled if gate.at == "weight" else self._corrected)(module, gate, name))

    def _found(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The hook, from which `gates_on` finds these gates."""
        hook.gates = self  # type: ignore[attr-defined]
        return hook

    def _replace(self, module: torch.nn.Module, forward: Callable[..., Any]) -> None:
        self._replaced.append((module, module.__dict__.get("forward")))
        module.forward = forward

    def _folded(self, module: torch.nn.Module, gate: GatePoint, name: str) -> Callable[..., Any]:
        """A forward pass in which gates of the input multiply the weight instead, where that is cheaper."""
        forward: Callable[..., Any] = module.forward

        def folded(x: torch.Tensor, *inputs: Any, **named: Any) -> Any:
            z = self._at(name, _layout(gate))
            if z is None or not self._folds(module, x, z):
                return forward(x, *inputs, **named)
            weight = module.get_parameter("weight")
            is_transposed = isinstance(module, Conv1D)
            module.__dict__["weight"] = weight * (z[:, None] if is_transposed else z).to(weight.dtype)
            try:
                return forward(x, *inputs, **named)
            finally:
                del module.__dict__["weight"]

        return folded

    def _folds(self, module: torch.nn.Module, x: torch.Tensor, z: torch.Tensor) -> bool:
        """Whether gates of a product's input `x` multiply its weight instead: (x · z) Wᵀ = x (W · z)ᵀ.

        It costs fewer operations and less memory if there are more tokens than outputs, and if the gradient of the
        weight is needed in any case, as that of z follows from it. With ZeRO-3, a copy of the whole weight would stay
        until the backward pass. Where another hook reads the input, as distillation does, it must be the gated one.
        """
        weight = module._parameters.get("weight")
        if weight is None or weight.ndim != 2 or not (z.requires_grad and weight.requires_grad):
            return False
        tokens = x.numel() // x.shape[-1]
        return (
            len(module._forward_pre_hooks) == 1
            and not hasattr(weight, "ds_id")
            and tokens * x.shape[-1] > weight.numel()
        )

    def _scaled(self, module: torch.nn.Module, gate: GatePoint, name: str) -> Callable[..., Any]:
        """A forward pass in which the module's weight is multiplied: what is inside of it has no module of its own."""
        forward: Callable[..., Any] = module.forward

        def scaled(*inputs: Any, **named: Any) -> Any:
            z = self._at(name, _layout(gate))
            if z is None:
                return forward(*inputs, **named)
            weight = module.get_parameter(gate.weight)
            by_expert = z.view(len(weight), -1).unsqueeze(3 - gate.dim)
            module.__dict__[gate.weight] = weight * by_expert.to(weight.dtype)  # found before the parameter
            try:
                return forward(*inputs, **named)
            finally:
                del module.__dict__[gate.weight]

        return scaled

    def _corrected(self, norm: torch.nn.Module, gate: GatePoint, name: str) -> Callable[..., Any]:
        """A forward pass of a norm over the kept features alone; its input is gated already.

        A norm over all features divides by √(Σx²/D + ε), that of the reshaped model by √(Σx²/D' + ε), with D' = Σz².
        The input times √(D/D') and the output times √(D'/D) give the latter, ε included. With squares, gates that are
        all equal multiply the output as they multiply the input, so that fractions are not free. A LayerNorm also
        subtracts the mean, Σx/Σz, from the kept features alone. The module's forward is replaced, since with ZeRO-3
        its weights are there only inside of it.
        """
        forward: Callable[..., Any] = norm.forward

        def corrected(x: torch.Tensor) -> Any:
            z = self._at(name, _layout(gate))
            if z is None:
                return forward(x)
            # Without any head, all of x is 0.
            z = z.to(torch.promote_types(z.dtype, x.dtype))
            kept = (z**2).sum().clamp(min=1e-3)
            scale = (len(z) / kept).sqrt().to(x.dtype)
            if "RMSNorm" in type(norm).__name__:
                return forward(x * scale) / scale
            mean, z = x.sum(-1, keepdim=True) / z.sum().clamp(min=1e-3), z.to(x.dtype)
            centered = x - z * mean.to(x.dtype)
            if type(norm) is not torch.nn.LayerNorm:  # a LayerNorm that uses its weight in its own way
                y, bias = forward(centered * scale), getattr(norm, "bias", None)
                return y / scale if bias is None else (y - bias) / scale + z * bias
            y = F.layer_norm(centered * scale, norm.normalized_shape, eps=norm.eps) / scale
            y = y if norm.weight is None else y * norm.weight
            return y if norm.bias is None else y + z * norm.bias

        return corrected

    def _input_hook(self, gate: GatePoint, name: str) -> Callable[..., tuple[Any, ...] | None]:
        def gate_input(module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            z = self._at(name, _layout(gate))
            if z is None or self._folds(module, inputs[0], z):
                return None
            return inputs[0] * z.to(inputs[0].dtype), *inputs[1:]

        return gate_input

    def _output_hook(self, gate: GatePoint, name: str) -> Callable[..., torch.Tensor | None]:
        def gate_output(_module: torch.nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
            z = self._at(name, _layout(gate))
            if z is None:
                return None
            if isinstance(output, tuple):  # an attention block of which only a bias remains, or a block of experts
                return output[0] * z.to(output[0].dtype), *output[1:]
            return output * z.to(output.dtype)

        return gate_output

    def _router_hook(self, gate: GatePoint, name: str) -> Callable[..., Any]:
        def gate_router(router: torch.nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
            z = self._at(name, _layout(gate))
            return None if z is None else routed(router, output, z, gate.at)  # type: ignore[arg-type]

        return gate_router

    def remove(self) -> None:
        """Removes the hooks; the model is as before."""
        for handle in (*self._handles, *self._mixing):
            handle.remove()
        for module, forward in reversed(self._replaced):
            del module.forward
            if forward is not None:
                module.forward = forward
        self._handles, self._mixing, self._replaced, self._values, self._fixed = [], [], [], {}, {}


def gates_on(model: torch.nn.Module) -> list[AttachedGates]:
    """All gates that are attached to a model."""
    modules = [*model.modules()]
    hooks = [hook for m in modules for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    return [*dict.fromkeys(hook.gates for hook in hooks if hasattr(hook, "gates"))]


def gates_before(module: str, groups: Iterable[UnitGroup]) -> list[tuple[str, GatePoint]]:
    """The gates on the input of a module, each with the name of its group."""
    gates = [(group.name, gate) for group in groups for gate in group.gates]
    return [(name, gate) for name, gate in gates if gate.at == "input" and gate.module == module]


def by_feature(gate: GatePoint, value: torch.Tensor) -> torch.Tensor:
    """The value of each feature of a gate point, `[features]`, from one per unit."""
    return _spread(value, _layout(gate))


def _layout(gate: GatePoint) -> Layout:
    return gate.repeat, gate.features


def _spread(value: torch.Tensor, layout: Layout) -> torch.Tensor:
    repeat, features = layout
    if features:
        return torch.cat([value, value.new_ones(1)])[torch.tensor(features, device=value.device)]
    if isinstance(repeat, tuple):
        return value.repeat_interleave(torch.tensor(repeat, device=value.device), output_size=sum(repeat))
    return value.repeat_interleave(repeat) if repeat > 1 else value
