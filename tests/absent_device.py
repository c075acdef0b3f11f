"""An accelerator that is not there: tensors that have shapes, types and a place, but no values.

They are on the meta device or, in a CUDA build of PyTorch, fake tensors of a card. Inside the mode, questions for
values get answers of the right kind, and an operation on tensors of both the device and the CPU is an error, as on an
accelerator: the meta device alone lets many of them pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
CPU_INDICES = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
"""Accelerators take indices on the CPU too."""


class AbsentDevice(TorchDispatchMode):
    """The mode; `waits` has the operations that would wait for a value of the device.

    Args:
        kind: The type of the device, `meta` or that of the fake tensors.
    """

    def __init__(self, kind: str = "meta") -> None:
        super().__init__()
        self.kind = kind
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.device.type == self.kind]
        if on_device and func not in MOVES:
            mixed = [tensor for tensor in tensors if tensor.device.type != self.kind and tensor.dim()]
            assert not mixed or func in CPU_INDICES, f"{func} gets tensors of the device and of the CPU"
        unknown = on_device or any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if unknown and (found := self._value(func, args, kwargs)) is not None:
            self.waits += [str(func)] if on_device else []
            return found
        return func(*args, **kwargs)

    def _value(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The answer to a question for a value: every condition holds, and copies are zeros."""
        asked = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if asked is None:
            return None
        if func is aten._to_copy.default and str(kwargs.get("device")) == "cpu":
            return torch.zeros(asked.shape, dtype=kwargs.get("dtype") or asked.dtype)
        if func is aten.copy_.default and asked.device.type != self.kind:
            return asked.zero_()
        if func is aten._local_scalar_dense.default:
            return True if asked.dtype == torch.bool else 1.0 if asked.is_floating_point() else 1
        if func is aten.nonzero.default:
            return torch.empty(asked.numel(), asked.dim(), dtype=torch.long, device=asked.device)
        if func in (aten._unique2.default, aten.unique_dim.default):
            counts = torch.empty(2, dtype=torch.long, device=asked.device)
            inverse = torch.empty(asked.shape, dtype=torch.long, device=asked.device)
            return torch.empty(2, dtype=asked.dtype, device=asked.device), inverse, counts
        return None


def backward_without_engine(loss: torch.Tensor) -> None:
    """`loss.backward()` node by node: PyTorch's engine would ask for the card of fake tensors."""
    gradients: dict[Any, list[Any]] = {loss.grad_fn: [torch.ones_like(loss)]}
    with torch.no_grad():
        for node in reversed(_children_first(loss.grad_fn)):
            received = gradients.pop(node, None)
            if received is None:
                continue
            if hasattr(node, "variable"):
                leaf, (gradient,) = node.variable, received
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
                continue
            is_own = isinstance(node, torch.autograd.function.BackwardCFunction)
            sent = (node.apply if is_own else node)(*received)
            sent = sent if isinstance(sent, tuple) else (sent,)
            for (child, place), gradient in zip(node.next_functions, sent, strict=False):
                if child is not None and gradient is not None:
                    wanted = child._input_metadata
                    # Nodes may leave this to the engine.
                    gradient = gradient.sum_to_size(wanted[place].shape).to(wanted[place].dtype)
                    slots = gradients.setdefault(child, [None] * len(wanted))
                    slots[place] = gradient if slots[place] is None else slots[place] + gradient


def _children_first(root: Any) -> list[Any]:
    """The nodes of a graph, each after those that get its gradients."""
    order, seen, path = list[Any](), {root}, [(root, iter(root.next_functions))]
    while path:
        node, children = path[-1]
        child = next((child for child, _ in children if child is not None and child not in seen), None)
        if child is None:
            order.append(node)
            path.pop()
        else:
            seen.add(child)
            path.append((child, iter(child.next_functions)))
    return order
