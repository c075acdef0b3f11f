"""Rows of 8,192 tokens: activation checkpointing changes what is kept, and nothing that is computed."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cook.families.source import load_model, open_model
from cook.pruning.attach import AttachedGates
from cook.training.engine import checkpoint_activations

LENGTH = 8192
# SmolLM2-135M's traits, but for the number of heads: attention over 8,192 tokens takes seconds per head.
SHAPE = LlamaConfig(
    vocab_size=8,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
)


def passes(folder, *, checkpointing: bool) -> tuple[dict[str, torch.Tensor], int]:
    """The loss and all gradients of a row, and the bytes that the forward pass keeps for the backward pass."""
    source = open_model(folder)
    model = load_model(source).train()
    if checkpointing:
        checkpoint_activations(model)
    space = source.adapter.space(source.config)
    z = {group.name: torch.full((group.size,), 0.9, requires_grad=True) for group in space.groups}
    AttachedGates(model, space.groups, {}).set(z)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.randint(0, 8, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()} | {name: value.grad for name, value in z.items()}
    return {"loss": loss.detach(), **gradients}, sum(kept.values())


def test_checkpointing_keeps_far_less_and_gives_the_same_gradients(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(SHAPE).save_pretrained(tmp_path)
    plain, kept = passes(tmp_path, checkpointing=False)
    again, kept_again = passes(tmp_path, checkpointing=True)
    assert kept_again < 0.4 * kept  # what is left is the head's: logits and their losses
    for name, value in plain.items():
        # The same operations on the same numbers; only a sum over threads could differ, by rounding.
        torch.testing.assert_close(again[name], value, rtol=1e-5, atol=1e-8, msg=name)
