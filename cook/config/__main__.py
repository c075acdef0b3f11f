"""`python -m cook.config`: writes the JSON schemas and the reference page of all settings, from the dataclasses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cook.config.declare import Schema, object_schema
from cook.config.schema import wanted
from cook.config.tasks import TaskConfig
from cook.config.types import DERIVED, FIELD_OF, SCHEME_SECTIONS, RunConfig

PACKAGE = Path(__file__).parent
DRAFT = "https://json-schema.org/draft/2020-12/schema"
TITLES = {"bmcook": "bmcook.json", "l0_pruning": "l0_pruning.json", "tasks": "cook/tasks.py"}
DESCRIPTIONS = {
    "bmcook": "The run: the model, the corpus, the training, whether to prune, and the recipe of stages. Relative "
    "paths start at the current working directory unless a key says otherwise.",
    "l0_pruning": "The pruning scheme: the sizes before and after pruning, and the paths of the mask files.",
    "tasks": "Options of the command that fine-tunes, prunes and exports an encoder on a GLUE task or SQuAD.",
}


def schemas() -> dict[str, Schema]:
    """Builds the JSON schema of each file and of the task command's options, by name."""
    whole = object_schema(RunConfig)
    by_field = {field: key for key, field in FIELD_OF.items()}
    parts: dict[str, Schema] = {"bmcook": {}, "l0_pruning": {}, "tasks": object_schema(TaskConfig)["properties"]}
    for name, node in whole["properties"].items():
        if by_field.get(name) in SCHEME_SECTIONS:
            optional = isinstance(node["type"], list)
            node = {key: value for key, value in node.items() if not (optional and key == "default")}
            parts["l0_pruning"][by_field[name]] = node | {"type": "object"}
        elif name not in DERIVED:
            parts["bmcook"][by_field.get(name, name)] = node
    required = {"bmcook": [key for key in whole["required"] if key not in DERIVED], "tasks": ["mode", "task_name"]}
    return {
        name: {"$schema": DRAFT, "title": TITLES[name], "description": DESCRIPTIONS[name], "type": "object"}
        | {"additionalProperties": False}
        | ({"required": required[name]} if name in required else {})
        | {"properties": properties}
        for name, properties in parts.items()
    }


def page(schemas: dict[str, Schema]) -> str:
    """Builds the reference page, in Markdown."""
    lines = ["# Settings", "", "<!-- Written by `python -m cook.config`. -->"]
    for schema in schemas.values():
        lines += ["", f"## {schema['title']}", "", schema["description"]]
        lines += _table("", schema)
    return "\n".join(lines) + "\n"


def _table(place: str, node: Schema) -> list[str]:
    """The keys of an object, then the tables of the objects inside it."""
    lines = ["", f"### `{place}`", "", node["description"]] if place else []
    lines += ["", "| key | value | default | meaning |", "|---|---|---|---|"]
    inside = []
    for key, below in node["properties"].items():
        if "description" not in below:
            continue  # a part of a DeepSpeed configuration
        here = f"{place}.{key}" if place else key
        default = f"`{json.dumps(below['default'])}`" if "default" in below else ""
        default = "required" if key in node.get("required", ()) else default
        lines.append(f"| `{key}` | {_cell(wanted(below))} | {default} | {_cell(below['description'])} |")
        entry = below.get("items", below)
        if "properties" in entry and here != "deepspeed" and key != "training" or here == "training":
            inside += _table(here, {"description": below["description"], **entry})
    return lines + inside


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def generated() -> dict[Path, str]:
    """Returns the content of all generated files of the repository, by path."""
    made = schemas()
    files = {PACKAGE / "schemas" / f"{name}.schema.json": _lines(schema) + "\n" for name, schema in made.items()}
    return files | {PACKAGE.parents[1] / "docs" / "reference" / "settings.md": page(made)}


def _lines(value: Any, key: str = "", indent: str = "") -> str:
    """Formats a schema as JSON, with one line per setting."""
    text = json.dumps(value, ensure_ascii=False)
    if key != "properties" and '"properties":' not in text:
        return text
    inner = [f"{indent} {json.dumps(name)}: {_lines(below, name, indent + ' ')}" for name, below in value.items()]
    return "{\n" + ",\n".join(inner) + f"\n{indent}}}"


if __name__ == "__main__":
    for path, text in generated().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
