"""Makes, looks at and rewrites CPM-Live's binary data."""

from __future__ import annotations

import argparse

from cook.base.errors import run_entry
from cook.data.commands import convert, inspect, merge, preprocess, shuffle, tokenizer

COMMANDS = {
    "tokenizer": (tokenizer, "trains a tokenizer"),
    "preprocess": (preprocess, "text or JSON lines to binary data"),
    "inspect": (inspect, "what binary data holds, and whether it is whole"),
    "shuffle": (shuffle, "the same records in a random order"),
    "merge": (merge, "several folders of binary data to one"),
    "convert": (convert, "between version 1, version 2 and JSON lines"),
}


def main(arguments: list[str] | None = None) -> None:
    """Parses the command line and runs the command."""
    parser = argparse.ArgumentParser(prog="python -m cook.data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (command, help) in COMMANDS.items():
        own = commands.add_parser(name, help=help, description=command.__doc__)
        command.add_arguments(own)
        own.set_defaults(run=command.run)
    parsed = parser.parse_args(arguments)
    parsed.run(parsed)


if __name__ == "__main__":
    run_entry(main)
