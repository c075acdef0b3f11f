"""The sections of the scheme `l0_pruning.json`: what the masks look like before and after, and where they are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

MaskMethod = Literal["coarse-grained", "fine-grained"]
"""`coarse-grained` prunes whole attention and FFN blocks, `fine-grained` prunes heads or FFN dims inside them."""

PruneMode = Literal["att", "ffn"]
"""Which units a fine-grained stage prunes: attention heads or FFN dims."""


HeadUnitChoice = Literal["auto", "kv_group", "query_head"]
"""What a unit of attention is where query heads share keys and values."""


@dataclass(frozen=True, kw_only=True)
class CoarseConfig:
    """The scheme's `coarse-grained` section: whole attention and FFN blocks."""

    train_mask: bool
    """True: the mask is learned together with the weights. False: it is read, made binary and fixed (finetuning)."""

    coarse_mask: str
    """Mask file (`.pt`): written when learned, read when fixed."""

    target_sparsity: float
    """Share of the blocks' parameters to remove, between 0 and 1."""


@dataclass(frozen=True, kw_only=True)
class FineConfig:
    """The scheme's `fine-grained` section: heads and FFN dims inside the kept blocks."""

    train_mask: bool
    """True: the mask is learned together with the weights. False: it is read, made binary and fixed (finetuning)."""

    coarse_mask: str | None = None
    """Layer mask that says which blocks are kept. None: the model's layers are already physically removed."""

    num_heads: int
    """Attention heads of a block before pruning."""

    dim_ff: int
    """FFN dims of a block before pruning."""

    target_num_heads: int
    """Heads that every kept attention block ends with."""

    target_dimff: int
    """Dims that every kept FFN block ends with."""

    head_unit: HeadUnitChoice = "auto"
    """`kv_group`: a key-value head goes with all its query heads; `query_head`: query heads go, as many from each
    group; `auto`: groups if `target_num_heads` is a multiple of their size, else query heads."""

    allow_remote_code: bool = False
    """True: the targets may be such that the family's stock class cannot hold the result, which is then exported with
    a modeling file of its own."""

    heads_mask: str | None = None
    """Head mask file (`.pt`): written by att mask training, read by everything after it."""

    dimff_mask: str | None = None
    """FFN mask file (`.pt`): written by ffn mask training, read by everything after it."""

    prune_mode: PruneMode
    """Which of the two the described stage prunes."""


@dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """The scheme's optional `gates` section: how log_alpha learns."""

    learning_rate: float | None = None
    """Learning rate of the gates. None ("auto"): chosen by the number of steps of the stage."""

    initial_log_alpha: float = 3.0
    """log_alpha of every gate before the first step; 3 is a gate that is almost surely open."""

    ramp: float = 0.6
    """Fraction of the stage's steps in which the target rises from 0 to its final value."""
