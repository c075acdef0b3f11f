"""Tile-wise layers from masks: outputs that read the same inputs form a tile."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from cook.sparsity.kernels.sparse_layers import BlockWiseLinear, TileWiseLinear

LEAST_WIDTH = 4
"""Mean outputs per tile below which gathering costs more than the products save; such a mask stays dense."""


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """The division of a matrix's outputs into tiles."""

    members: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """The inputs and outputs of every tile, ascending."""
    block: int
    """Inputs come in aligned runs of this length; 1 if they do not."""

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Numbers of inputs and outputs of every tile."""
        return tuple((len(inputs), len(outputs)) for inputs, outputs in self.members)


def tiles_of(mask_KN: torch.Tensor, *, block: int | None = None) -> Tiles:
    """The tiles of a mask, in the order of their first outputs; outputs without inputs are in no tile.

    A mask without tiles (vectors, single weights) gives one tile with all remaining inputs and outputs.

    Args:
        mask_KN: True where a weight is kept.
        block: The side of the mask's blocks, if it consists of blocks; None to gather inputs one by one.
    """
    groups: dict[bytes, list[int]] = {}
    for column, pattern in enumerate(np.packbits(mask_KN.T.contiguous().cpu().numpy(), axis=1)):
        groups.setdefault(pattern.tobytes(), []).append(column)
    members = []
    for columns in groups.values():
        inputs = mask_KN[:, columns[0]].nonzero()[:, 0]
        if len(inputs):
            members.append((inputs, torch.tensor(columns)))
    if members and sum(len(outputs) for _, outputs in members) / len(members) < min(LEAST_WIDTH, mask_KN.shape[1]):
        members = [(mask_KN.any(1).nonzero()[:, 0], mask_KN.any(0).nonzero()[:, 0])]
    aligned = block is not None and block > 1 and all(_is_aligned(inputs, block) for inputs, _ in members)
    return Tiles(members=tuple(members), block=block if aligned and block else 1)


def _is_aligned(inputs: torch.Tensor, block: int) -> bool:
    if len(inputs) % block:
        return False
    runs = inputs.view(-1, block)
    return bool((runs[:, 0] % block == 0).all() and (runs == runs[:, :1] + torch.arange(block)).all())


def sparse_linear(weight_NK: torch.Tensor, bias_N: torch.Tensor | None, tiles: Tiles) -> TileWiseLinear:
    """The layer that computes x W + b, where pruned weights of W are 0."""
    outputs, inputs = weight_NK.shape
    kind = BlockWiseLinear if tiles.block > 1 else TileWiseLinear
    layer = kind(inputs, outputs, tiles.sizes, block=tiles.block)
    fill(layer, weight_NK, bias_N, tiles)
    return layer


@torch.no_grad()
def fill(layer: TileWiseLinear, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, tiles: Tiles) -> None:
    """Writes the remaining dense weights and their indices into a layer of the right sizes."""
    weights = [weight_NK[outputs][:, inputs].flatten() for inputs, outputs in tiles.members]
    layer.to(weight_NK.dtype)
    if weights:
        layer.weight.copy_(torch.cat(weights))
        layer.inputs.copy_(torch.cat([inputs[:: tiles.block] // tiles.block for inputs, _ in tiles.members]))
        layer.outputs.copy_(torch.cat([outputs for _, outputs in tiles.members]))
    if bias_N is not None:
        layer.bias.copy_(bias_N)
