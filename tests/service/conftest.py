"""A server per test file, with its inputs and a recipe that may be submitted; a browser; a Slurm cluster."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.service.live import Live, recipe, serving
from tests.service.slurm_cluster import Cluster, missing

CHROMIUM = Path("/usr/bin/chromium")
DISK = 48 << 20  # bytes


@pytest.fixture(scope="module")
def cluster():
    if reason := missing():
        pytest.skip(f"Slurm: {reason}")
    with Cluster() as made:
        yield made


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def body(inputs):
    return recipe(inputs)


@pytest.fixture(scope="module")
def live(tmp_path_factory, inputs, body):
    with serving(tmp_path_factory.mktemp("home"), roots=[inputs]) as running:
        yield running


@pytest.fixture
def small_disk(tmp_path):
    """A folder with a file system of its own."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small disk needs root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """Opens pages in browsers of their own, logged in; what the console reports is an error of the test."""
    contexts, reported = [], []

    def opened(live: Live, path: str = "/", *, allowed: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        context.set_default_timeout(15_000)
        contexts.append(context)
        page = context.new_page()

        def note(message: str) -> None:
            if not allowed or not re.search(allowed, message):
                reported.append(message)

        page.on("console", lambda message: message.type in ("error", "warning") and note(message.text))
        page.on("pageerror", lambda error: note(str(error)))
        page.goto(live.server.login_link)
        page.wait_for_url(f"{live.url}/")
        if path != "/":
            page.goto(f"{live.url}{path}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not reported, "the console of the browser"
