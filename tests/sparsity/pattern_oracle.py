"""The patterns once more, in numpy loops over W as [K, N], written from the specification alone."""

from __future__ import annotations

import itertools

import numpy as np

QKV = ("query", "key", "value")


def above(values, s):
    return values > np.percentile(values, s) if values.size else np.zeros(values.shape, bool)


def gran(score, size, s):
    mask = np.zeros(score.shape, bool)
    for start in range(0, score.shape[1], size):
        norms = np.array([np.sqrt((row**2).sum()) for row in score[:, start : start + size]])
        mask[:, start : start + size] = above(norms, s)[:, None]
    return mask


def heads(layer, head, s, by_index, historical, size):
    """`layer`: role to a [K, N] score."""
    masks = {}
    if historical:
        for role, score in layer.items():
            if role not in QKV:
                masks[role] = gran(score, size, s)
                continue
            owner = np.arange(len(score)) % head if by_index else np.arange(len(score)) // head
            norms = np.array([np.sqrt((score[owner == u] ** 2).sum()) for u in range(owner.max() + 1)])
            masks[role] = np.repeat(above(norms, s)[owner][:, None], score.shape[1], axis=1)
        return masks
    shared = layer["key"].shape[1] // head  # heads of keys and values, each with the queries that share it
    total, owners = np.zeros(head if by_index else shared), {}
    for role in (*QKV, "attention_output"):
        dims = (layer[role].T if role in QKV else layer[role]) ** 2  # one row a head's dim
        owners[role] = np.array([i % head if by_index else i * shared // len(dims) for i in range(len(dims))])
        for u in range(len(total)):
            total[u] += dims[owners[role] == u].sum()
    kept = above(np.sqrt(total), s)
    for role, score in layer.items():
        if role in QKV:
            masks[role] = np.tile(kept[owners[role]], (len(score), 1))
        elif role == "attention_output":
            masks[role] = np.tile(kept[owners[role]][:, None], (1, score.shape[1]))
        else:
            masks[role] = gran(score, size, s)
    return masks


def joint(layer, s, size):
    together = np.concatenate([layer[role] for role in QKV], axis=1)
    kept = above(np.sqrt((together**2).sum(1)), s)
    masks = {role: np.repeat(kept[:, None], layer[role].shape[1], axis=1) for role in QKV}
    return masks | {role: gran(score, size, s) for role, score in layer.items() if role not in QKV}


def vectors(score, size, s, keep_all):
    mask = np.zeros(score.shape, bool)
    for start in range(0, len(score), size):
        part = score[start : start + size]
        k = int((1 - s / 100) * len(part))
        for column in range(score.shape[1]):
            if k == 0 and keep_all:
                mask[start : start + size, column] = True
            else:
                least = sorted(part[:, column], reverse=True)[max(k, 1) - 1]
                mask[start : start + size, column] = part[:, column] >= least
    return mask


def blocks(score, size, s):
    rows, columns = score.shape[0] // size, score.shape[1] // size
    norms = np.zeros((rows, columns))
    for i, j in itertools.product(range(rows), range(columns)):
        norms[i, j] = np.linalg.norm(score[i * size : (i + 1) * size, j * size : (j + 1) * size])
    return np.kron(above(norms, s), np.ones((size, size))).astype(bool)


def local_kn(score, size, s):
    return gran(score, size, s) & above(np.sqrt((score**2).sum(0)), s)


def tile_k(scores, size, s):
    norms = {}
    for name, score in scores.items():
        for tile in range(score.shape[1] // size):
            part = score[:, tile * size : (tile + 1) * size]
            norms[name, tile] = np.sqrt((part**2).sum(1)) / size
    threshold = np.percentile(np.concatenate(list(norms.values())), s)
    masks = {name: np.zeros(score.shape, bool) for name, score in scores.items()}
    for (name, tile), values in norms.items():
        masks[name][:, tile * size : (tile + 1) * size] = (values > threshold)[:, None]
    return masks


def tile_kn(scores, size, s):
    """The historical type 8, quirks and all; it knows nothing of earlier masks."""
    norms = {name: np.sqrt((score**2).sum(0)) / len(score) for name, score in scores.items()}
    threshold = np.percentile(np.concatenate(list(norms.values())), s)
    tiles, columns = [], {}
    for name, score in scores.items():
        columns[name] = norms[name] > threshold
        start = count = 0
        for column in range(score.shape[1]):
            count += columns[name][column]
            if count == size and column < score.shape[1] - 1 and columns[name][column]:
                tiles.append((name, start, column + 1))
                start, count = column + 1, 0
        tiles.append((name, start, score.shape[1]))
    rows = []
    for name, start, end in tiles:
        part = scores[name][:, start:end] * columns[name][start:end]
        rows.append(np.sqrt((part**2).sum(1)) / (end - start))
    threshold = np.percentile(np.concatenate(rows), s)
    masks = {name: np.zeros(score.shape, bool) for name, score in scores.items()}
    for (name, start, end), values in zip(tiles, rows, strict=True):
        masks[name][:, start:end] = (values > threshold)[:, None] & columns[name][start:end]
    return masks


def two_of_four(score):
    mask = np.zeros(score.shape, bool)
    for column in range(score.shape[1]):
        for start in range(0, len(score), 4):
            best = sorted(range(4), key=lambda i, at=start, c=column: (-score[at + i, c], i))[:2]
            for i in best:
                mask[start + i, column] = True
    return mask
