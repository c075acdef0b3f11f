"""Reads `bmcook.json` and its scheme into a `RunConfig`, or reports all errors of both files at once.

This only reads files. A valid configuration can still fail later because of its corpus or weights, but not because of
a key.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar, get_args, get_type_hints

from cook.base.errors import UserError, UserErrors
from cook.base.files import read_json
from cook.config.check import Sections, cross_check
from cook.config.corpus import DataConfig, MixingConfig, SourceConfig
from cook.config.schema import Keys, dotted, load_schema, schema_findings, shown, with_home
from cook.config.types import (
    DERIVED,
    FIELD_OF,
    SCHEME_SECTIONS,
    ConfigSource,
    GatesConfig,
    PruningConfig,
    RunConfig,
    StageEntry,
    TrainingConfig,
    decoded,
    stage_of,
)

DEFAULT_SCHEME = PruningConfig.l0_pruning
COMPANIONS: tuple[tuple[str, ...], ...] = (("model", "config"), ("deepspeed",))
"""Objects of `bmcook.json` that may be given as the path of a JSON file."""
UNREADABLE = object()
"""Marks a file that could not be read. None cannot be used, since a file may contain null."""

Section = TypeVar("Section")


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    world_size: int | None = None,
    refused: Sequence[tuple[str, UserError]] = (),
) -> RunConfig:
    """Reads, checks and builds the configuration of a run.

    Args:
        path: The `bmcook.json`. Its scheme is the file `pruning.l0_pruning`, relative to the folder of `path`.
        overrides: Settings `a.b=c` that change the files' values before the check. A key that starts with
            `coarse-grained`, `fine-grained`, `joint` or `gates` changes the scheme.
        world_size: Number of ranks, against which the batch sizes are checked. None if unknown.
        refused: Errors that the caller has found, each with the top-level section that it makes invalid. They are
            raised together with the others, and no file that such a section names is read.

    Raises:
        UserErrors: All errors of both files and of the overrides, numbered.
    """
    assert world_size is None or world_size > 0, world_size
    path = os.path.expanduser(path)
    reader = _Reader(path)
    reader.errors += [error for _, error in refused]
    reader.invalid |= {section for section, _ in refused}
    settings = reader.parse(overrides)
    bmcook = reader.read(path)
    if isinstance(bmcook, dict):
        _inline(reader, bmcook, [s for s in settings if not s.is_scheme])
        bmcook = with_home(bmcook, load_schema("bmcook"))
    scheme_path = _scheme_path(path, bmcook)
    scheme = reader.read(scheme_path) if scheme_path else {}
    if isinstance(scheme, dict):
        reader.apply([s for s in settings if s.is_scheme], scheme)
        scheme = with_home(scheme, load_schema("l0_pruning"))

    reader.check_schemas(bmcook, scheme, scheme_path)
    sections = _sections(bmcook, scheme, reader.invalid)
    reader.errors += cross_check(sections, world_size=world_size)
    if reader.errors:
        raise UserErrors(f"{path}: the configuration cannot be used", reader.errors)
    values = sections.values
    added = (values.get(name) for name in ("coarse", "fine", "joint", "quantization", "moefy"))
    stage = stage_of(values["pruning"], *added)
    assert stage is not None, "the checks let no stage pass without its section"
    return RunConfig(**values, stage=stage, source=ConfigSource(bmcook=path, l0_pruning=scheme_path))


class _Reader:
    """Collects the errors of one load and the sections that they make invalid."""

    def __init__(self, path: str):
        self.path = path
        self.errors: list[UserError] = []
        self.invalid: set[str] = set()
        self.set_by: dict[Keys, str] = {}

    def read(self, path: str) -> Any:
        """Parses a file. If it cannot be read, records the error and returns UNREADABLE."""
        with self.collecting():
            try:
                return read_json(path)
            except ValueError as error:  # a NUL in the path, or a number with thousands of digits
                raise UserError(f"{path}: cannot be read: {error}") from None
        return UNREADABLE

    @contextmanager
    def collecting(self, *sections: str) -> Iterator[None]:
        """Records a UserError that is raised inside, and the sections that it makes invalid."""
        try:
            yield
        except UserError as error:
            self.errors.append(error)
            self.invalid |= set(sections)

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        parsed = []
        for text in overrides:
            with self.collecting():
                parsed.append(parse_override(text))
        return parsed

    def apply(self, settings: Sequence[Override], root: dict[str, Any]) -> None:
        for setting in settings:
            with self.collecting(setting.keys[0]):
                self.set_by[apply_override(root, setting)] = setting.text

    def check_schemas(self, bmcook: Any, scheme: Any, scheme_path: str | None) -> None:
        """Checks the files that could be read. A file that could not makes all of its sections invalid."""
        for value, name, label, known in (
            (bmcook, "bmcook", self.path, _BMCOOK),
            (scheme, "l0_pruning", scheme_path or DEFAULT_SCHEME, _SCHEME),
        ):
            readable = value is not UNREADABLE
            findings = schema_findings(value, name, label, self.set_by) if readable else []  # type: ignore[arg-type]
            self.errors += [finding.error for finding in findings]
            self.invalid |= {finding.section for finding in findings}
            if not readable or any(not finding.section for finding in findings):
                self.invalid |= set(known)


def _inline(reader: _Reader, bmcook: dict[str, Any], settings: Sequence[Override]) -> None:
    """Applies the overrides to `bmcook`, and replaces the paths of companion files by their content."""
    for setting in settings:
        for keys in COMPANIONS:
            if setting.keys[: len(keys)] == keys and len(setting.keys) > len(keys):
                _read_companion(reader, bmcook, keys)  # the setting changes a value inside that file
        reader.apply([setting], bmcook)
    for keys in COMPANIONS:
        _read_companion(reader, bmcook, keys)


def _read_companion(reader: _Reader, bmcook: dict[str, Any], keys: tuple[str, ...]) -> None:
    node: Any = bmcook
    for key in keys[:-1]:
        node = node.get(key) if isinstance(node, dict) else None
    path = node.get(keys[-1]) if isinstance(node, dict) else None
    if not isinstance(path, str) or not path:
        return
    content = reader.read(os.path.expanduser(path))
    if isinstance(content, dict):
        node[keys[-1]] = content
    else:
        del node[keys[-1]]  # avoids additional errors about missing keys
        reader.invalid.add(keys[0])
        if content is not UNREADABLE:
            reader.errors.append(UserError(f"{path}: not a JSON object", wanted=".".join(keys)))


def _scheme_path(path: str, bmcook: Any) -> str | None:
    """The path of the scheme. None if no scheme is needed and none exists."""
    bmcook = bmcook if isinstance(bmcook, dict) else {}
    pruning = bmcook["pruning"] if isinstance(bmcook.get("pruning"), dict) else {}
    stages = bmcook["stages"] if isinstance(bmcook.get("stages"), list) else []
    named = pruning.get("l0_pruning")
    scheme = str(Path(path).parent / (named if isinstance(named, str) else DEFAULT_SCHEME))
    has_scheme = pruning.get("is_pruning") is True and decoded(pruning.get("mask_method")) != "pattern"
    needed = isinstance(named, str) or has_scheme
    alone = ("pretrain", "pattern", "quantize", "moefy")
    needed |= any(isinstance(stage, dict) and stage.get("name") not in alone for stage in stages)
    return scheme if needed or os.path.exists(scheme) else None


def _section(field: dataclasses.Field[Any]) -> Any:
    """The dataclass of a field of RunConfig; None for a plain value."""
    hint = _HINTS[field.name]
    return next((each for each in (hint, *get_args(hint)) if dataclasses.is_dataclass(each)), None)


_HINTS = get_type_hints(RunConfig)
_ALL = {field.name: _section(field) for field in dataclasses.fields(RunConfig) if field.name not in DERIVED}
_KEY_OF = {name: key for key, name in FIELD_OF.items()}
_SCHEME = {key: _ALL[name] for key, name in SCHEME_SECTIONS.items()}
_BMCOOK = {_KEY_OF.get(name, name): section for name, section in _ALL.items() if _KEY_OF.get(name) not in _SCHEME}


def _sections(bmcook: Any, scheme: Any, invalid: set[str]) -> Sections:
    """Builds the fields of RunConfig from the valid sections."""
    values: dict[str, Any] = {}
    for content, known in ((bmcook, _BMCOOK), (scheme, _SCHEME)):
        for key in known.keys() - invalid:
            if key in content:
                values[FIELD_OF.get(key, key)] = _build(key, known[key], content[key])
    return Sections(values=values, invalid=frozenset(FIELD_OF.get(key, key) for key in invalid))


def _build(key: str, section: Any, value: Any) -> Any:
    if key == "stages":
        entries = [dict(entry, training=_typed(TrainingConfig, entry.get("training", {}))) for entry in value]
        return tuple(StageEntry(**entry) for entry in entries)
    if section is None or value is None:
        return value
    fields = _typed(section, value)
    if section is DataConfig:
        fields["sources"] = tuple(SourceConfig(**_typed(SourceConfig, entry)) for entry in fields.get("sources", ()))
        if fields.get("mixing") is not None:
            fields["mixing"] = MixingConfig(**_typed(MixingConfig, fields["mixing"]))
    if section is GatesConfig:
        fields |= {name: None for name in ("learning_rate", "ramp") if fields.get(name) == "auto"}
    return section(**fields)


def _typed(section: type, value: dict[str, Any]) -> dict[str, Any]:
    """Converts JSON values to the types of the section's fields: whole numbers to floats, lists to tuples."""
    hints = get_type_hints(section)
    return {key: _converted(hints.get(key), entry) for key, entry in value.items()}


def _converted(hint: Any, value: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in (get_args(hint) or (hint,)):
        return float(value)
    return value


@dataclass(frozen=True, kw_only=True)
class Override:
    """A command-line override `--set a.b=c`, applied before the check."""

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
    """Parses an override `a.b=c`. Raises UserError if the `=` is missing, or the path has an empty part."""
    path, equals, written = text.partition("=")
    keys = tuple(path.strip().split("."))
    if not equals or not all(keys):
        raise UserError(f"--set {text}: not a setting", wanted="a.b=value", got=text)
    return Override(keys=keys, value=_parse_value(written, text), text=text)


def apply_override(root: dict[str, Any], override: Override) -> Keys:
    """Applies an override to `root`, in place, and returns the keys and list indices of the changed value.

    Missing and null objects on the path are created. A list entry is selected by index or, for stages, by name.

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
        what = f"--set {override.text}: {dotted(place)!r} has no keys"
        raise UserError(what, wanted="an object or a list", got=shown(node))
    if key.isascii() and key.isdigit() and len(key) < 10:
        index = int(key)
    else:
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in node]
        index = names.index(key) if key in names else len(node)
    if index >= len(node):
        named = [entry["name"] for entry in node if isinstance(entry, dict) and isinstance(entry.get("name"), str)]
        wanted = f"an index below {len(node)}" + (f" or one of {', '.join(named)}" if named else "")
        raise UserError(f"--set {override.text}: {dotted(place)!r} has no entry {key!r}", wanted=wanted)
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
