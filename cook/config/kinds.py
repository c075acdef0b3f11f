"""The kinds of units that can be removed, and what each is called wherever a user meets it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["layer", "heads", "keys", "experts", "dimff", "head_dims", "hidden"]
"""`keys` are key-value heads whose query heads are units of their own: each goes with the last of its query heads.
`experts` are those of an FFN block that is a mixture of experts; its `dimff` are the dimensions inside them.
`head_dims` are the dimensions of every head, and `hidden` those of the residual stream: each is one group for the whole
model."""


@dataclass(frozen=True, kw_only=True)
class KindNames:
    """The names of a kind of units."""

    plural: str
    """In sentences."""
    short: str
    """In tables and figures."""
    option: str
    """In `--keep`, `--units` and `--pin`, and in the Python API."""
    stage: str
    """The first word of the stages that prune it, as in `ffn_mask`; and its `prune_mode`."""
    mask: str
    """The scheme's key for its mask file."""
    target: str
    """The key for its target, in the section of its stages."""
    tensor: str = ""
    """Its tensor in a mask file; blocks have one for attention and one for FFN blocks."""


NAMES: dict[Kind, KindNames] = {
    "layer": KindNames(
        plural="blocks",
        short="blocks",
        option="blocks",
        stage="layer",
        mask="coarse_mask",
        target="target_sparsity",
    ),
    "heads": KindNames(
        plural="heads",
        short="heads",
        option="heads",
        stage="att",
        mask="heads_mask",
        target="target_num_heads",
        tensor="heads_z",
    ),
    "experts": KindNames(
        plural="experts",
        short="experts",
        option="experts",
        stage="experts",
        mask="experts_mask",
        target="target_experts",
        tensor="experts_z",
    ),
    "dimff": KindNames(
        plural="FFN dimensions",
        short="FFN dims",
        option="dims",
        stage="ffn",
        mask="dimff_mask",
        target="target_dimff",
        tensor="dimff_z",
    ),
    "head_dims": KindNames(
        plural="head dimensions",
        short="head dims",
        option="head_dims",
        stage="headdim",
        mask="head_dims_mask",
        target="target_head_dim",
        tensor="head_dims_z",
    ),
    "hidden": KindNames(
        plural="hidden dimensions",
        short="hidden dims",
        option="hidden",
        stage="hidden",
        mask="hidden_mask",
        target="target_hidden",
        tensor="hidden_z",
    ),
}
"""All kinds but `keys`, which go with heads; in the order of their gates and of every table."""
FINE: dict[Kind, KindNames] = {kind: names for kind, names in NAMES.items() if kind != "layer"}
"""The kinds inside blocks, and those with one number for the whole model."""
FINE_STAGES = tuple(names.stage for names in FINE.values())
"""The first words of the stages that prune them."""
OPTIONAL: tuple[Kind, ...] = ("experts", "head_dims", "hidden")
"""The kinds that joint stages prune only if the scheme has a target for them."""
