"""A family that cook does not know, registered as the README tells it."""

from __future__ import annotations

import pytest
import torch
from transformers import PersimmonConfig, PersimmonForCausalLM

from cook.base.errors import UserError
from cook.export.pruned_folder import mask_model, prune_to_folder
from cook.families.layout import Attention, ConfigNames, Family, FeedForward
from cook.families.registry import register, unregister
from cook.families.source import load_model, open_model
from cook.families.stock import stock_adapter

FAMILY = Family(
    family="Persimmon",
    model_types=frozenset({"persimmon"}),
    attention=Attention(
        q="self_attn.query_key_value",
        k="self_attn.query_key_value",
        v="self_attn.query_key_value",
        interleaved=True,
        out="self_attn.dense",
        remembers={"self_attn.num_heads": "heads"},
    ),
    ffn=FeedForward(ins=("mlp.dense_h_to_4h",), out="mlp.dense_4h_to_h"),
    names=ConfigNames(kv_heads=None, head_dim=None),
)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    config = PersimmonConfig(
        vocab_size=61,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=20,
        hidden_act="gelu",
    )
    PersimmonForCausalLM(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_registered_family_is_pruned_like_any_other(folder):
    with pytest.raises(UserError, match="no adapter for models of type 'persimmon'"):
        open_model(folder)
    adapter = stock_adapter(FAMILY)
    register(adapter)
    try:
        source = open_model(folder)
        space = adapter.space(source.config)
        masks = {"layers.0.att": torch.zeros(1), "layers.1.heads": torch.tensor([1.0, 0, 0, 1])}
        masks |= {f"layers.{i}.dimff": (torch.arange(20) % 3 > 0).float() for i in range(2)}
        pruned = prune_to_folder(source, space, masks, folder.parent / "small")
        masked, small = load_model(source), load_model(open_model(pruned.folder))
        mask_model(masked, space, masks)
        ids = torch.randint(0, 61, (2, 9))
        with torch.no_grad():
            a, b = masked(input_ids=ids).logits, small(input_ids=ids).logits
        assert (a - b).abs().max() <= 1e-5 * a.abs().max()
    finally:
        unregister(adapter)
