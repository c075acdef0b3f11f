"""Random networks for the patterns' tests: layers of six matrices of any size."""

from __future__ import annotations

import numpy as np
import torch

from cook.sparsity.matrices import ROLES, PrunedMatrix


def network(layers=2, heads=3, head=4, hidden=12, inner=24, shared=1):
    """The matrices of a small encoder, `shared` queries to a key.

    The first layer's stand in nn.Linear's orientation, the others' turned.
    """
    matrices = []
    for layer in range(layers):
        sides = dict.fromkeys(("query", "key", "value"), (hidden, heads * head))
        sides |= dict.fromkeys(("key", "value"), (hidden, heads // shared * head))
        sides["attention_output"] = heads * head, hidden
        sides |= {"intermediate": (hidden, inner), "output": (inner, hidden)}
        for role in ROLES:
            inputs, outputs = sides[role]
            input_dim = 1 if layer == 0 else 0
            size = head if role in ("key", "value") else head * shared
            matrices.append(
                PrunedMatrix(
                    path=f"layers.{layer}.{role}",
                    role=role,
                    layer=layer,
                    head_size=size,
                    input_dim=input_dim,
                    shape=(outputs, inputs) if input_dim else (inputs, outputs),
                )
            )
    return tuple(matrices)


def random_scores(matrices, seed, kind="floats"):
    """Scores by path: `floats`; `ties`: 0 to 3, so that many are equal and many are 0; `zeros`."""
    random = np.random.default_rng(seed)
    draw = {
        "floats": lambda shape: random.standard_normal(shape) ** 2,
        "ties": lambda shape: random.integers(0, 4, shape).astype(float),
        "zeros": np.zeros,
    }[kind]
    return {m.path: torch.from_numpy(np.asarray(draw(m.shape))) for m in matrices}


def turned(values, matrices):
    """Scores or masks as numpy [K, N] by path."""
    return {m.path: values[m.path].T.numpy() if m.input_dim else values[m.path].numpy() for m in matrices}


def by_layer(values, matrices):
    """The same by layer, then role."""
    flat, layers = turned(values, matrices), {}
    for m in matrices:
        layers.setdefault(m.layer, {})[m.role] = flat[m.path]
    return layers
