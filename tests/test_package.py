"""The wheel: what is in it, and what it does away from the repository."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import httpx
import pytest

import cook
from tests.commands.test_prune import tiny  # noqa: F401  # a fixture

ROOT = Path(__file__).resolve().parents[1]
CHROMIUM = Path("/usr/bin/chromium")


def run(command: list[object], cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from what git tracks, so that no build folder is left in the repository or taken from it."""
    folder = tmp_path_factory.mktemp("wheel")
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file() and name.split("/")[0] in (
            "cook",
            "config",
            "pyproject.toml",
            "README.md",
            "LICENSE",
        ):
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "source" / name).write_bytes((ROOT / name).read_bytes())
    run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, folder / "source"], folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel and nothing else; other packages are those of this environment."""
    target = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", target, wheel], target)
    return target


@pytest.fixture(scope="module")
def cook_command(installed):
    """Runs the installed `cook` in a folder."""

    def command(cwd: Path, *arguments: object) -> str:
        return run([sys.executable, installed / "bin" / "cook", *arguments], cwd, PYTHONPATH=str(installed))

    return command


def test_all_packages_are_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "cook").rglob("__init__.py")}
    assert set(listed) == found | {"cook.recipes"}


def test_the_wheel_has_everything(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {file.relative_to(ROOT).as_posix() for file in (ROOT / "cook").rglob("*.py")}
    schemas = {file.relative_to(ROOT).as_posix() for file in (ROOT / "cook" / "config" / "schemas").glob("*.json")}
    recipes = {"cook/recipes/" + f.relative_to(ROOT / "config").as_posix() for f in (ROOT / "config").rglob("*.json")}
    assert len(schemas) > 1 and len(recipes) > 2
    assert {*sources, *schemas, *recipes, "cook/py.typed"} - names == set()


def test_the_installed_command(cook_command, tmp_path, tiny):  # noqa: F811
    assert cook_command(tmp_path, "--version").strip() == cook.__version__
    assert "smollm2" in cook_command(tmp_path, "recipes", "list")
    cook_command(tmp_path, "recipes", "copy", "default", "mine")
    plan = json.loads(cook_command(tmp_path, "plan", "--config", "mine/bmcook.json", "--json"))
    assert plan["stages"][0]["stage"] == "pretrain"
    data = ["--data", tiny / "text", "--max-length", 64]
    cook_command(tmp_path, "prune", tiny / "model", *data, "--keep", "dims=0.5", "--steps", 2, "--output", "out")
    assert json.loads((tmp_path / "out" / "model" / "config.json").read_text())["intermediate_size"] == 32


@pytest.fixture(scope="module")
def installed_service(installed, tmp_path_factory):
    """What the installed `cook serve` prints."""
    folder = tmp_path_factory.mktemp("served")
    command = [sys.executable, installed / "bin" / "cook", "serve", "--home", folder / "home", "--port", "0", "--json"]
    environment = os.environ | {"PYTHONPATH": str(installed)}
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE) as server:
        try:
            yield json.loads(server.stdout.readline())
        finally:
            server.terminate()


def test_the_installed_service_has_its_pages_and_names_no_other_server(installed_service):
    token = (Path(installed_service["home"]) / "token").read_text().split()[0]
    with httpx.Client(base_url=installed_service["url"], trust_env=False) as stranger:
        assert stranger.get("/").headers["location"] == "/login"
    with httpx.Client(
        base_url=installed_service["url"], trust_env=False, headers={"Authorization": f"Bearer {token}"}
    ) as client:
        for page in ("/", "/submit", "/login"):
            named = re.findall(r'(?:src|href)="([^"]*)"', client.get(page).raise_for_status().text)
            paths = [path for path in named if path != "#main"]
            assert paths and all(re.match("/(?!/)", path) for path in paths)
            for path in paths:
                assert client.get(path).is_success, path


def test_the_installed_service_works_without_a_network(installed_service):
    """A browser that can reach nothing but the server."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed")
    elsewhere, problems = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page()

        def admit(route) -> None:
            if route.request.url.startswith(installed_service["url"]):
                route.continue_()
            else:
                elsewhere.append(route.request.url)
                route.abort()

        page.route("**/*", admit)
        page.on("console", lambda message: message.type in ("error", "warning") and problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(installed_service["login"])
        page.wait_for_selector('#live[data-live="live"]')
        assert page.is_visible("#empty") and page.title() == "Jobs · cook"
        page.click("#logout")
        page.wait_for_url("**/login")
        browser.close()
    assert (elsewhere, problems) == ([], [])
