"""Linear layers whose pruned weights cost nothing.

An export carries this file along; it needs PyTorch alone. K inputs, N outputs, M rows (tokens), T tiles, C columns
(outputs) of a tile, R rows of W (inputs) that a tile reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .sparse_plan import Plan
from .sparse_ways import run

TileSizes = Sequence[tuple[int, int]]
"""For every tile how many inputs it reads and how many outputs it makes."""


class TileWiseLinear(nn.Module):
    """y = x W + b with W pruned by tiles: the outputs are dealt out to tiles, each of which reads inputs of its own.

    Outputs of no tile are their bias. Which way of computing it is fastest for a number of rows is measured at the
    first call, a dense product being one of the ways, so it never loses to it by more than the measuring.

    Args:
        in_features: K.
        out_features: N.
        sizes: Of the tiles.
        block: Inputs come in runs of this many (the block-wise layer's B).
    """

    inputs: torch.Tensor
    """The inputs that the tiles read, tile after tile; blocks of them in a block-wise layer."""
    outputs: torch.Tensor
    """The outputs that they make, tile after tile."""

    def __init__(self, in_features: int, out_features: int, sizes: TileSizes, *, block: int = 1):
        super().__init__()
        self.in_features, self.out_features, self.block = in_features, out_features, block
        self.sizes = tuple((int(rows), int(columns)) for rows, columns in sizes)
        self.weight = nn.Parameter(torch.zeros(sum(rows * columns for rows, columns in self.sizes)))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.register_buffer("inputs", torch.zeros(sum(rows for rows, _ in self.sizes) // block, dtype=torch.int32))
        self.register_buffer("outputs", torch.zeros(sum(columns for _, columns in self.sizes), dtype=torch.int32))
        self._plan: tuple[tuple, Plan] | None = None

    def extra_repr(self) -> str:
        density = self.weight.numel() / max(1, self.in_features * self.out_features)
        return f"{self.in_features}, {self.out_features}, tiles={len(self.sizes)}, density={density:.3f}"

    def plan(self) -> Plan:
        """What the ways of computing need, made again when the weights have changed, or may have: in training."""
        weight, bias = self.weight, self.bias
        # Tensors made in inference mode count no versions.
        versions = (0, 0) if weight.is_inference() else (weight._version, bias._version)
        state = (weight.data_ptr(), bias.data_ptr(), *versions)
        found = self._plan
        if found is None or found[0] != state:
            found = self._plan = (state, Plan(self))
        return found[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`."""
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad):
            return self._differentiable(x)
        rows = x.reshape(-1, self.in_features)
        return run(self.plan(), rows, transposed=False).reshape(*x.shape[:-1], self.out_features)

    def columns(self, x_KM: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """`[K, M]` to `[N, M]`, into `out` if given; no gradients."""
        return run(self.plan(), x_KM, transposed=True, out=out)

    def _differentiable(self, x: torch.Tensor) -> torch.Tensor:
        self._plan = None  # optimizers that write through `.data` count no versions
        x_KM = x.reshape(-1, self.in_features).T
        weights = self.weight.split([rows * columns for rows, columns in self.sizes])
        indices = self.input_indices().split([rows for rows, _ in self.sizes])
        pieces = [
            weight.view(columns, rows) @ x_KM.index_select(0, index)
            for weight, index, (rows, columns) in zip(weights, indices, self.sizes, strict=True)
        ]
        y = self.bias[:, None].to(x.dtype).expand(-1, x_KM.shape[1])
        if pieces:
            y = y.index_add(0, self.outputs, torch.cat(pieces))
        return y.T.reshape(*x.shape[:-1], self.out_features)

    def input_indices(self) -> torch.Tensor:
        """The inputs that the tiles read, tile after tile, one by one also where they come in blocks."""
        if self.block == 1:
            return self.inputs
        offsets = torch.arange(self.block, dtype=self.inputs.dtype, device=self.inputs.device)
        return (self.inputs[:, None] * self.block + offsets).flatten()

    @torch.no_grad()
    def dense_weight(self) -> torch.Tensor:
        """W transposed, `[N, K]`, zeros where it is pruned."""
        dense = self.weight.new_zeros(self.out_features, self.in_features)
        at = row = column = 0
        indices = self.input_indices().long()
        for rows, columns in self.sizes:
            values = self.weight[at : at + rows * columns].view(columns, rows)
            lines = self.outputs[column : column + columns].long()
            dense[lines[:, None], indices[row : row + rows]] = values
            at, row, column = at + rows * columns, row + rows, column + columns
        return dense


class BlockWiseLinear(TileWiseLinear):
    """The same for W pruned by B × B blocks: a tile is a column of blocks, and reads whole blocks of inputs.

    Args:
        in_features: K.
        out_features: N.
        sizes: Of the tiles; inputs in multiples of `block`.
        block: B.
    """

    def __init__(self, in_features: int, out_features: int, sizes: TileSizes, *, block: int = 32):
        super().__init__(in_features, out_features, sizes, block=block)
