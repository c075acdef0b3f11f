"""cook: structured pruning of transformer language models, learned in the pretraining stage.

The names below are the public face; they load when first used, so that `import cook` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.2.0"

_HOMES = {
    "plan": "cook.api",
    "mean_inputs": "cook.learning",
    "learn_masks": "cook.learning",
    "learn_nested_masks": "cook.learning",
    "search_blocks": "cook.learning",
    "reshape": "cook.reshaping",
    "verify": "cook.reshaping",
    "attach": "cook.api",
    "attach_nested": "cook.api",
    "PruningCallback": "cook.trainer_callback",
    "load_config": "cook.config.load",
    "open_model": "cook.families.source",
    "read_masks": "cook.pruning.mask_file",
    "write_mask_file": "cook.pruning.mask_file",
    "prune_to_folder": "cook.export.pruned_folder",
    "AttachedGates": "cook.pruning.attach",
    "Gates": "cook.pruning.gates",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cook' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
