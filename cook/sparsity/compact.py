"""Compaction of an encoder layer: removes units without effect, and divides the remaining weights into tiles.

The output of a pruned column of W is constant: its bias. Constants are added to the next matrix's bias, so the
compact layer computes the same as the masked one. Weights here are `[K, N]`: y = x W + b.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from cook.sparsity.kernels.sparse_int8 import rounded
from cook.sparsity.matrices import INPUTS
from cook.sparsity.tiles import Tiles, sparse_linear, tiles_of

Activation = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class MaskedMatrix:
    """A matrix with its mask applied."""

    weight: torch.Tensor
    """`[K, N]`, 0 where pruned."""
    mask: torch.Tensor
    bias: torch.Tensor

    def part(self, inputs: torch.Tensor | slice, outputs: torch.Tensor | slice) -> MaskedMatrix:
        """The submatrix of these rows and columns."""
        return MaskedMatrix(
            weight=self.weight[inputs][:, outputs], mask=self.mask[inputs][:, outputs], bias=self.bias[outputs]
        )


@dataclass(frozen=True, kw_only=True)
class CompactLayer:
    """The remaining part of a layer."""

    heads: int
    scale: float
    """Scale of the attention scores, from the original head size."""
    matrices: dict[str, MaskedMatrix]
    """`qkv`, `attention_output`, `intermediate`, `output`."""
    tiles: dict[str, Tiles]

    @property
    def is_dense(self) -> bool:
        """Whether no weight inside the matrices is pruned."""
        return all(bool(matrix.mask.all()) for matrix in self.matrices.values())

    def described(self) -> dict[str, Any]:
        """Its entry of `sparse_layers`."""
        entry: dict[str, Any] = {"heads": self.heads, "scale": self.scale}
        for name, matrix in self.matrices.items():
            inputs, outputs = matrix.weight.shape
            sizes = [list(pair) for pair in self.tiles[name].sizes]
            entry[name] = {"inputs": inputs, "outputs": outputs, "tiles": sizes, "block": self.tiles[name].block}
        return entry

    def tensors(self, *, int8: bool = False) -> dict[str, torch.Tensor]:
        """Its weights, by the names inside the sparse layer; `int8`: rounded, with their scales."""
        found: dict[str, torch.Tensor] = {}
        for name, matrix in self.matrices.items():
            layer = sparse_linear(matrix.weight.T, matrix.bias, self.tiles[name])
            own = layer.state_dict()
            if int8:
                own["weight"], own["scale"] = rounded(layer.weight.detach(), layer.sizes)
            found |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        return found


def compact_layer(
    matrices: Mapping[str, MaskedMatrix], *, head_size: int, activation: Activation, block: int | None = None
) -> CompactLayer:
    """Removes units without effect and finds the tiles of the rest.

    Args:
        matrices: The matrices by role.
        head_size: Dimensions per head.
        activation: The activation function of the FFN.
        block: The side of the pattern's blocks, if it consists of blocks.
    """
    heads, size, attention = _attention(matrices, head_size)
    first, second = _feed_forward(matrices["intermediate"], matrices["output"], activation, block)
    made = {**attention, "intermediate": first, "output": second}
    tiles = {name: tiles_of(matrix.mask, block=block) for name, matrix in made.items()}
    return CompactLayer(heads=heads, scale=head_size**-0.5, matrices=made, tiles=tiles)


def _attention(matrices: Mapping[str, MaskedMatrix], head_size: int) -> tuple[int, int, dict[str, MaskedMatrix]]:
    closing = matrices["attention_output"]
    query, key, value = (matrices[role] for role in INPUTS)
    # A value that is constant over tokens passes attention unchanged, since a head's attention weights sum to 1.
    constant = ~value.mask.any(0)
    bias = closing.bias.double() + (value.bias * constant).double() @ closing.weight.double()
    idle = (constant | ~closing.mask.any(1)).view(-1, head_size)
    # A product of two constants adds the same number to all scores, which does not change the softmax.
    same = (~query.mask.any(0) & ~key.mask.any(0)).view(-1, head_size)
    kept_heads = ~idle.all(1)
    kept_dims = ~(idle & same)[kept_heads].all(0)
    kept = (kept_heads[:, None] & kept_dims).flatten().nonzero()[:, 0]
    parts = [matrix.part(slice(None), kept) for matrix in (query, key, value)]
    qkv = MaskedMatrix(
        weight=torch.cat([part.weight for part in parts], 1),
        mask=torch.cat([part.mask for part in parts], 1),
        bias=torch.cat([part.bias for part in parts]),
    )
    rest = closing.part(kept, slice(None))
    # A constant that was added to the bias must not be added again.
    alive = ~constant[kept]
    rest = MaskedMatrix(
        weight=rest.weight * alive[:, None], mask=rest.mask & alive[:, None], bias=bias.to(closing.bias.dtype)
    )
    return int(kept_heads.sum()), int(kept_dims.sum()), {"qkv": qkv, "attention_output": rest}


def _feed_forward(
    first: MaskedMatrix, second: MaskedMatrix, activation: Activation, block: int | None
) -> tuple[MaskedMatrix, MaskedMatrix]:
    constant = ~first.mask.any(0)
    values = activation(first.bias.double()) * constant
    bias = second.bias.double() + values @ second.weight.double()
    kept = (~constant & second.mask.any(1)).nonzero()[:, 0]
    # Units can be in any order: in the order of the tiles the products need no reordering.
    order = [outputs for _, outputs in tiles_of(first.mask[:, kept], block=block).members]
    if block is None and order:
        kept = kept[torch.cat(order)]
    second = second.part(kept, slice(None))
    return first.part(slice(None), kept), MaskedMatrix(
        weight=second.weight, mask=second.mask, bias=bias.to(second.bias.dtype)
    )
