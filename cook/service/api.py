"""The HTTP interface of the service."""

from __future__ import annotations

import asyncio
import errno
import shutil
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from fastapi import APIRouter, Body, FastAPI, Header, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from starlette.exceptions import HTTPException
from starlette.responses import Response

from cook import __version__
from cook.base.errors import UserError
from cook.config.scheme import StageName
from cook.service.access import Access, Denied
from cook.service.controller import Conflict, Controller
from cook.service.downloads import Download, read_manifest
from cook.service.forms import router as forms
from cook.service.guard import Guard, error_response
from cook.service.index import DatabaseError
from cook.service.jobs import ACTIVE, IDENTIFIER, WAITING, Job, State
from cook.service.objects import Artifact, JobList, JobObject, Login, Problem, Stop, in_words, job_object
from cook.service.outcomes import SCARCE
from cook.service.pages import add_pages
from cook.service.paths import Roots
from cook.service.streams import MAX_JOBS, EventResponse, Streams, TooMany, cursor_of
from cook.service.submission import Checked, Plan, Submission, body_hash, check, problems
from cook.service.tails import OUTPUT, TEXT_BYTES, Mark, open_gates, read_records, read_text

MAX_OFFSET = 2**53
FULL = "the disk of the server is almost full: remove old jobs with cook gc"
KEY = r"^[\x21-\x7e]{1,200}$"
LOGGED_IN = '<!doctype html><meta http-equiv="refresh" content="0;url=/"><title>cook</title><a href="/">cook</a>'

JobId = Annotated[str, Path(pattern=f"^{IDENTIFIER.pattern}$")]
Stage = Annotated[StageName, Query(description="A stage of the recipe.")]
Bytes = Annotated[int, Query(ge=-MAX_OFFSET, le=MAX_OFFSET, description="The first byte; negative: from the end.")]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one owner may use."""

    jobs: int = 1000
    """Jobs that wait or run."""
    streams: int = 32
    """Open event streams."""
    free_bytes: int = 2**30
    """No job is accepted while the disk of the home folder has less free space."""


@dataclass(kw_only=True)
class Service:
    """What the requests work on."""

    controller: Controller
    access: Access
    roots: Roots
    plan: Plan
    limits: Limits = field(default_factory=Limits)
    streams: Streams = field(init=False)

    def __post_init__(self) -> None:
        self.streams = Streams(self.controller, job_object, limit=self.limits.streams)
        self._submitting = threading.Lock()

    def submit(self, submission: Submission, owner: str, key: str | None) -> tuple[Job, bool]:
        """Checks a submission and creates its job. Returns it, and whether it is new.

        Raises:
            UserError: The submission has mistakes.
            Conflict: The key was used for another body.
            HTTPException: A limit is reached.
        """
        with self._submitting:  # a repeated request waits for the first one
            hashed = body_hash(submission)
            if key is not None and (job := self.controller.submitted(owner, key, hashed)) is not None:
                return job, False
            self._check_limits(owner)
            checked = self.check(submission, owner, key)
            return self.controller.submit(checked.spec, checked.config, checked.scheme), True

    def check(self, submission: Submission, owner: str, key: str | None = None) -> Checked:
        """Checks a submission and plans it; raises UserErrors."""
        executor = self.controller.executors.get(submission.executor)
        if executor is None:
            known = ", ".join(self.controller.executors)
            unfit = [UserError("executor: this server does not have it", wanted=known, got=submission.executor)]
        else:
            problem = executor.problem(submission.resources)
            unfit = [UserError(problem)] if problem else []
        return check(submission, self.roots, self.plan, owner=owner, key=key, unfit=unfit)

    def _check_limits(self, owner: str) -> None:
        counts = self.controller.count(owner=owner)
        if sum(counts.get(state, 0) for state in (*WAITING, *ACTIVE)) >= self.limits.jobs:
            raise HTTPException(429, f"{owner} has {self.limits.jobs} jobs that wait or run, which is the limit")
        if self.free_bytes < self.limits.free_bytes:
            raise HTTPException(507, FULL)

    @property
    def free_bytes(self) -> int:
        """Free bytes on the disk of the jobs."""
        return shutil.disk_usage(self.controller.home).free


def service_of(request: Request) -> Service:
    """The service that a request works on."""
    return cast(Service, request.app.state.service)


ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem} for code in (400, 401, 403, 404, 408, 409, 413, 415, 422, 429, 507)
}
router = APIRouter(prefix="/v1", responses=ERRORS)


@router.get("/health")
def health() -> dict[str, str]:
    """Whether the server answers, and its version."""
    return {"status": "ok", "version": __version__}


@router.get("/login", response_class=HTMLResponse)
def login_by_link(request: Request, code: str = "") -> HTMLResponse:
    """Logs a browser in by the link that the server printed. The link works once."""
    # A redirect would count as a part of the visit from another site, and leave the cookie out.
    return HTMLResponse(LOGGED_IN, headers={"Set-Cookie": _cookie(request, Login(code=code))})


@router.post("/login", status_code=204)
def login(request: Request, body: Login) -> Response:
    """Logs a browser in: sets a cookie."""
    return Response(status_code=204, headers={"Set-Cookie": _cookie(request, body)})


def _cookie(request: Request, given: Login) -> str:
    access = service_of(request).access
    owner = access.owner_of(given.token) if given.token else access.redeem(given.code)
    if owner is None:
        raise HTTPException(401, "this token is not known" if given.token else "this login link is not valid any more")
    return access.cookie(owner)


@router.post("/logout", status_code=204)
def logout(request: Request) -> Response:
    """Logs a browser out."""
    return Response(status_code=204, headers={"Set-Cookie": service_of(request).access.no_cookie()})


@router.post("/login-links", status_code=201)
def make_login_link(request: Request) -> dict[str, str]:
    """A new login link, for another browser."""
    return {"path": f"/v1/login?code={service_of(request).access.make_link(request.state.owner)}"}


@router.post("/jobs", status_code=201, response_model=JobObject, responses={200: {"model": JobObject}})
def submit(
    request: Request,
    response: Response,
    body: Submission,
    idempotency_key: Annotated[str | None, Header(pattern=KEY)] = None,
) -> dict[str, Any]:
    """Submits a job. With an Idempotency-Key, the same body leads to the same job, however often it is sent."""
    job, is_new = service_of(request).submit(body, request.state.owner, idempotency_key)
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return job_object(job)


@router.post("/plan")
def plan(request: Request, body: Submission) -> dict[str, Any]:
    """Checks a submission and returns its plan, without creating a job."""
    service = service_of(request)
    return cast(dict[str, Any], service.check(body, request.state.owner).spec["plan"])


@router.get("/jobs", response_model=JobList)
def list_jobs(
    request: Request,
    owner: Annotated[str | None, Query(max_length=100)] = None,
    state: Annotated[list[State] | None, Query(max_length=9)] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(pattern=f"^{IDENTIFIER.pattern}$")] = None,
) -> dict[str, Any]:
    """Lists jobs, newest first."""
    jobs = service_of(request).controller.list(owner=owner, state=state, limit=limit, after=after)
    return {"jobs": [job_object(job) for job in jobs], "next": jobs[-1].id if len(jobs) == limit else None}


@router.get("/jobs/{id}", response_model=JobObject)
def get_job(request: Request, id: JobId) -> dict[str, Any]:
    """One job."""
    return job_object(_job(request, id))


@router.delete("/jobs/{id}", status_code=204)
def remove(request: Request, id: JobId) -> Response:
    """Removes a job that has ended, with all of its files."""
    service_of(request).controller.remove(id)
    return Response(status_code=204)


@router.post("/jobs/{id}/stop", response_model=JobObject)
def stop(request: Request, id: JobId, body: Annotated[Stop | None, Body()] = None) -> dict[str, Any]:
    """Stops a job: it saves a checkpoint first, unless `now`."""
    return job_object(service_of(request).controller.stop(id, now=body is not None and body.now))


@router.post("/jobs/{id}/resume", response_model=JobObject)
def resume(request: Request, id: JobId) -> dict[str, Any]:
    """Queues a job again that was stopped, failed or lost. It continues from its last checkpoint."""
    return job_object(service_of(request).controller.resume(id))


@router.get("/jobs/{id}/log", response_class=PlainTextResponse)
def log(
    request: Request,
    id: JobId,
    offset: Bytes = 0,
    attempt: Annotated[int | None, Query(ge=1, le=10**6)] = None,
    limit: Annotated[int, Query(ge=4, le=2**20)] = TEXT_BYTES,
) -> PlainTextResponse:
    """What an attempt has printed, from a byte offset. `X-Next-Offset` is where to continue."""
    job = _job(request, id)
    number = job.attempt if attempt is None else attempt
    found = read_text(job.folder, f"attempts/{number}/output.log", offset, limit)
    headers = {"X-Offset": found.offset, "X-Next-Offset": found.next, "X-Size": found.size, "X-Attempt": number}
    return PlainTextResponse(found.text, headers={name: str(value) for name, value in headers.items()})


@router.get("/jobs/{id}/metrics")
def metrics(request: Request, id: JobId, stage: Stage) -> dict[str, Any]:
    """All records of a stage's log.jsonl."""
    job = _job(request, id)
    records: list[dict[str, Any]] = []
    mark: Mark | None = None
    while True:
        found = read_records(job.folder, f"{OUTPUT}/{stage}/log.jsonl", mark)
        records, mark = (found.records if found.reset else records + found.records), found.mark
        if not found.more:
            return {"stage": stage, "records": records}


@router.get("/jobs/{id}/structure")
def structure(
    request: Request,
    id: JobId,
    stage: Stage,
    after: Annotated[int | None, Query(ge=-1, le=2**32)] = None,
    points: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> dict[str, Any]:
    """How open the gates of a stage were: one byte per unit, evenly spaced over the steps later than `after`."""
    gates = open_gates(_job(request, id).folder, stage)
    if gates is None:
        return {"stage": stage, "groups": [], "records": []}
    return {"stage": stage, "groups": gates.groups, "records": gates.records(after=after, points=points)}


@router.get("/jobs/{id}/artifacts", response_model=list[Artifact])
def artifacts(request: Request, id: JobId) -> list[dict[str, Any]]:
    """The files that a finished job offers."""
    return read_manifest(_job(request, id).folder)


@router.get("/jobs/{id}/artifacts/{name:path}", response_class=Response)
def download(request: Request, id: JobId, name: str) -> Download:
    """Downloads one of these files, or a range of it."""
    job = _job(request, id)
    try:
        return Download(job.folder, name)
    except FileNotFoundError:
        raise HTTPException(404, f"job {id} has no artifact {name!r}") from None


@router.get("/events", response_class=Response)
async def events(
    request: Request,
    jobs: Annotated[str, Query(max_length=400, description="Job ids, separated by commas; empty: all jobs.")] = "",
    logs: bool = True,
    last_event_id: Annotated[str | None, Header(max_length=32_000)] = None,
) -> EventResponse:
    """A stream of the changes of jobs: `job`, `metrics`, `gates`, `log`, and `reset` before a stage begins anew."""
    service = service_of(request)
    ids = list(dict.fromkeys(id for id in jobs.split(",") if id))
    if len(ids) > MAX_JOBS:
        raise HTTPException(422, f"a stream follows at most {MAX_JOBS} jobs")
    for id in ids:
        await asyncio.to_thread(service.controller.get, id)
    service.streams.enter(request.state.owner)
    stream = service.streams.events(ids, cursor_of(last_event_id, ids), logs=logs)
    return EventResponse(service.streams, request.state.owner, stream)


def _job(request: Request, id: str) -> Job:
    return service_of(request).controller.get(id)


def create_app(service: Service) -> FastAPI:
    """The application. Every request passes the guard first."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.streams.close()

    app = FastAPI(
        title="cook",
        version=__version__,
        openapi_url="/v1/openapi.json",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service = service
    app.include_router(router)
    add_pages(app)
    app.include_router(forms)
    app.add_middleware(Guard, access=service.access)
    app.add_exception_handler(KeyError, _no_job)
    app.add_exception_handler(OSError, _not_written)
    app.add_exception_handler(DatabaseError, _not_written)
    for kind in (HTTPException, RequestValidationError, Conflict, TooMany, UserError, Denied):
        app.add_exception_handler(kind, _refused)
    return app


def _no_job(request: Request, error: Exception) -> JSONResponse:
    return error_response(404, f"there is no job {error.args[0] if error.args else ''}")


def _not_written(request: Request, error: Exception) -> JSONResponse:
    """Tells that the disk is full; what else fails is an error of the server."""
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or service_of(request).free_bytes < SCARCE:
        return error_response(507, FULL)
    raise error


def _refused(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        return error_response(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return error_response(422, "the request has mistakes", [in_words(each) for each in error.errors()])
    if isinstance(error, UserError):
        return error_response(422, "the submission has mistakes", problems(error))
    return error_response(409 if isinstance(error, Conflict) else 429, str(error))
