"""The paths of a submitted configuration: inputs must lie below the server's roots, outputs are assigned."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.config.distillation import OWN_TEACHER
from cook.config.kinds import NAMES, Kind

OUTPUT = "out"
"""`output_dir` of every job, relative to its working directory."""
MASKS = f"{OUTPUT}/masks"
SCHEME = "l0_pruning.json"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
MAX_ENTRIES = 100_000
"""Files of one folder or pattern that are checked for links to outside the roots."""
MASK_KEYS: tuple[tuple[str, str, Kind], ...] = (
    ("coarse-grained", "coarse_mask", "layer"),
    *(("fine-grained", names.mask, kind) for kind, names in NAMES.items()),
)
"""The section, the key and the kind of every mask of a scheme; both sections name that of blocks."""

Refused = tuple[str, UserError]
"""An error, and the top-level section that it makes invalid."""


class Roots:
    """The folders whose content submitted configurations may name.

    Args:
        folders: Existing folders. A relative path of a configuration is looked up in each of them.
        allow_hub: Whether names of Hub datasets are accepted.

    Raises:
        UserError: One of the folders does not exist.
    """

    def __init__(self, folders: Sequence[Path] = (), *, allow_hub: bool = False):
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"--root {folder}: there is no such folder", remedy="name an existing folder")
        self.folders = tuple(Path(os.path.realpath(folder)) for folder in folders)
        self.allow_hub = allow_hub

    def holds(self, path: str | Path) -> bool:
        """Whether a path, with all links resolved, lies below one of the roots."""
        try:
            real = Path(os.path.realpath(path))
        except (OSError, ValueError):
            return False
        return any(real == root or root in real.parents for root in self.folders)

    def resolve(self, path: str, key: str, *, is_pattern: bool = False) -> str:
        """The absolute path that a configuration means, with all links resolved.

        Args:
            path: As submitted.
            key: The setting, for messages.
            is_pattern: Whether the path may be a glob pattern.

        Raises:
            UserError: The path, or a file that it selects, is outside of the roots.
        """
        candidates = [Path(path)] if os.path.isabs(path) else [root / path for root in self.folders]
        inside = [candidate for candidate in candidates if self.holds(candidate)]
        found = next((candidate for candidate in inside if _exists(candidate)), None)
        if found is None and is_pattern and glob.has_magic(path):
            return self._pattern(path, key, candidates)
        if not inside:
            raise self._outside(key, path)
        real = os.path.realpath(found or inside[0])
        if (link := self._escaping_link(real)) is not None:
            raise self._outside(key, link)
        return real

    def _pattern(self, path: str, key: str, candidates: Sequence[Path]) -> str:
        if ".." in Path(path).parts:
            raise UserError(f"{key}: a pattern must not contain ..", got=path)
        chosen = None
        for candidate in candidates:
            parts = candidate.parts
            fixed = next(number for number, part in enumerate(parts) if glob.has_magic(part))
            prefix = Path(*parts[:fixed])
            if not self.holds(prefix):
                continue
            pattern = os.path.join(glob.escape(os.path.realpath(prefix)), *parts[fixed:])
            matches = list(islice(glob.iglob(pattern, recursive=True), MAX_ENTRIES))
            outside = next((match for match in matches if not self.holds(match)), None)
            if outside is not None:
                raise self._outside(key, outside)
            if matches:
                return pattern
            chosen = chosen or pattern
        if chosen is None:
            raise self._outside(key, path)
        return chosen

    def _escaping_link(self, folder: str) -> str | None:
        """A link below a folder that leads out of the roots, if there is one."""
        walk = (os.path.join(at, name) for at, folders, files in os.walk(folder) for name in (*folders, *files))
        links = (path for path in islice(walk, MAX_ENTRIES) if os.path.islink(path))
        return next((path for path in links if not self.holds(path)), None)

    def _outside(self, key: str, path: str) -> UserError:
        listed = ", ".join(map(str, self.folders))
        return UserError(
            f"{key}: the path is outside of the folders that this server may read",
            wanted=f"a path below {listed}" if listed else "no path: the server has no --root",
            got=path,
            remedy="move the file, or start the server with another --root",
        )


def assign_paths(config: dict[str, Any], scheme: dict[str, Any], roots: Roots) -> list[Refused]:
    """Replaces the paths of a configuration, in place: inputs by real paths, outputs by paths inside the job.

    Values of a wrong type stay, since the schema reports them.

    Returns:
        The inputs that are refused.
    """
    errors: list[Refused] = []
    output, config["output_dir"] = config.get("output_dir"), OUTPUT
    for holder, key, where, is_pattern in inputs(config, scheme):
        section = where.partition(".")[0]
        try:
            holder[key] = roots.resolve(holder[key], where, is_pattern=is_pattern)
        except UserError as error:
            errors.append((section, error))
    errors += [("data", error) for error in _hub_names(config, roots)]
    errors += _teacher(config, roots, output)
    errors += _masks(config, scheme, roots)
    if isinstance(config.get("data"), dict):
        config["data"]["cache_dir"] = None
    if isinstance(config.get("pruning"), dict):
        config["pruning"]["l0_pruning"] = SCHEME
    return errors


def inputs(config: dict[str, Any], scheme: dict[str, Any]) -> Iterator[tuple[Any, Any, str, bool]]:
    """Object, key, dotted name and kind of every string that names an input."""
    single = [(config, "model", "path"), (config, "tokenizer", "path"), (config, "pattern", "previous_mask")]
    for file, section, key in (*single, (scheme, "joint", "block_times")):
        node = file.get(section)
        if isinstance(node, dict) and isinstance(node.get(key), str):
            yield node, key, f"{section}.{key}", False
    for where, source in _sources(config):
        for key in ("paths", "held_out_paths"):
            paths = source.get(key)
            for number, path in enumerate(paths) if isinstance(paths, list) else ():
                if isinstance(path, str):
                    yield paths, number, f"{where}.{key}.{number}", True


def _sources(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    data = config.get("data")
    if not isinstance(data, dict):
        return
    yield "data", data
    sources = data.get("sources")
    for number, source in enumerate(sources) if isinstance(sources, list) else ():
        if isinstance(source, dict):
            yield f"data.sources.{number}", source


def _hub_names(config: dict[str, Any], roots: Roots) -> Iterator[UserError]:
    """Checks the names of Hub datasets; `name` may also be a folder. For other types it is only shown in logs."""
    for where, source in _sources(config):
        name = source.get("name")
        if source.get("type") != "hub" or not isinstance(name, str):
            continue
        if HUB_NAME.fullmatch(name):
            if not roots.allow_hub:
                what = f"{where}.name: this server does not download data sets"
                yield UserError(what, got=name, remedy="name files below a root, or start the server with --allow-hub")
            continue
        try:
            source["name"] = roots.resolve(name, f"{where}.name")
        except UserError as error:
            yield error
            continue
        if not os.path.isdir(source["name"]):
            yield UserError(f"{where}.name: neither a name nor a folder", wanted="OWNER/NAME, or a folder", got=name)


def _teacher(config: dict[str, Any], roots: Roots, output: Any) -> Iterator[Refused]:
    """A teacher is `self`, an input, or a folder that an earlier stage writes into the output folder."""
    node = config.get("distillation")
    teacher = node.get("teacher") if isinstance(node, dict) else None
    if not isinstance(node, dict) or not isinstance(teacher, str) or teacher == OWN_TEACHER:
        return
    path, parent = Path(os.path.normpath(teacher)), os.path.normpath(output) if isinstance(output, str) else None
    if parent is not None and path != Path(parent) and path.is_relative_to(parent):
        node["teacher"] = str(OUTPUT / path.relative_to(parent))
        return
    try:
        node["teacher"] = roots.resolve(teacher, "distillation.teacher")
    except UserError as error:
        yield "distillation", error


def _masks(config: dict[str, Any], scheme: dict[str, Any], roots: Roots) -> Iterator[Refused]:
    """A mask that the recipe learns is an output. Another one is an input if its file exists."""
    stages = config.get("stages")
    names = [entry.get("name") for entry in stages if isinstance(entry, dict)] if isinstance(stages, list) else []
    places: list[tuple[dict[str, Any], str, str, str, bool]] = []
    for section, key, kind in MASK_KEYS:
        node = scheme.get(section)
        if isinstance(node, dict):
            is_learned = not {"joint_mask", f"{NAMES[kind].stage}_mask"}.isdisjoint(names)
            places.append((node, key, f"{section}.{key}", f"{MASKS}/{kind}.pt", is_learned))
    if isinstance(config.get("pruning"), dict):
        name = "pruning.pruning_mask_path"
        places.append((config["pruning"], "pruning_mask_path", name, f"{MASKS}/pattern.safetensors", False))
    for node, key, where, assigned, is_learned in places:
        if not isinstance(node.get(key), str):
            continue
        if not is_learned:
            try:
                path = roots.resolve(node[key], where) if os.path.isabs(node[key]) or roots.folders else ""
            except UserError as error:
                yield where.partition(".")[0], error
                continue
            if path and os.path.isfile(path):
                node[key] = path
                continue
        node[key] = assigned


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False
