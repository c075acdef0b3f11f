"""Checks a JSON value against a schema and reports all errors at once, in plain words."""

from __future__ import annotations

import difflib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jsonschema

from cook.base.errors import UserError
from cook.base.files import read_json

SchemaName = Literal["bmcook", "l0_pruning", "tasks"]
Keys = tuple[str | int, ...]
"""The keys and list indices that lead to a value."""

MAX_DEPTH = 32
"""Maximal nesting depth of a configuration. The schemas need 6."""

TYPE_NAMES = {
    "object": "an object",
    "array": "a list",
    "string": "a string",
    "integer": "an integer",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
LIMIT_NAMES = {
    "minimum": "at least {}",
    "exclusiveMinimum": "above {}",
    "maximum": "at most {}",
    "exclusiveMaximum": "below {}",
    "multipleOf": "a multiple of {}",
    "minLength": "of at least {} character(s)",
    "minItems": "of at least {} item(s)",
    "maxItems": "of at most {} item(s)",
}


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One error, and the top-level section that it makes invalid."""

    section: str
    """Top-level key. Empty if the whole file is affected."""
    error: UserError


class _Message(NamedTuple):
    problem: str
    wanted: str | None
    got: str | None = None
    remedy: str | None = None


@cache
def load_schema(name: SchemaName) -> dict[str, Any]:
    """Loads the JSON schema of a file or of the task command's options. Callers must not modify it."""
    return read_json(Path(__file__).parent / "schemas" / f"{name}.schema.json")


def dotted(keys: Sequence[str | int]) -> str:
    """Joins keys as in `--set`, for example `stages.0.training.steps`."""
    return ".".join(str(key) for key in keys)


def subschema(name: SchemaName, keys: Sequence[str | int]) -> dict[str, Any]:
    """Returns the schema of the value at `keys`, or an empty one if the schema does not describe it."""
    node = load_schema(name)
    for key in keys:
        node = node.get("items", {}) if isinstance(key, int) else node.get("properties", {}).get(key, {})
    return node


def with_home(value: Any, node: dict[str, Any]) -> Any:
    """Returns `value` with `~` expanded in every path that the schema describes.

    To name a file that begins with `~`, write `./~file`.
    """
    if isinstance(value, str):
        return os.path.expanduser(value) if node.get("format") == "path" else value
    inherited = {"format": "path"} if node.get("format") == "path" else {}  # any string inside may be a path
    if isinstance(value, dict):
        below = node.get("properties", {})
        return {key: with_home(entry, {**below.get(key, {}), **inherited}) for key, entry in value.items()}
    if isinstance(value, list):
        return [with_home(entry, {**node.get("items", {}), **inherited}) for entry in value]
    return value


def wanted(node: dict[str, Any]) -> str:
    """Describes in words which values a schema accepts."""
    if "title" in node:
        return str(node["title"])
    if "enum" in node:
        return "one of " + ", ".join(json.dumps(value) for value in node["enum"])
    types = node.get("type", [])
    words = " or ".join(TYPE_NAMES[kind] for kind in ([types] if isinstance(types, str) else types))
    if "minimum" in node and "maximum" in node:
        limits = [f"from {node['minimum']} to {node['maximum']}"]
        limits += [LIMIT_NAMES["multipleOf"].format(node["multipleOf"])] if "multipleOf" in node else []
    else:
        limits = [text.format(node[key]) for key, text in LIMIT_NAMES.items() if key in node]
    return " ".join([words, ", ".join(limits)]).strip()


def shown(value: Any) -> str:
    """Formats a value for an error message, shortened if necessary."""
    if isinstance(value, dict):
        return f"an object with {len(value)} key(s)"
    if isinstance(value, list):
        return f"a list of {len(value)} item(s)"
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 80 else f"{text[:77]}..."


def schema_findings(value: Any, name: SchemaName, label: str, set_by: dict[Keys, str] | None = None) -> list[Finding]:
    """Finds all violations of a schema, in the order of the file.

    Args:
        value: The parsed file, with overrides applied.
        name: The name of the schema.
        label: The path of the file, for the messages.
        set_by: The override that set a value, by its keys. Messages then name the override instead of the file.
    """
    deep = _too_deep(value)
    if deep is not None:
        what = f"{label}: nested deeper than {MAX_DEPTH} levels below {dotted(deep[:3])!r}"
        return [Finding(section="", error=UserError(what))]
    found: dict[Keys, _Message] = dict(_unusable(value))
    for error in _Validator(load_schema(name)).iter_errors(value):
        for keys, message in _messages(error, tuple(error.absolute_path), name):
            # One value may violate several keywords. `wanted` describes all of them, so one error is enough.
            found.setdefault(keys, message)
    return [
        Finding(section=str(keys[0]) if keys else "", error=_located(found[keys], keys, label, set_by or {}))
        for keys in sorted(found, key=lambda keys: _file_order(value, keys))
    ]


def _integer(_: Any, value: Any) -> bool:
    # JSON Schema counts 10.0 as an integer; the dataclasses do not.
    return isinstance(value, int) and not isinstance(value, bool)


_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _integer),
)


def _walk(value: Any) -> Iterator[tuple[Keys, Any]]:
    # Not recursive, since the nesting may be deeper than Python's recursion limit.
    stack: list[tuple[Keys, Any]] = [((), value)]
    while stack:
        keys, node = stack.pop()
        yield keys, node
        if len(keys) <= MAX_DEPTH:
            children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
            stack.extend(((*keys, key), child) for key, child in children)


def _too_deep(value: Any) -> Keys | None:
    return next((keys for keys, _ in _walk(value) if len(keys) > MAX_DEPTH), None)


def _unusable(value: Any) -> Iterator[tuple[Keys, _Message]]:
    """Yields values that JSON can represent but no setting can have."""
    for keys, node in _walk(value):
        # Strict JSON has no infinity, but Python reads 1e999 as infinity.
        if isinstance(node, float) and not math.isfinite(node):
            yield keys, _Message("wrong value at", "a finite number", "a number too large to be stored")
        if isinstance(node, str) and any("\ud800" <= letter <= "\udfff" for letter in node):
            remedy = "remove the half of a surrogate pair, which is not a character"
            yield keys, _Message("wrong value at", "text", shown(node), remedy)


def _messages(error: jsonschema.ValidationError, place: Keys, name: SchemaName) -> Iterator[tuple[Keys, _Message]]:
    node = subschema(name, place)
    instance: Any = error.instance
    if error.validator == "additionalProperties":
        known = list(node["properties"])
        for key in instance:
            if key not in node["properties"]:
                yield (*place, key), _unknown_key(key, known)
    elif error.validator == "required":
        for key in node["required"]:
            if key not in instance:
                described = subschema(name, (*place, key)).get("description")
                yield (*place, key), _Message(problem="missing key", wanted=described)
    else:
        quote = node.get("type") in ("string", ["string", "null"]) and isinstance(instance, int | float)
        remedy = "put it in double quotes" if quote else None
        yield place, _Message("wrong value at", wanted(node), shown(instance), remedy)


def _unknown_key(key: str, known: list[str]) -> _Message:
    near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.6)
    if near:
        return _Message(problem="unknown key", wanted=None, remedy=f"did you mean {near[0]!r}?")
    return _Message(problem="unknown key", wanted="one of " + ", ".join(known))


def _located(message: _Message, keys: Keys, label: str, set_by: dict[Keys, str]) -> UserError:
    shorter = (lambda path: min(len(path), len(keys))) if message.problem == "unknown key" else len
    blamed = [text for path, text in set_by.items() if keys[: len(path)] == path[: shorter(path)]]
    origin = f"--set {blamed[-1]}" if blamed else label
    where = repr(dotted(keys)) if keys else "the top"
    details = message._asdict()
    return UserError(f"{origin}: {details.pop('problem')} {where}", **details)


def _file_order(value: Any, keys: Keys) -> tuple[int, ...]:
    """Sort key: the position at every level. Missing keys come after those in the file."""
    order = []
    for key in keys:
        if isinstance(value, dict):
            names = list(value)
            order.append(names.index(str(key)) if key in value else len(names))
            value = value.get(str(key))
        else:
            order.append(int(key))
            value = value[key] if isinstance(value, list) and isinstance(key, int) else None
    return tuple(order)
