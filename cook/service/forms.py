"""The page that submits a recipe: it lists the recipes below the roots, checks one of them, and shows its plan.

Checking is a GET request without effects, so that the page works without scripts up to the last step. The job itself is
created by the same request as every other submission.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse
from pydantic import ValidationError

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.config.load import DEFAULT_SCHEME
from cook.service.objects import in_words
from cook.service.pages import render
from cook.service.paths import Roots
from cook.service.submission import CONFIG, Submission, problems

MAX_FOLDERS = 20_000
"""Folders below one root that are looked at."""

router = APIRouter(include_in_schema=False, default_response_class=HTMLResponse)


@router.get("/submit")
def submit_page(
    request: Request,
    recipe: str = "",
    set: Annotated[str, Query(max_length=20_000)] = "",
    name: str = "",
    gpus: str = "0",
    executor: str = "local",
) -> HTMLResponse:
    """The form; with a recipe also its mistakes, or its plan and the button that starts the job."""
    service = request.app.state.service
    known = recipes(service.roots)
    given = {"recipe": recipe, "set": set, "name": name, "gpus": gpus, "executor": executor}
    body, plan, mistakes = None, None, []
    if recipe:
        try:
            body = read_recipe(service.roots, recipe) | {
                "set": [line.strip() for line in set.splitlines() if line.strip()],
                "name": name or Path(recipe).parent.name,
                "gpus": int(gpus) if gpus.isdecimal() else gpus,
                "executor": executor,
            }
            plan = service.check(Submission.model_validate(body), request.state.owner).spec["plan"]
        except ValidationError as error:
            mistakes = [in_words(each) for each in error.errors()]
        except UserError as error:
            mistakes = problems(error)
    return render(
        "submit.html",
        request,
        recipes=known,
        executors=list(service.controller.executors),
        given=given,
        body=body,
        plan=plan,
        mistakes=mistakes,
        key=secrets.token_hex(16),
    )


def recipes(roots: Roots) -> Sequence[str]:
    """The paths of the recipes below the roots."""
    walks = (islice(os.walk(root), MAX_FOLDERS) for root in roots.folders)
    found = (at for walk in walks for at, _, files in walk if CONFIG in files)
    return sorted(os.path.join(at, CONFIG) for at in found if at.isprintable())


def read_recipe(roots: Roots, path: str) -> dict[str, Any]:
    """The two files of a recipe. Other files that it names are not read, since they may belong to somebody else.

    Raises:
        UserError: a file lies outside of the roots, or cannot be read.
    """
    file = Path(roots.resolve(path, "recipe"))
    config = read_json(file)
    pruning = config.get("pruning") if isinstance(config, dict) else None
    named = pruning.get("l0_pruning") if isinstance(pruning, dict) else None
    scheme = file.parent / (named if isinstance(named, str) else DEFAULT_SCHEME)
    is_there = named is not None or scheme.exists()
    return {"config": config, "scheme": read_json(roots.resolve(str(scheme), "pruning.l0_pruning")) if is_there else {}}
