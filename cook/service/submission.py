"""A submitted job: its fields, the checks of its two files, and the plan."""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

from cook.base.errors import UserError, UserErrors
from cook.base.files import write_json
from cook.config.load import COMPANIONS, Override, apply_override, parse_override
from cook.config.schema import MAX_DEPTH, shown
from cook.service.deepspeed_keys import refused_keys
from cook.service.paths import SCHEME, Refused, Roots, assign_paths
from cook.service.slurm import OPTIONS

CONFIG = "bmcook.json"
TOO_DEEP = f"the files are nested deeper than {MAX_DEPTH} levels"
SlurmValue = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:,+@=/\[\]][A-Za-z0-9_.:,+@=/\[\]&|*-]{0,199}$")]
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")

Plan = Callable[[Path, int, Sequence[Refused]], dict[str, Any]]
"""Checks the two files of a folder for a number of ranks, and returns the plan; raises UserError."""


class Submission(BaseModel):
    """The body of a submission."""

    model_config = ConfigDict(extra="forbid", strict=True)

    config: dict[str, Any]
    """The content of `bmcook.json`."""
    scheme: dict[str, Any] = {}
    """The content of `l0_pruning.json`."""
    set: list[str] = Field(default=[], max_length=1000)
    """Changes to both files, `KEY=VALUE`."""
    name: str = Field(default="", max_length=100)
    """A name for people; it is only shown."""
    executor: Literal["local", "slurm"] = "local"
    gpus: int = Field(default=0, ge=0, le=4096)
    processes: int | None = Field(default=None, ge=1, le=4096)
    """Ranks. None: one per GPU, or one on the CPU."""
    priority: int = Field(default=0, ge=-1000, le=1000)
    retries: int = Field(default=2, ge=0, le=100)
    """How often the job is started again after a lost rank or an interruption that nobody asked for."""
    stop_grace: float = Field(default=600.0, ge=1, le=86400)
    """Seconds between the request to stop and the kill."""
    reshape: bool | None = None
    """Whether the small model is written and verified after the last stage. None: if a stage learns a mask."""
    slurm: dict[str, SlurmValue] = {}
    """Options of sbatch, such as `partition` and `time`."""

    @field_validator("name")
    @classmethod
    def _printable(cls, name: str) -> str:
        if not name.isprintable():
            raise ValueError("contains a character that cannot be printed")
        return name

    @field_validator("slurm")
    @classmethod
    def _known_options(cls, slurm: dict[str, str]) -> dict[str, str]:
        unknown = sorted(slurm.keys() - set(OPTIONS))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; possible are {', '.join(OPTIONS)}")
        return slurm

    @model_validator(mode="after")
    def _fits_together(self) -> Submission:
        if _is_too_deep(self.config, self.scheme):
            raise ValueError(TOO_DEEP)
        if self.gpus and self.processes not in (None, self.gpus):
            raise ValueError(f"processes: {self.processes} differs from gpus {self.gpus}; each GPU has one process")
        if self.slurm and self.executor != "slurm":
            raise ValueError('slurm: has options, but the executor is not "slurm"')
        return self

    @property
    def ranks(self) -> int:
        """The number of processes."""
        return self.processes or max(1, self.gpus)

    @property
    def resources(self) -> dict[str, Any]:
        """What an executor has to provide, as in spec.json."""
        return {
            "executor": self.executor,
            "gpus": self.gpus,
            "processes": self.ranks,
            "stop_grace": self.stop_grace,
            "slurm": self.slurm,
        }


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A submission that can run."""

    spec: dict[str, Any]
    config: dict[str, Any]
    scheme: dict[str, Any]


def check(
    submission: Submission,
    roots: Roots,
    plan: Plan,
    *,
    owner: str,
    key: str | None = None,
    unfit: Sequence[UserError] = (),
) -> Checked:
    """Checks a submission completely; nothing is written outside of a temporary folder.

    Args:
        submission: The body.
        roots: What it may read.
        plan: Checks the files that would run, and plans them.
        owner: Who submits it.
        key: The Idempotency-Key of the request.
        unfit: Why the executor cannot run it.

    Raises:
        UserErrors: All mistakes at once.
    """
    config, scheme = copy.deepcopy(submission.config), copy.deepcopy(submission.scheme)
    errors = [*unfit, *_apply(submission.set, config, scheme)]
    if _is_too_deep(config, scheme):  # by a change
        raise UserErrors("the submission cannot be used", [*errors, UserError(TOO_DEEP)])
    refused = [("", error) for error in errors] + _inline_only(config)
    refused += assign_paths(config, scheme, roots)
    if isinstance(config.get("deepspeed"), dict):
        refused += [("deepspeed", error) for error in refused_keys(config["deepspeed"])]
    with tempfile.TemporaryDirectory(prefix="cook-plan-") as folder:
        write_json(Path(folder, CONFIG), config)
        write_json(Path(folder, SCHEME), scheme)
        planned = plan(Path(folder), submission.ranks, refused)
    spec = {
        "name": submission.name,
        "owner": owner,
        **submission.resources,
        "priority": submission.priority,
        "retries": submission.retries,
        "reshape": _learns(planned) if submission.reshape is None else submission.reshape,
        "environment": {} if roots.allow_hub else dict.fromkeys(OFFLINE, "1"),
        "plan": planned,
        "idempotency_key": key,
        "body_hash": body_hash(submission),
    }
    return Checked(spec=spec, config=config, scheme=scheme)


def _learns(plan: dict[str, Any]) -> bool:
    return any(row["learns"] for row in plan["stages"])


def problems(error: UserError) -> list[str]:
    """The messages of an error, one per mistake."""
    return [text for each in error.errors for text in problems(each)] if isinstance(error, UserErrors) else [str(error)]


def body_hash(submission: Submission) -> str:
    """A hash of the content of a submission, by which a repeated request is recognised."""
    content = json.dumps(submission.model_dump(), sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(content.encode()).hexdigest()


def _is_too_deep(*files: Any) -> bool:
    """Whether the nesting is too deep for recursive functions."""
    level: list[Any] = list(files)
    for _ in range(MAX_DEPTH + 1):
        below = [node.values() if isinstance(node, dict) else node for node in level if isinstance(node, dict | list)]
        level = [child for children in below for child in children]
    return bool(level)


def _apply(texts: Sequence[str], config: dict[str, Any], scheme: dict[str, Any]) -> Iterator[UserError]:
    """Applies the changes in place. They cannot be left to the loader, since a change may set a path."""
    for text in texts:
        try:
            override: Override = parse_override(text)
            apply_override(scheme if override.is_scheme else config, override)
        except UserError as error:
            yield error


def _inline_only(config: dict[str, Any]) -> list[Refused]:
    """Refuses files that the loader would read in place of an object, and removes their names."""
    found: list[Refused] = []
    for keys in COMPANIONS:
        node: Any = config
        for key in keys[:-1]:
            node = node.get(key) if isinstance(node, dict) else None
        if isinstance(node, dict) and isinstance(node.get(keys[-1]), str):
            what = f"{'.'.join(keys)}: a service does not read this file"
            error = UserError(what, wanted="its content, as an object", got=shown(node.pop(keys[-1])))
            found.append((keys[0], error))
    return found
