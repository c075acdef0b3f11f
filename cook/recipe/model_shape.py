"""A model's shape, as the arithmetic of a plan needs it: features and weights of its blocks.

Korthikanti et al. 2022, Reducing activation recomputation in large transformer models, sec. 4, count the activations of
a layer term by term, as it is done here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

from cook.pruning.counts import Kept, kept_shapes, parameters
from cook.pruning.units import PruningSpace, UnitGroup


@dataclass(frozen=True, kw_only=True)
class Block:
    """An attention or FFN block, in features per token."""

    layer: int
    weights: int
    """Entries of its matrices."""
    norms: int
    """Features of its norms of hidden states, together."""
    head_norms: int = 0
    """Features of its norms of queries and keys."""
    inner: int
    """Inputs of its output projection: features of all heads, or FFN dimensions."""
    keys: int = 0
    """Features of the keys, and of the values; 0 in an FFN."""
    heads: int = 0
    """Query heads; 0 in an FFN."""
    inputs: int = 1
    """Products with the hidden states that an FFN begins with: 2 if it is gated."""
    gates: int = 0
    """Features that masks multiply."""

    def kept(self, *, width: int, bias: bool) -> int:
        """Bytes per token that the forward pass keeps for the backward pass (Korthikanti et al., sec. 4.1).

        A norm keeps its input and its result; an RMSNorm without a fused kernel computes in fp32 and keeps the
        normalized input too. Attention keeps queries, keys, values and its result, and no scores. An FFN keeps the
        input of its activation and its result, and a gated one the other product and their product. (ReLU keeps only
        its result, GPT-2's GELU six tensors; eager attention, as in Gemma 2, also keeps the scores.)

        Args:
            width: Bytes per number.
            bias: Whether norms have a bias: a LayerNorm, which is fused.
        """
        norms = self.norms * (2 * width if bias else 4 + 2 * width) + self.head_norms * (4 + width)
        inner = 2 * self.inner + 2 * self.keys if self.keys else 2 * self.inputs * self.inner
        return norms + width * (inner + self.gates)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What the arithmetic needs to know about a model."""

    parameters: int
    hidden: int
    vocab: int
    """Rows of the output projection; 0 without one."""
    tied: bool
    """Whether it is the input embedding, too."""
    bias: bool
    """Whether norms have a bias."""
    blocks: tuple[Block, ...]
    score_heads: int = 0
    """Heads with a learned bias, which is added to the scores of all layers; 0: none."""

    @property
    def layers(self) -> list[list[Block]]:
        """Blocks by layer."""
        return [[block for block in self.blocks if block.layer == n] for n in sorted({b.layer for b in self.blocks})]


def shape_of(
    space: PruningSpace, kept: Kept | None = None, *, score_bias: bool = False, gated: Collection[str] = ()
) -> Shape:
    """Reads a model's shape from its pruning space.

    Args:
        space: The pruning space.
        kept: Units that each group keeps.
        score_bias: Whether a learned bias per head is added to the attention scores.
        gated: The kinds of units that masks multiply.
    """
    shapes = kept_shapes(space, kept or {})
    groups = [group for group in (*space.groups, *space.unprunable) if group.kind in ("heads", "dimff")]
    found = [_block(space, group, shapes, gated) for group in groups if group.slices[-1].path in shapes]
    logits = shapes.get(space.logits_weight, (0, 0))
    return Shape(
        parameters=parameters(space, kept),
        hidden=logits[1],
        vocab=logits[0],
        tied=sum(shape == logits for shape in shapes.values()) == 1,
        bias=any(f"{path.removesuffix('weight')}bias" in shapes for path in _norms(shapes)),
        blocks=tuple(sorted(found, key=lambda block: block.layer)),
        score_heads=max((block.heads for block in found), default=0) if score_bias else 0,
    )


def _norms(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    return [path for path, shape in shapes.items() if len(shape) == 1 and path.endswith("weight")]


def _block(
    space: PruningSpace, group: UnitGroup, shapes: Mapping[str, tuple[int, ...]], gated: Collection[str]
) -> Block:
    block, out = space.block(group), group.slices[-1]
    inside = {piece.path: shapes[piece.path] for piece in block.slices if piece.path in shapes}
    if group.active:
        # As many weights and features as one token passes through.
        experts, dims = shapes[out.path][0], shapes[out.path][out.dim]
        hidden = prod(shapes[out.path]) // (experts * dims)
        weights = [prod(x) if len(x) == 2 else prod(x) // experts * group.active for x in inside.values() if len(x) > 1]
        return Block(
            layer=group.layer,
            weights=sum(weights),
            norms=hidden * len([path for path in _norms(inside) if inside[path] == (hidden,)]),
            inner=dims * group.active,
            inputs=2,
            gates=hidden if "layer" in gated else 0,
        )
    matrices = {path: prod(shape) for path, shape in inside.items() if len(shape) == 2}
    inner = shapes[out.path][out.dim]
    hidden = matrices[out.path] // inner if inner else 1
    outputs = (sum(matrices.values()) - matrices[out.path]) // hidden  # queries, keys, values; or gate and up
    attends = group.kind == "heads"
    keys = (outputs - inner) // 2 if attends else 0
    norms = [inside[path] == (hidden,) for path in _norms(inside)]
    return Block(
        layer=group.layer,
        weights=sum(matrices.values()),
        norms=hidden * sum(norms),
        head_norms=inner + keys if not all(norms) else 0,  # norms of queries and of keys come in pairs
        inner=inner,
        keys=keys,
        heads=inner * group.members // out.block if attends else 0,
        inputs=1 if attends else outputs // max(1, inner),
        gates=(inner if group.kind in gated else 0) + (hidden if "layer" in gated else 0),
    )
