"""The JSON objects of the interface."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from cook.service.jobs import Job, State


class JobObject(BaseModel):
    """A job. Times are ISO 8601 in UTC."""

    id: str
    name: str
    state: State
    attempt: int
    created: str
    started: str | None
    ended: str | None
    owner: str
    executor: str
    gpus: int
    processes: int
    priority: int
    message: str
    plan: dict[str, Any] | None
    links: dict[str, str]


class JobList(BaseModel):
    """A page of jobs, newest first. `next` is the `after` of the next page."""

    jobs: list[JobObject]
    next: str | None


class Artifact(BaseModel):
    """A file of a finished job."""

    name: str
    path: str
    bytes: int
    sha256: str


class Problem(BaseModel):
    """Why a request failed; `problems` lists all mistakes at once."""

    error: str
    problems: list[str]


class Stop(BaseModel):
    """How to stop a job."""

    model_config = ConfigDict(extra="forbid", strict=True)
    now: bool = False
    """True: without waiting for a checkpoint."""


class Login(BaseModel):
    """A token, or the code of a login link."""

    model_config = ConfigDict(extra="forbid", strict=True)
    token: str = ""
    code: str = ""


def job_object(job: Job) -> dict[str, Any]:
    """The JSON object that describes a job."""
    here = f"/v1/jobs/{job.id}"
    links = {"self": here} | {name: f"{here}/{name}" for name in ("log", "metrics", "structure", "artifacts")}
    links |= {"events": f"/v1/events?jobs={job.id}", "page": f"/jobs/{job.id}"}
    own = [name for name in JobObject.model_fields if name not in ("plan", "links")]
    return {name: getattr(job, name) for name in own} | {"plan": job.spec.get("plan"), "links": links}


def in_words(error: Mapping[str, Any]) -> str:
    """A mistake in a request, as pydantic describes it, as text."""
    place = ".".join(str(part) for part in error["loc"] if part not in ("body", "query", "header", "path"))
    return f"{place}: {error['msg'].removeprefix('Value error, ')}".removeprefix(": ")
