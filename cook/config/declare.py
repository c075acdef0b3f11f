"""Annotated types for settings, and the JSON schemas that are generated from settings dataclasses.

The docstring of a field is its description in the schema, on the reference page and in `--help`.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


class Limits(dict[str, Any]):
    """JSON schema keywords of an annotated type."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # typing puts annotations into sets


Size = Annotated[int, Limits(minimum=1, maximum=10**9)]
Count = Annotated[int, Limits(minimum=0, maximum=10**9)]
Fraction = Annotated[float, Limits(minimum=0, maximum=1)]
Share = Annotated[float, Limits(exclusiveMinimum=0, exclusiveMaximum=1)]
Positive = Annotated[float, Limits(exclusiveMinimum=0, maximum=10**12)]
Scale = Annotated[float, Limits(minimum=0, maximum=10**6)]
Text = Annotated[str, Limits(minLength=1, pattern="^[^\\u0000]+$")]
UserPath = Annotated[str, Limits(title="a path", pattern="^[^\\u0000]+$", format="path")]
"""A path as the user wrote it, with `~` expanded. Relative paths start at the current working directory."""
MaskPath = Annotated[
    str, Limits(title="a path that ends in .pt", pattern="^[^\\u0000]*[^/\\u0000]\\.pt$", format="path")
]
UserPaths = Annotated[tuple[UserPath, ...], Limits(maxItems=10**5)]

Schema = dict[str, Any]
TYPES = {int: "integer", float: "number", str: "string", bool: "boolean"}


@dataclass(frozen=True)
class KeysOf:
    """Marks a mapping whose keys are the fields of a dataclass. If not `complete`, all keys are optional."""

    section: type
    complete: bool = True


def object_schema(section: type, *, complete: bool = True) -> Schema:
    """Builds the JSON schema of a dataclass. If not `complete`, none of its keys is required."""
    hints, texts = get_type_hints(section, include_extras=True), docstrings(section)
    fields = [field for field in dataclasses.fields(section) if field.name in texts]
    required = [field.name for field in fields if complete and default_of(field) is dataclasses.MISSING]
    properties = {field.name: field_schema(field, hints[field.name], texts[field.name]) for field in fields}
    schema: Schema = {"type": "object", "additionalProperties": False}
    return schema | ({"required": required} if required else {}) | {"properties": properties}


def field_schema(field: dataclasses.Field[Any], hint: Any, text: str) -> Schema:
    """Builds the JSON schema of one field, including its description and default."""
    default = default_of(field)
    node = {"description": text} | _schema(hint)
    if default is dataclasses.MISSING or "default" in node:
        return node
    return node | {"default": {} if dataclasses.is_dataclass(default) else _as_json(default)}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """Returns the default of a field, or MISSING if it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def docstrings(section: type) -> dict[str, str]:
    """Returns the docstrings of a dataclass's fields by name, with Python's constants written as in JSON."""
    body = ast.parse(textwrap.dedent(inspect.getsource(section))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            words = " ".join(str(text.value.value).split())
            for python, json in (("None", "null"), ("True", "true"), ("False", "false")):
                words = re.sub(rf"\b{python}\b", json, words)
            found[field.target.id] = words
    return found


def _schema(hint: Any) -> Schema:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        own_type = next((mark["type"] for mark in inner[1:] if isinstance(mark, Limits) and "type" in mark), None)
        node = {"type": own_type} if own_type else _schema(inner[0])
        for mark in inner[1:]:
            node |= object_schema(mark.section, complete=mark.complete) if isinstance(mark, KeysOf) else mark
        return node
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (Union, types.UnionType):
        return _any_of([_schema(each) for each in inner])
    if origin in (tuple, list):
        whole = {} if origin is list or inner[-1] is Ellipsis else {"minItems": len(inner), "maxItems": len(inner)}
        return {"type": "array", **whole, "items": _schema(inner[0])}
    if origin is dict:
        return {"type": "object"} | ({} if inner[1] is Any else {"additionalProperties": _schema(inner[1])})
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return object_schema(hint)
    return {"type": "null" if hint is type(None) else TYPES[hint]}


def _any_of(nodes: list[Schema]) -> Schema:
    """Merges the schemas of a union into one node: a type or `null`, a number or a name."""
    merged: Schema = {}
    for node in nodes:
        merged |= {key: value for key, value in node.items() if key != "type"}
    if "enum" in merged:
        return merged | {"enum": [*merged["enum"], *([None] if {"type": "null"} in nodes else [])]}
    if "title" in merged:
        merged["title"] += " or null"
    return {"type": [node["type"] for node in nodes], **merged}


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
