"""`--set a.b=c`: command-line overrides of the two configuration files, applied before the check."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NoReturn

from cook.base.errors import UserError
from cook.config.schema import Keys, dotted, load_schema, shown


@dataclass(frozen=True, kw_only=True)
class Override:
    """One `--set` option."""

    keys: tuple[str, ...]
    """The parts of the dotted path."""

    value: Any
    """The new value, parsed as JSON. The text itself if it is not valid JSON."""

    text: str
    """As the user wrote it."""

    @property
    def is_scheme(self) -> bool:
        """True if it changes the scheme, whose top-level names do not occur in `bmcook.json`."""
        return self.keys[0] in load_schema("l0_pruning")["properties"]


def parse_override(text: str) -> Override:
    """Parses an override `a.b=c`.

    Raises:
        UserError: The `=` is missing, or the path has an empty part.
    """
    path, equals, written = text.partition("=")
    keys = tuple(path.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"--set {text}: not a setting", wanted="a.b=value", got=text)
    return Override(keys=keys, value=_parse_value(written, text), text=text)


def apply_override(root: dict[str, Any], override: Override) -> Keys:
    """Applies an override to `root`, in place.

    Missing and null objects on the path are created. A list entry is selected by index or, for stages, by name.

    Returns:
        The keys and list indices of the changed value.

    Raises:
        UserError: The path leads through a value without keys, or to a list entry that does not exist.
    """
    node: Any = root
    place: Keys = ()
    for key in override.keys[:-1]:
        step = _step(node, key, override, place)
        if isinstance(node, dict) and node.get(step) is None:
            node[step] = {}
        node, place = node[step], (*place, step)
    last = _step(node, override.keys[-1], override, place)
    node[last] = override.value
    return (*place, last)


def _step(node: Any, key: str, override: Override, place: Keys) -> Any:
    """The dictionary key or list index that `key` selects in `node`."""
    if isinstance(node, dict):
        return key
    if not isinstance(node, list):
        raise UserError(
            f"--set {override.text}: {dotted(place)!r} has no keys", wanted="an object or a list", got=shown(node)
        )
    if key.isascii() and key.isdigit() and len(key) < 10:
        index = int(key)
    else:
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in node]
        index = names.index(key) if key in names else len(node)
    if index >= len(node):
        named = [entry["name"] for entry in node if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        raise UserError(
            f"--set {override.text}: {dotted(place)!r} has no entry {key!r}",
            wanted=f"an index below {len(node)}" + (f" or one of {', '.join(named)}" if named else ""),
        )
    return index


def _parse_value(written: str, text: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise UserError(f"--set {text}: a key appears twice in one object", remedy="keep one of them")
        return dict(pairs)

    def no_constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not valid JSON")

    try:
        return json.loads(written, object_pairs_hook=unique, parse_constant=no_constant)
    except ValueError:
        return written
    except RecursionError:
        raise UserError(f"--set {text[:60]}...: nested too deeply") from None
