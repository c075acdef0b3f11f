"""Taps: hooks that keep the input or the output of a module in one pass, without holding it longer than needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from cook.base.errors import UserError
from cook.models.ragged import Absent


class Place(NamedTuple):
    """A module's input (`pre`) or output (`post`)."""

    when: str
    path: str

    def __str__(self) -> str:
        return f"[{self.when}]{self.path}"


class Pair(NamedTuple):
    """Two places, the student's and the teacher's, whose states are compared."""

    student: Place
    teacher: Place

    def __str__(self) -> str:
        return f"{self.student}:{self.teacher}"


def read_pair(text: str) -> Pair:
    """`[post]student.module:[pre]teacher.module`; the schema has seen to its form."""
    student, teacher = (Place(place[1 : place.index("]")], place[place.index("]") + 1 :]) for place in text.split(":"))
    return Pair(student, teacher)


def lacking(model: torch.nn.Module, path: str) -> str | None:
    """Why a module cannot be tapped, in words; None if it can."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return f"has no module {path!r}"
    return f"has no block left at {path!r}" if isinstance(module, Absent) else None


def check_pairs(pairs: Mapping[str, Sequence[Pair]], student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Every place must be there.

    Args:
        pairs: By the config's key.
        student: The model, or a skeleton without weights.
        teacher: The same.

    Raises:
        UserError: listing all that are not.
    """
    problems = [
        f"{key}: {pair}: the {who} {why}"
        for key, some in pairs.items()
        for pair in some
        for who, model, place in (("student", student, pair.student), ("teacher", teacher, pair.teacher))
        if (why := lacking(model, place.path))
    ]
    if problems:
        raise_pairs(problems, "pairs of modules that are in both models", "take the pairs of removed blocks out")


def raise_pairs(problems: Sequence[str], wanted: str, remedy: str) -> None:
    """One error for all pairs that cannot be compared."""
    listed = "".join(f"\n    {problem}" for problem in problems)
    raise UserError(f"distillation: {len(problems)} place(s) cannot be compared:{listed}", wanted=wanted, remedy=remedy)


class Tap:
    """Keeps what passes a place in an armed pass, until it is taken.

    A pass is armed from outside: activation checkpointing calls the modules again in the backward pass, and where
    a model is its own teacher both sides' taps hang on the same modules.
    """

    def __init__(self, model: torch.nn.Module, place: Place):
        self.place = place
        self._armed = False
        self._value: Any = None
        module = model.get_submodule(place.path)
        if place.when == "pre":
            self._handle = module.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        else:
            self._handle = module.register_forward_hook(self._keep_output)

    def arm(self) -> None:
        """From now on what passes is kept, the last of it."""
        self._armed, self._value = True, None

    def take(self) -> Any:
        """What was kept, a tensor if all is well; nothing is kept any more."""
        value, self._value, self._armed = self._value, None, False
        return value

    def remove(self) -> None:
        """Takes the hook off."""
        self._handle.remove()

    def _keep_input(self, _module: torch.nn.Module, inputs: tuple, named: dict) -> None:
        if self._armed:
            self._value = inputs[0] if inputs else named["hidden_states"]  # as transformers calls a layer's blocks

    def _keep_output(self, _module: torch.nn.Module, _inputs: tuple, output: Any) -> None:
        if self._armed:
            # An attention block of transformers gives its output and its probabilities, if it keeps any.
            self._value = output[0] if isinstance(output, tuple) else output
