"""Writes the generated pages: `python docs/generate.py`.

`reference/command_line.md` comes from the `cook` command itself, the table in `how_to/families.md` from the families.
"""

from __future__ import annotations

import enum
import re
import sys
from pathlib import Path
from typing import Any, get_args

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
HEAD = """# Command line

<!-- Written by `python docs/generate.py`. -->

`cook COMMAND --help` prints the same text. `cook --install-completion` adds completion to your shell.
[Exit codes](exit_codes.md) are the same for all commands. On several devices, start `cook/train.py` with a launcher:
[On a cluster](../start/cluster.md).
"""
FAMILIES = re.compile(r"(<!-- families: .*? -->\n).*?(\n<!-- end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """The content of every generated page."""
    from cook.base.environment import quiet_torchao

    quiet_torchao()
    from cook.families.registry import families_table

    families = DOCS / "how_to" / "families.md"
    text = families.read_text(encoding="utf-8")
    return {
        DOCS / "reference" / "command_line.md": command_line(),
        families: FAMILIES.sub(lambda found: found[1] + families_table() + found[2], text),
    }


def command_line() -> str:
    """The reference page of the `cook` command."""
    import typer

    from cook.cli import app

    command: Any = typer.main.get_command(app)
    commands = list(_commands("cook", command))
    listed = [f"| [`{name}`](#{_anchor(name)}) | {_first_line(one)} |" for name, one in commands]
    table = ["| command | does |", "|---|---|", *listed]
    return "\n".join([HEAD, *table, "", *(_section(name, one) for name, one in commands)])


def _commands(name: str, command: Any) -> list[tuple[str, Any]]:
    """All commands that do something, with their full names."""
    if not hasattr(command, "commands"):
        return [(name, command)]
    own = [(name, command)] if command.invoke_without_command else []
    return own + [
        found
        for key, inner in command.commands.items()
        if not inner.hidden
        for found in _commands(f"{name} {key}", inner)
    ]


def _section(name: str, command: Any) -> str:
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    usage = " ".join([name, *(_metavar(one) for one in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## {name}", "", "```", usage, "```", "", _text(command.help), ""]
    for title, shown in (("argument", arguments), ("option", options)):
        rows = [one for one in shown if "--help" not in one.opts]
        if rows:
            lines += [f"| {title} | default | meaning |", "|---|---|---|"]
            lines += [f"| {_name(one)} | {_default(one)} | {_cell(getattr(one, 'help', None))} |" for one in rows]
            lines.append("")
    return "\n".join(lines)


def _metavar(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    name = name if argument.nargs == 1 else f"{name.removesuffix('...')}..."
    return name if argument.required else f"[{name}]"


def _name(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.metavar or parameter.name.upper()}`"
    shown = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    if getattr(parameter, "is_flag", False):
        return shown
    value = (parameter.metavar or _type_name(parameter)).replace("|", " or ")
    return f"{shown} `{value}`"


def _type_name(parameter: Any) -> str:
    """The name of the option's type as a placeholder: TEXT, INTEGER, …"""
    described = getattr(parameter, "type_descriptor", None)  # of typer's own parameters; click's have `type`
    if described is None:
        return str(parameter.type.name).upper()
    kinds = {"str": "TEXT", "int": "INTEGER", "float": "FLOAT", "Path": "PATH"}
    choices = get_args(described.annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return " or ".join(choices)
    if isinstance(described.annotation, type) and issubclass(described.annotation, enum.Enum):
        return " or ".join(str(one.value) for one in described.annotation)
    names = re.findall(r"\b(str|int|float|Path)\b", str(described.annotation))
    return kinds[names[0]] if names else "TEXT"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    if default is None or default is False or default == () or callable(default):
        return ""
    return f"`{getattr(default, 'value', default)}`"


def _first_line(command: Any) -> str:
    return _cell((command.help or "").strip().split("\n\n")[0])


def _text(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").replace("\f", "\n\n").split("\n\n")).strip()


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def _anchor(name: str) -> str:
    return re.sub(r"[^\w]+", "-", name.lower()).strip("-")


def main() -> None:
    """Writes the pages."""
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")
        print(path.relative_to(ROOT))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
