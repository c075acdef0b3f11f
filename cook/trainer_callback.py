"""Learning masks in a `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from cook.api import Means, attach
from cook.base.errors import UserError
from cook.pruning.budgets import Keep
from cook.pruning.live import LiveGates

GATES_FILE = "cook_gates.pt"
"""In the checkpoints of a `Trainer`."""


class PruningCallback(TrainerCallback):
    """Attaches gates when training begins, moves them at each optimizer step, and holds the masks at the end.

    The gates are saved into each checkpoint of the trainer and restored when it resumes.

    ```python
    callback = cook.PruningCallback(keep={"dims": 0.7})
    Trainer(model, arguments, train_dataset=data, callbacks=[callback]).train()
    small = cook.reshape(model, callback.masks)
    ```

    Args:
        keep: What to keep, as for `cook.plan`.
        steps: Optimizer steps in which the masks are learned; None: all of the training.
        seed: Of the gates' noise; None: the trainer's.
        means: As for `cook.attach`; give them to `cook.reshape` too.
    """

    def __init__(self, keep: Keep, *, steps: int | None = None, seed: int | None = None, means: Means | None = None):
        self._keep, self._steps, self._seed, self._means = keep, steps, seed, means
        self.gates: LiveGates | None = None

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """The masks as 0 and 1, by group name; what they would be now, while training runs."""
        assert self.gates is not None, "training has not begun"
        return self.gates.masks()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.gates is not None:  # of an earlier training
            self.gates.remove()
        saved = self._file(args, state) if state.global_step else None
        if saved and not saved.is_file():
            raise UserError(
                f"{saved}: there are no gates to resume from",
                remedy=f"copy {GATES_FILE} there from the checkpoint that the training resumes from",
            )
        seed = args.seed if self._seed is None else self._seed
        steps = self._steps or state.max_steps
        self.gates = attach(kwargs["model"], self._keep, steps=steps, seed=seed, means=self._means)
        if saved:
            self.gates.load_state_dict(torch.load(saved, weights_only=True))

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forward()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._forward()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.gates is not None
        if self.gates.step < self.gates.gates.steps:
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)  # with fp16; the gates' gradients are scaled too
            self.gates.after_backward(loss_scale=scaler.get_scale() if scaler else 1.0)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.gates is not None
        if state.is_world_process_zero:
            torch.save(self.gates.state_dict(), self._file(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self.gates is not None
        self.gates.hold()

    def _forward(self) -> None:
        assert self.gates is not None
        if self.gates.step < self.gates.gates.steps:
            self.gates.before_forward()
        else:
            self.gates.hold()

    @staticmethod
    def _file(args: TrainingArguments, state: TrainerState) -> Path:
        assert args.output_dir is not None
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / GATES_FILE
