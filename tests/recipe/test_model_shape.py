"""A model's shape, against counts by hand and against torch's own record of what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cook.families.registry import by_config
from cook.recipe.model_shape import Block, Shape, shape_of

LLAMA = dict(
    model_type="llama",
    vocab_size=96,
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": LLAMA | dict(model_type="qwen3", head_dim=16),
    "gpt_neox": dict(model_type="gpt_neox", vocab_size=96, hidden_size=64, intermediate_size=160, num_hidden_layers=3)
    | dict(num_attention_heads=4, attention_dropout=0.0, hidden_dropout=0.0),
    "cpm_ant": dict(vocab_size=96, dim_model=64, num_layers=3, num_heads=4, dim_head=16, dim_ff=160, prompt_length=4)
    | dict(position_bias_num_buckets=32, position_bias_max_distance=64, prompt_types=3, segment_types=3, eps=1e-6)
    | dict(model_type="cook_cpm_ant"),
}
ROWS, LENGTH = 8, 64


def shape(name: str) -> Shape:
    adapter = by_config(MODELS[name])
    return shape_of(adapter.space(MODELS[name]), score_bias=adapter.score_bias)


def kept_by_torch(name: str) -> int:
    """Bytes of the distinct tensors, apart from parameters, that autograd keeps in a forward pass up to the logits."""
    model = by_config(MODELS[name]).build(MODELS[name]).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.randint(96, (ROWS, LENGTH)), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", MODELS)
def test_blocks_keep_what_autograd_keeps(name):
    found = shape(name)
    blocks = sum(block.kept(width=4, bias=found.bias) for block in found.blocks)
    ends = 4 * 64 * (3 if found.bias else 4)  # the embedding's result and the last norm
    scores = 2 * 4 * found.score_heads * LENGTH**2
    # Not counted: tables of positions and statistics of norms; in GPT-NeoX, whose values are a view of the fused
    # projection, the queries and keys in it before they are rotated.
    tolerance = 0.12 if name == "gpt_neox" else 0.06
    assert ROWS * LENGTH * (blocks + ends) + scores == pytest.approx(kept_by_torch(name), rel=tolerance)


def test_what_blocks_keep_by_hand():
    attention = Block(layer=0, weights=0, norms=8, head_norms=12, inner=8, keys=4, gates=8)
    # In half precision an RMSNorm keeps its input in fp32, the normalized input and its result.
    assert attention.kept(width=2, bias=False) == 8 * (4 + 2 + 2) + 12 * (4 + 2) + 2 * (8 + 4 + 4 + 8 + 8)
    assert Block(layer=0, weights=0, norms=8, inner=20).kept(width=2, bias=True) == 2 * 8 * 2 + 2 * 20 * 2
    assert Block(layer=0, weights=0, norms=8, inner=20, inputs=2).kept(width=4, bias=True) == 4 * (2 * 8 + 4 * 20)


def test_the_shape_of_grouped_query_attention():
    found = shape("llama")
    assert [(b.inner, b.keys, b.heads, b.inputs, b.norms, b.weights) for b in found.blocks[:2]] == [
        (64, 32, 4, 1, 64, 64 * (64 + 32 + 32 + 64)),
        (160, 0, 0, 2, 64, 3 * 64 * 160),
    ]
    assert (found.hidden, found.vocab, found.tied, found.bias, len(found.layers)) == (64, 96, True, False, 3)


def test_a_pruned_model_has_smaller_blocks():
    adapter = by_config(LLAMA)
    kept = {"layers.0.dimff": 40, "layers.1.heads": 1, "layers.2.ffn": 0}
    found = shape_of(adapter.space(LLAMA), kept, gated={"dimff"})
    assert [(b.layer, b.inner, b.keys, b.gates) for b in found.blocks] == [
        (0, 64, 32, 0),
        (0, 40, 0, 40),
        (1, 32, 16, 0),
        (1, 160, 0, 160),
        (2, 64, 32, 0),
    ]
