"""The pages for browsers: the list of jobs, one job, and the login. They are complete without JavaScript, except login.

The scripts of the pages read the same interface as all other clients, and keep a page up to date.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, cast, get_args

from fastapi import APIRouter, FastAPI, Query, Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import FileResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from cook import __version__
from cook.report.tables import human_count, human_duration
from cook.service.downloads import read_manifest
from cook.service.jobs import IDENTIFIER, Job, State

PAGE = Path(__file__).parent / "page"
ROWS = 100
"""Jobs per page of the list."""

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


class Files(StaticFiles):
    """The files of the page. Browsers ask each time whether they have changed, so that an upgrade takes effect."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Cache-Control"] = "no-cache"
        return response


def add_pages(app: FastAPI) -> None:
    """Adds the pages to the application."""
    app.include_router(router)
    app.mount("/static", Files(directory=PAGE / "static"), name="static")


@router.get("/")
def jobs_page(
    request: Request,
    state: str = "",
    after: Annotated[str | None, Query(pattern=f"^{IDENTIFIER.pattern}$")] = None,
) -> HTMLResponse:
    """The list of jobs, newest first. A state that does not exist is ignored."""
    chosen = cast(State, state) if state in get_args(State) else None
    jobs = request.app.state.service.controller.list(state=chosen, limit=ROWS, after=after)
    following = jobs[-1].id if len(jobs) == ROWS else None
    return render(
        "jobs.html", request, jobs=jobs, state=chosen, states=get_args(State), after=after, following=following
    )


@router.get("/jobs/{id}")
def job_page(request: Request, id: str) -> HTMLResponse:
    """One job."""
    try:
        job = cast(Job, request.app.state.service.controller.get(id))
    except KeyError:
        return render("missing.html", request, status=404, id=id)
    plan = job.spec.get("plan") or {}
    return render("job.html", request, job=job, plan=plan, artifacts=read_manifest(job.folder))


@router.get("/login")
def login_page(request: Request) -> HTMLResponse:
    """Where a browser gets its cookie."""
    return render("login.html", request)


@router.get("/favicon.ico")
def icon() -> FileResponse:
    """What a browser asks for while it shows a response that is not one of these pages."""
    return FileResponse(PAGE / "static" / "icon.svg", media_type="image/svg+xml")


def render(template: str, request: Request, status: int = 200, **values: Any) -> HTMLResponse:
    """A page from its template."""
    owner = getattr(request.state, "owner", None)
    return HTMLResponse(_TEMPLATES.get_template(template).render(owner=owner, **values), status_code=status)


def _moment(text: str | None) -> str:
    """A time as `2026-11-29 13:02 UTC`; scripts show it in the zone of the browser."""
    try:
        return datetime.fromisoformat(text or "").strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return "–"


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


_TEMPLATES = Environment(
    loader=FileSystemLoader(PAGE / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals["version"] = __version__
_TEMPLATES.filters |= {"moment": _moment, "size": _size, "count": human_count, "duration": human_duration}
