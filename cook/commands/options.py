"""Options of a command that are declared elsewhere: the fields of a settings dataclass and their docstrings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from cook.base.errors import UserError, UserErrors
from cook.config.declare import Limits, docstrings, object_schema

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def options_of(section: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option per field of a dataclass; the command gets an instance of it as `settings`.

    A field that the command itself declares, as an argument without help, gets its help from the field's docstring.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        texts, hints = docstrings(section), get_type_hints(section, include_extras=True)

        @functools.wraps(command)
        def with_settings(**given: Any) -> None:
            own = {name: given[name] for name in texts}
            if not hasattr(section, "check"):  # such a section reports its ranges among its other mistakes
                check_ranges(section, own)
            lists = {name: tuple(value) for name, value in own.items() if isinstance(value, list)}
            rest = {name: value for name, value in given.items() if name in signature.parameters}
            command(**rest, settings=section(**own | lists))

        signature = inspect.signature(command, eval_str=True)
        parameters = {p.name: p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values()}
        del parameters["settings"]
        for field in dataclasses.fields(section):
            if field.name in parameters:
                parameters[field.name].annotation.__metadata__[0].help = texts[field.name]
                continue
            default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
            parameters[field.name] = inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=default,
                annotation=_option(field.name, hints[field.name], default, texts[field.name]),
            )
        with_settings.__signature__ = inspect.Signature(list(parameters.values()))  # type: ignore[attr-defined]
        with_settings.__annotations__ = {p.name: p.annotation for p in parameters.values()} | {"return": None}
        return with_settings

    return decorate


RANGES = {
    "minimum": ("at least", operator.ge),
    "exclusiveMinimum": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "exclusiveMaximum": ("below", operator.lt),
}


def check_ranges(section: type, values: Mapping[str, Any]) -> None:
    """Compares the numbers of a command line with the limits of their fields.

    Raises:
        UserErrors: all that are out of range.
    """
    errors = []
    for name, node in object_schema(section)["properties"].items():
        value = values[name]
        if not isinstance(value, int | float):
            continue
        if any(key in node and not holds(value, node[key]) for key, (_, holds) in RANGES.items()):
            wanted = " and ".join(f"{words} {node[key]:,}" for key, (words, _) in RANGES.items() if key in node)
            errors.append(UserError(f"--{name.replace('_', '-')} is out of range", wanted=wanted, got=value))
    if errors:
        raise UserErrors("the command line cannot be used", errors)


def _option(name: str, hint: Any, default: Any, text: str) -> Any:
    kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    limits: dict[str, Any] = next((mark for mark in marks if isinstance(mark, Limits)), {})
    if get_origin(kind) in (Union, UnionType):  # such as Size | None
        parts = (get_args(part)[0] if get_origin(part) is Annotated else part for part in get_args(kind))
        kind = functools.reduce(operator.or_, parts)
    if get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
    names = [f"--{name.replace('_', '-')}"] if default is False else []  # others get --x and --no-x
    # Limits are not passed on: typer would report one invalid value at a time.
    return Annotated[kind, typer.Option(*names, help=text, metavar=limits.get("metavar"))]
