"""An accelerator that is not there: tensors on the meta device, which have shapes, types and a place, but no values.

Inside the mode, questions for values get answers of the right kind, and an operation on tensors of both the device and
the CPU is an error, as on an accelerator: the meta device alone lets many of them pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
MOVES = (aten._to_copy.default, aten.copy_.default)
CPU_INDICES = (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default)
"""Accelerators take indices on the CPU too."""


class MetaDevice(TorchDispatchMode):
    """The mode; `waits` has the operations that would wait for a value of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        on_device = [tensor for tensor in tensors if tensor.is_meta]
        if on_device and func not in MOVES:
            mixed = [tensor for tensor in tensors if not tensor.is_meta and tensor.dim()]
            assert not mixed or func in CPU_INDICES, f"{func} gets tensors of the device and of the CPU"
        if on_device and (found := self._value(func, args, kwargs)) is not None:
            self.waits.append(str(func))
            return found
        return func(*args, **kwargs)

    def _value(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The answer to a question for a value: every condition holds, and copies are zeros."""
        asked = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if func is aten._to_copy.default and asked is not None and str(kwargs.get("device")) == "cpu":
            return torch.zeros(asked.shape, dtype=kwargs.get("dtype") or asked.dtype)
        if func is aten.copy_.default and asked is not None and not asked.is_meta:
            return asked.zero_()
        if func is aten._local_scalar_dense.default and asked is not None:
            return True if asked.dtype == torch.bool else 1.0 if asked.is_floating_point() else 1
        if func is aten.nonzero.default and asked is not None:
            return torch.empty(asked.numel(), asked.dim(), dtype=torch.long, device="meta")
        if func in (aten._unique2.default, aten.unique_dim.default) and asked is not None:
            same = torch.empty(asked.shape, dtype=torch.long, device="meta")
            return (
                torch.empty(2, dtype=asked.dtype, device="meta"),
                same,
                torch.empty(2, dtype=torch.long, device="meta"),
            )
        return None
