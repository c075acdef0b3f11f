"""Learns masks inside a Hugging Face `Trainer`, while it trains the weights. Runs in seconds on a CPU.

python examples/huggingface_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import cook


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=192)
    )
    text = torch.tensor(list((__doc__ or "").encode() * 8))
    rows = [{"input_ids": row, "labels": row} for row in text.split(64) if len(row) == 64]

    callback = cook.PruningCallback({"dims": 0.5})
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=30,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    small = cook.reshape(model, callback.masks)
    print(f"{model.num_parameters():,} parameters before, {small.num_parameters():,} after")
    print(f"largest relative difference of the logits: {cook.verify(model, callback.masks, small):.1e}")


if __name__ == "__main__":
    main()
