"""Memory that pruned layers work in.

An export carries this file along.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch


class Workspace(threading.local):
    """Memory that products write into and the next ones use again: each thread has its own."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def get(self, name: str, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """An uninitialised tensor that the next call with this name takes back."""
        count = 1
        for size in shape:
            count *= size
        key = (name, like.dtype, like.device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[key] = torch.empty(count, dtype=like.dtype, device=like.device)
        return buffer[:count].view(*shape)


WORKSPACE = Workspace()
