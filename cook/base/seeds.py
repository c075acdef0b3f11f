"""Seeds derived from (seed, purpose, step), so that a resumed run draws the same numbers as an uninterrupted one."""

from __future__ import annotations

import hashlib
import random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch  # takes seconds, and commands that only derive seeds do not need it


def derived_seed(seed: int, *purpose: object) -> int:
    """A 63-bit seed that depends on all arguments."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A new CPU generator for one purpose, seeded with `derived_seed`."""
    import torch

    return torch.Generator().manual_seed(derived_seed(seed, *purpose))


def seed_everything(seed: int) -> None:
    """Seeds the global generators of Python, NumPy and torch (all devices)."""
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> dict[str, torch.Tensor]:
    """The state of all global generators of this rank: torch's (used by dropout), NumPy's and Python's."""
    import torch

    from cook.base.device import random_state

    _, keys, place, has_gauss, gauss = np.random.get_state(legacy=True)
    _, words, gauss_next = random.getstate()
    state = {
        "cpu": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
        "numpy_rest": torch.tensor([place, has_gauss, gauss], dtype=torch.float64),
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([] if gauss_next is None else [gauss_next], dtype=torch.float64),
    }
    return state | random_state()


def restore_rng_state(state: dict[str, torch.Tensor]) -> None:
    """Restores the state of all generators that `rng_state` returned."""
    import torch

    from cook.base.device import restore_random_state

    torch.set_rng_state(state["cpu"])
    place, has_gauss, gauss = state["numpy_rest"].tolist()
    np.random.set_state(("MT19937", state["numpy"].numpy().astype(np.uint32), int(place), int(has_gauss), gauss))
    gauss_next = state["python_gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss_next[0] if gauss_next else None))
    restore_random_state(state)
