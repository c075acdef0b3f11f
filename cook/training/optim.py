"""The optimizers, and the learning rate as a function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from cook.config.types import TrainingConfig


def learning_rate(training: TrainingConfig, step: int) -> float:
    """The learning rate of the weights at step `step`, counted from 1: linear warmup, then the chosen decay."""
    if not training.train_weights:
        return 0.0
    warmup = round(training.warmup * training.steps)
    if step <= warmup:
        return training.learning_rate * step / warmup
    done = (step - warmup) / max(1, training.steps - warmup)
    shape = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
    }[training.schedule]
    if training.schedule == "constant":
        return training.learning_rate
    low = training.min_learning_rate
    return training.learning_rate * (low + (1.0 - low) * shape)


MakeOptimizer = Callable[[torch.nn.Module, TrainingConfig], torch.optim.Optimizer]
"""Creates the optimizer of the trained parameters from a model and the stage's training section."""


def pretraining_adamw(model: torch.nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with the same settings for all parameters and the betas that are usual in pretraining."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=training.learning_rate, betas=(0.9, 0.95), weight_decay=training.weight_decay, fused=True
    )


def finetuning_adamw(model: torch.nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW as in fine-tuning BERT: no weight decay of biases and LayerNorms, that is of one-dimensional parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Under ZeRO 3 a parameter is empty here; its shape is stored separately.
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [
        {"params": parameters, "weight_decay": decay}
        for parameters, decay in ((matrices, training.weight_decay), (vectors, 0.0))
        if parameters
    ]
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=(0.9, 0.999), fused=True)
