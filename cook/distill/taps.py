"""Taps: hooks that keep the input or output of a module during one forward pass."""

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
    """A place in the student and one in the teacher, whose states are compared."""

    student: Place
    teacher: Place

    def __str__(self) -> str:
        return f"{self.student}:{self.teacher}"


def read_pair(text: str) -> Pair:
    """Parses `[post]student.module:[pre]teacher.module`; the schema has checked its form."""
    student, teacher = (Place(place[1 : place.index("]")], place[place.index("]") + 1 :]) for place in text.split(":"))
    return Pair(student, teacher)


def lacking(model: torch.nn.Module, path: str) -> str | None:
    """The reason why a module cannot be tapped; None if it can."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return f"has no module {path!r}"
    return f"no longer has the block {path!r}" if isinstance(module, Absent) else None


def check_pairs(pairs: Mapping[str, Sequence[Pair]], student: torch.nn.Module, teacher: torch.nn.Module) -> None:
    """Raises a UserError with all places of `pairs` (by the config's key) that do not exist in models or skeletons."""
    problems = [
        f"{key}: {pair}: the {who} {why}"
        for key, some in pairs.items()
        for pair in some
        for who, model, place in (("student", student, pair.student), ("teacher", teacher, pair.teacher))
        if (why := lacking(model, place.path))
    ]
    if problems:
        raise_pairs(problems, "modules that exist in both models", "delete the pairs of removed blocks")


def raise_pairs(problems: Sequence[str], wanted: str, remedy: str) -> None:
    """Raises one error for all pairs that cannot be compared."""
    listed = "".join(f"\n    {problem}" for problem in problems)
    raise UserError(f"distillation: {len(problems)} place(s) cannot be compared:{listed}", wanted=wanted, remedy=remedy)


class Tap:
    """Keeps the state at a place in an armed forward pass, until it is taken.

    A pass must be armed explicitly: activation checkpointing calls the modules again in the backward pass, and if
    a model is its own teacher, the taps of both sides are on the same modules.
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
        """From now on the last state at the place is kept."""
        self._armed, self._value = True, None

    def take(self) -> Any:
        """Returns the kept state, normally a tensor, and clears it."""
        value, self._value, self._armed = self._value, None, False
        return value

    def remove(self) -> None:
        self._handle.remove()

    def _keep_input(self, _module: torch.nn.Module, inputs: tuple, named: dict) -> None:
        if self._armed:
            # transformers passes it by keyword to a layer's blocks.
            self._value = inputs[0] if inputs else named["hidden_states"]

    def _keep_output(self, _module: torch.nn.Module, _inputs: tuple, output: Any) -> None:
        if self._armed:
            # An attention block of transformers returns its output and its probabilities or None.
            self._value = output[0] if isinstance(output, tuple) else output
