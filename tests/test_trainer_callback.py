"""Masks that are learned in a `transformers.Trainer`, against our own loop and an uninterrupted run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments

import cook
from cook.base.errors import UserError
from tests.test_api import batches, llama


def trainer(model: torch.nn.Module, folder: Path, callback: Any, **options: Any) -> Trainer:
    rows = [{"input_ids": row, "labels": row} for batch in batches(6) for row in batch["input_ids"]]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=3, **options
    )
    return Trainer(model, arguments, train_dataset=rows, callbacks=[callback])


def order(model: torch.nn.Module, folder: Path, **options: Any) -> list[dict[str, torch.Tensor]]:
    """The batches that a trainer with these options reads."""
    made = trainer(model, folder, cook.PruningCallback({"dims": 0.5}), **options)
    return [dict(batch) for batch in made.get_train_dataloader()]


def test_a_trainer_with_the_callback_learns_the_masks_of_our_own_loop(tmp_path):
    """With a learning rate of 0 the trainer's weights stay as they are, as in `learn_masks`."""
    model, callback = llama(), cook.PruningCallback({"dims": 0.5}, seed=3)
    trainer(model, tmp_path, callback, max_steps=6, learning_rate=0.0, save_strategy="no").train()
    own = cook.attach(other := llama(), {"dims": 0.5}, steps=6, seed=3)
    torch.manual_seed(3)
    for batch in order(other, tmp_path, max_steps=6, save_strategy="no"):
        own.before_forward()
        other(**batch).loss.backward()
        own.after_backward()
    assert callback.gates is not None
    # The same sums in the same order; the trainer's loss divides by the number of targets in another place.
    torch.testing.assert_close(callback.gates.gates.values, own.gates.values, rtol=0, atol=1e-4)
    assert all(torch.equal(mask, own.masks()[name]) for name, mask in callback.masks.items())


def test_a_resumed_trainer_ends_with_the_gates_of_the_uninterrupted_one(tmp_path):
    whole = cook.PruningCallback({"dims": 0.5})
    trainer(llama(), tmp_path / "whole", whole, max_steps=6, learning_rate=1e-3, save_steps=3).train()
    resumed = cook.PruningCallback({"dims": 0.5})
    checkpoint = str(tmp_path / "whole" / "checkpoint-3")
    trainer(llama(), tmp_path / "whole", resumed, max_steps=6, learning_rate=1e-3, save_steps=3).train(checkpoint)
    assert whole.gates is not None and resumed.gates is not None
    assert torch.equal(whole.gates.gates.values, resumed.gates.gates.values)


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_a_second_training_has_one_set_of_gates(tmp_path):
    model, callback = llama(), cook.PruningCallback({"dims": 0.5})
    made: Trainer = trainer(model, tmp_path, callback, max_steps=2, save_strategy="no")
    made.train()
    once = hooks(model)
    made.train()
    assert callback.gates is not None and hooks(model) == once > 0
    callback.gates.remove()
    assert hooks(model) == 0


def test_gates_that_are_not_beside_the_checkpoint_are_asked_for(tmp_path):
    first = trainer(llama(), tmp_path / "one", cook.PruningCallback({"dims": 0.5}), max_steps=4, save_steps=2)
    first.train()
    model = llama()
    second = trainer(model, tmp_path / "two", cook.PruningCallback({"dims": 0.5}), max_steps=4, save_strategy="no")
    with pytest.raises(UserError, match=r"copy cook_gates\.pt there"):
        second.train(str(tmp_path / "one" / "checkpoint-2"))
    assert hooks(model) == 0


def test_gradients_of_gates_are_divided_by_the_scale_of_fp16(tmp_path):
    """The trainer multiplies the loss by its scaler's factor; the gates' gradients have it too."""
    values = {}
    for scale in (1.0, 1024.0):
        model, callback = llama(), cook.PruningCallback({"dims": 0.5})
        arguments = trainer(model, tmp_path, callback, max_steps=3, save_strategy="no").args
        state = SimpleNamespace(max_steps=3, global_step=0)
        callback.on_train_begin(arguments, state, None, model=model)
        optimizer = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda scale=scale: scale))
        for batch in batches(3):
            callback.on_step_begin(arguments, state, None)
            (scale * model(**batch, labels=batch["input_ids"]).loss).backward()
            callback.on_pre_optimizer_step(arguments, state, None, optimizer=optimizer)
        assert callback.gates is not None
        values[scale] = callback.gates.gates.values
    # A power of two changes no digit of a product, but what is too small for fp32.
    torch.testing.assert_close(values[1024.0], values[1.0], rtol=1e-6, atol=1e-7)
