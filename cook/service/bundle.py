"""What `cook submit` sends: the content of the two files, with the files that they name by path put in."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cook.base.errors import UserError, UserErrors
from cook.base.files import read_json
from cook.config.distillation import OWN_TEACHER
from cook.config.load import COMPANIONS, DEFAULT_SCHEME, Override, apply_override, parse_override
from cook.service.paths import MASK_KEYS, inputs


def bundle(path: Path, overrides: Sequence[str] = (), *, here: bool) -> dict[str, Any]:
    """Reads a recipe for its submission.

    Args:
        path: The `bmcook.json`.
        overrides: Changes to both files, `KEY=VALUE`.
        here: Whether the server is on this machine. Relative paths that exist here then become absolute.

    Returns:
        The fields `config` and `scheme` of a submission.

    Raises:
        UserError: A file cannot be read, or an override cannot be applied; `UserErrors` lists all of these.
    """
    config = _object(path)
    errors: list[UserError] = []
    scheme_overrides: list[Override] = []
    for text in overrides:
        try:
            override = parse_override(text)
            if override.is_scheme:
                scheme_overrides.append(override)
                continue
            for keys in COMPANIONS:
                if override.keys[: len(keys)] == keys and len(override.keys) > len(keys):
                    _inline(config, keys)
            apply_override(config, override)
        except UserError as error:
            errors.append(error)
    for keys in COMPANIONS:
        _inline(config, keys)
    scheme = _scheme(path, config)
    for override in scheme_overrides:
        try:
            apply_override(scheme, override)
        except UserError as error:
            errors.append(error)
    if errors:
        raise UserErrors(f"{path}: the settings cannot be applied", errors)
    if here:
        _make_absolute(config, scheme)
    return {"config": config, "scheme": scheme}


def _object(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: not a JSON object")
    return value


def _inline(config: dict[str, Any], keys: tuple[str, ...]) -> None:
    node: Any = config
    for key in keys[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    if isinstance(node, dict) and isinstance(node.get(keys[-1]), str) and node[keys[-1]]:
        node[keys[-1]] = _object(Path(os.path.expanduser(node[keys[-1]])))


def _scheme(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    pruning = config.get("pruning")
    named = pruning.get("l0_pruning") if isinstance(pruning, dict) else None
    if isinstance(named, str):
        return _object(path.parent / os.path.expanduser(named))
    default = path.parent / DEFAULT_SCHEME
    return _object(default) if default.exists() else {}


def _make_absolute(config: dict[str, Any], scheme: dict[str, Any]) -> None:
    """The server may run in another folder. Paths that do not exist here are left, for the server to look up."""
    for holder, key, _, _ in inputs(config, scheme):
        holder[key] = _absolute(holder[key])
    for section, key, _ in MASK_KEYS:
        node = scheme.get(section)
        if isinstance(node, dict) and isinstance(node.get(key), str):
            node[key] = _absolute(node[key])
    distillation = config.get("distillation")
    teacher = distillation.get("teacher") if isinstance(distillation, dict) else None
    output = config.get("output_dir")
    if isinstance(teacher, str) and isinstance(output, str) and teacher != OWN_TEACHER:
        if not Path(os.path.normpath(teacher)).is_relative_to(os.path.normpath(output)):
            distillation["teacher"] = _absolute(teacher)  # type: ignore[index]


def _absolute(path: str) -> str:
    expanded = os.path.expanduser(path)
    try:
        exists = os.path.exists(expanded) or (glob.has_magic(expanded) and bool(glob.glob(expanded, recursive=True)))
    except (OSError, ValueError):
        return path
    return os.path.abspath(expanded) if exists else path
