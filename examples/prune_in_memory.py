"""Prunes a small model in one process: plan, learn masks, reshape, verify. Runs in seconds on a CPU.

python examples/prune_in_memory.py
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import cook


def main() -> None:
    torch.manual_seed(0)
    # Any transformers model of a known family; a small fresh one here, so that nothing is downloaded.
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192)
    )
    text = torch.tensor(list((__doc__ or "").encode()))
    batches = [{"input_ids": part[None]} for part in text.split(64) if len(part) == 64]

    keep = {"heads": 0.5, "dims": 0.5}
    print(cook.plan(model, keep))
    means = cook.mean_inputs(model, batches)  # what removed units add on average stays as a bias
    masks = cook.learn_masks(model, batches, keep, steps=30, means=means)
    small = cook.reshape(model, masks, means=means)
    print(f"{model.num_parameters():,} parameters before, {small.num_parameters():,} after")
    difference = cook.verify(model, masks, small, means=means)
    print(f"largest relative difference of the logits: {difference:.1e}")


if __name__ == "__main__":
    main()
