"""Options of a command that are declared elsewhere: the fields of a settings dataclass and their docstrings."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import typer

from cook.config.declare import docstrings

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]


def options_of(section: type) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a command one option per field of a dataclass; the command gets an instance of it as `settings`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        fields, hints = docstrings(section), get_type_hints(section)

        @functools.wraps(command)
        def with_settings(**given: Any) -> None:
            own = {name: given.pop(name) for name in fields}
            command(**given, settings=section(**own))

        signature = inspect.signature(command, eval_str=True)
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in signature.parameters.values() if p.name != "settings"]
        for name, text in fields.items():
            default = getattr(section, name)
            names = [f"--{name.replace('_', '-')}"] if default is False else []  # others get --x and --no-x
            annotation: Any = Annotated[hints[name], typer.Option(*names, help=text)]
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )
        with_settings.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        with_settings.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return with_settings

    return decorate
