"""CPM-Ant again, slowly: NumPy in fp64, one position at a time, from the description of the model alone."""

from __future__ import annotations

import math

import numpy as np

_erf = np.vectorize(math.erf)


def bucket(distance: int, num_buckets: int, max_distance: int) -> int:
    half = num_buckets // 2
    side = half if distance > 0 else 0
    near = abs(distance)
    if near < half // 2:
        return side + near
    share = np.log(np.float32(near) / np.float32(half // 2)) / math.log(max_distance / (half // 2))
    return side + min(half - 1, half // 2 + int(share * (half // 2)))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def linear(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x @ weight.T / math.sqrt(weight.shape[1])


def gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def row_logits(config, weights: dict[str, np.ndarray], row: dict[str, np.ndarray]) -> np.ndarray:
    """Logits (L, V) of one row: `input, context, segment, span` of shape (L,), and `length`."""
    root, length = math.sqrt(config.dim_model), int(row["length"])
    count = len(row["input"])
    hidden = np.zeros((count, config.dim_model))
    prompts_left = 0
    for i in range(count):
        starts = i == 0 or row["span"][i] != row["span"][i - 1]
        prompts_left = config.prompt_length if starts else max(0, prompts_left - 1)
        is_prompt = i < config.prompt_length or (prompts_left > 0 and row["segment"][i] == 0 and i < length)
        table = weights["prompt_embedding.weight"] if is_prompt else weights["input_embedding.weight"]
        hidden[i] = (table[row["input"][i]] + weights["segment_embedding.weight"][row["segment"][i]]) / root
    for layer in range(config.num_layers):
        if config.has_attention(layer):
            hidden = hidden + attention(config, weights, f"encoder.layers.{layer}.self_att.", layer, hidden, row)
        if config.has_ffn(layer):
            hidden = hidden + ffn(config, weights, f"encoder.layers.{layer}.ffn.", hidden)
    hidden = rms_norm(hidden, weights["encoder.output_layernorm.weight"], config.eps)
    return hidden / root @ weights["input_embedding.weight"].T


def attention(config, weights, prefix, layer, hidden, row) -> np.ndarray:
    x = rms_norm(hidden, weights[prefix + "layernorm_before_attention.weight"], config.eps)
    q, k, v = (linear(x, weights[f"{prefix}self_attention.project_{name}.weight"]) for name in "qkv")
    table, size, count = weights["position_bias.relative_attention_bias"], config.dim_head, len(hidden)
    mixed = np.zeros_like(q)
    for column, head in enumerate(config.heads_of(layer)):
        part = slice(column * size, (column + 1) * size)
        for i in range(count):
            seen = [j for j in range(count) if sees(row, i, j)]
            if not seen:
                continue
            scores = np.array(
                [q[i, part] @ k[j, part] / math.sqrt(size) + table[pair(config, row, i, j), head] for j in seen]
            )
            probs = np.exp(scores - scores.max())
            mixed[i, part] = probs / probs.sum() @ v[seen][:, part]
    return linear(mixed, weights[prefix + "self_attention.attention_out.weight"])


def sees(row, q: int, k: int) -> bool:
    if max(q, k) >= row["length"] or row["span"][q] != row["span"][k]:
        return False
    return bool(row["context"][k]) or (not row["context"][q] and k <= q)


def pair(config, row, q: int, k: int) -> int:
    if row["segment"][q] == row["segment"][k]:
        return bucket(k - q, config.position_bias_num_buckets, config.position_bias_max_distance)
    return config.position_bias_num_buckets + row["segment"][q] * config.segment_types + row["segment"][k]


def ffn(config, weights, prefix, hidden) -> np.ndarray:
    x = rms_norm(hidden, weights[prefix + "layernorm_before_ffn.weight"], config.eps)
    if config.gated_ffn:
        inner = gelu(linear(x, weights[prefix + "ffn.w_in.w_0.weight"]))
        inner = inner * linear(x, weights[prefix + "ffn.w_in.w_1.weight"])
    else:
        inner = gelu(linear(x, weights[prefix + "ffn.w_in.w.weight"]))
    return linear(inner, weights[prefix + "ffn.w_out.weight"])
