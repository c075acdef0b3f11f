"""Learns masks in a training loop of your own, then finetunes the masked model. Runs in seconds on a CPU.

python examples/own_training_loop.py
"""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import cook


def main() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=64, n_layer=4, n_head=4, n_positions=64))
    text = torch.tensor(list((__doc__ or "").encode() * 4))
    rows = torch.stack([row for row in text.split(64) if len(row) == 64])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    gates = cook.attach(model, {"dims": 0.5}, steps=30)
    for step in range(60):
        if step < 30:
            gates.before_forward()
        elif step == 30:
            gates.hold()  # the masks are decided; the weights adapt to them
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        if step < 30:
            gates.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss:.3f}, sparsity {max(gates.sparsity.values()):.2f}")
    gates.remove()
    small = cook.reshape(model, gates.masks())
    print(f"{model.num_parameters():,} parameters before, {small.num_parameters():,} after")
    print(f"largest relative difference of the logits: {cook.verify(model, gates.masks(), small):.1e}")


if __name__ == "__main__":
    main()
