"""What a stage minimises, and how: task losses, optimizers and the learning rate.

A task loss is summed over a batch's targets, from a model's output and the batch; the step divides by their number.
B rows, T tokens, V vocabulary, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from cook.config.types import TrainingConfig
from cook.data.token_loss import summed_cross_entropy

Targets = Mapping[str, torch.Tensor]
TaskLoss = Callable[[Any, Targets], torch.Tensor]
MakeOptimizer = Callable[[torch.nn.Module, TrainingConfig], torch.optim.Optimizer]
"""Creates the optimizer of the trained parameters from a model and the stage's training section."""


def token_loss(output: Any, batch: Targets) -> torch.Tensor:
    """Language modelling: cross entropy of `output.logits` `[B, T, V]`, and of the options of questions."""
    return summed_cross_entropy(output.logits, batch)


def class_loss(output: Any, batch: Targets) -> torch.Tensor:
    """Classification of rows: cross entropy of `output.logits` `[B, C]` and `targets` `[B]`."""
    return F.cross_entropy(output.logits.float(), batch["targets"], reduction="sum")


def score_loss(output: Any, batch: Targets) -> torch.Tensor:
    """Regression: squared error of `output.logits` `[B, 1]` and `targets` `[B]`."""
    return F.mse_loss(output.logits.float().squeeze(-1), batch["targets"], reduction="sum")


def span_loss(output: Any, batch: Targets) -> torch.Tensor:
    """Answer spans: mean of the cross entropies of `start_logits` and `end_logits` `[B, T]`; `targets` `[B, 2]`."""
    starts, ends = output.start_logits.float(), output.end_logits.float()
    first, last = batch["targets"].unbind(-1)
    return (F.cross_entropy(starts, first, reduction="sum") + F.cross_entropy(ends, last, reduction="sum")) / 2


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The learning rate of the weights at a step, counted from 1: linear warmup, then the chosen decay.

    It depends on the step alone, so a resumed run needs no scheduler state.
    """
    if not training.train_weights:
        return 0.0
    warmup = round(training.warmup * training.steps)
    if step <= warmup:
        return training.learning_rate * step / warmup
    if training.schedule == "constant":
        return training.learning_rate
    done = (step - warmup) / max(1, training.steps - warmup)
    shape = 1.0 - done if training.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    low = training.min_learning_rate
    return training.learning_rate * (low + (1.0 - low) * shape)


def pretraining_adamw(model: torch.nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with the same settings for all parameters and the betas that are usual in pretraining."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay, fused=True
    )


def finetuning_adamw(model: torch.nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW as in fine-tuning BERT: no weight decay of biases and LayerNorms, that is of one-dimensional parameters."""
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Under ZeRO 3 a parameter is empty here; its shape is stored separately.
            groups[len(getattr(parameter, "ds_shape", parameter.shape)) > 1].append(parameter)
    decayed = [
        {"params": parameters, "weight_decay": training.weight_decay if is_matrix else 0.0}
        for is_matrix, parameters in groups.items()
        if parameters
    ]
    return torch.optim.AdamW(decayed, lr=training.learning_rate, betas=(0.9, 0.999), fused=True)
