"""The documentation: the site builds, its links have targets, and the commands that it prints work."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer

import cook
from cook.cli import app
from cook.config.types import STAGE_NAMES
from tests.warm import interpreter

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
SCHEMAS = ROOT / "cook" / "config" / "schemas"
GENERATED = {DOCS / "reference" / name for name in ("command_line.md", "settings.md")}
PAGES = sorted([*DOCS.rglob("*.md"), *(ROOT / "config").rglob("*.md"), *ROOT.glob("*.md")])
COMMAND: Any = typer.main.get_command(app)
IS_WHOLE = "checkpoint" in COMMAND.commands
"""Whether all commands are there that the pages speak of."""
SHELL = ("bash", "", "console")
BLOCK = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
PARSED = ("cook/train.py", "cook/tasks.py", "do_prune.py")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, *languages: str) -> list[str]:
    return [text for language, text in BLOCK.findall(page.read_text(encoding="utf-8")) if language in languages]


def environment() -> dict[str, str]:
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "NO_MKDOCS_2_WARNING": "1",
        "COLUMNS": "200",
    }


def run(*command: str, folder: Path) -> str:
    if command[0] == sys.executable and "mkdocs" not in command:
        command = (interpreter(), *command[1:])
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


# The site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for package in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("docs") / "site"
    run(sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder), folder=ROOT)
    return folder


def test_the_site_has_all_pages_and_figures(site):
    for page in DOCS.rglob("*.md"):
        assert (site / page.relative_to(DOCS)).with_suffix(".html").is_file(), page
    shown = set()
    for page in site.rglob("*.html"):
        for source in re.findall(r'<img[^>]+src="([^"]+)"', page.read_text(encoding="utf-8")):
            figure = (page.parent / source).resolve()
            assert source.startswith("data:") or figure.is_file(), f"{page}: {source}"
            shown.add(figure.name)
    assert shown >= {figure.name for figure in (ROOT / "results" / "bench").rglob("*.png")}


def test_the_site_can_be_read_without_a_network(site):
    outside = r"(?:https?:)?//"
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(rf'<(?:script|img|iframe|source|video)\b[^>]*\ssrc="{outside}[^"]*"', text), page
        styles = re.findall(r"<link\b[^>]*>", text)
        assert not [link for link in styles if re.search(rf'href="{outside}', link) and 'rel="canonical"' not in link]
    for style in site.rglob("*.css"):
        assert not re.findall(rf"(?:url\(|@import\s)[\"']?{outside}", style.read_text(encoding="utf-8")), style


def test_the_api_page_shows_all_public_names(site):
    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    names = set(cook.__all__) - {"__version__"}
    assert {name for name in names if f'id="{getattr(cook, name).__module__}.{name}"' not in text} == set()


# Pages


def test_the_readme_is_one_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        goal = (page.parent / path).resolve() if path else page
        assert goal.exists(), f"{target}: no such file"
        if anchor and goal.suffix == ".md" and not anchor.startswith("cook."):
            assert anchor in anchors(goal), f"{target}: no such heading"


def test_generated_pages_are_what_the_program_says():
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for page, text in generate.pages().items():
        assert page.read_text(encoding="utf-8") == text, f"{name_of(page)}: run python docs/generate.py"


# Commands


def shell_lines(page: Path) -> Iterator[str]:
    """The commands of a page: the lines of its shell blocks, the `$` lines of its listings, and inline code."""
    text = page.read_text(encoding="utf-8")
    for language, block in BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if language == "bash":
                yield line.strip()
            elif language in SHELL and line.startswith("$ "):
                yield line[2:]
    for code in re.findall(r"`([^`\n]+)`", BLOCK.sub("", text)):
        if re.match(r"(\w+=\S+ )*(cook [a-z]|python \S+\.py|bash scripts/|deepspeed )", code):
            yield code


def programs(line: str) -> Iterator[tuple[str, list[str]]]:
    """The programs of this project that a line of shell starts, with their arguments."""
    words = shlex.split(line, comments=True)
    inner = [word for word in words if " " in word and "cook/" in word]
    for word in inner:
        yield from programs(word)
    words = [word for word in words if word not in inner]
    while words and re.fullmatch(r"\w+=.*", words[0], re.DOTALL):
        del words[0]
    if words[:1] == ["cook"]:
        yield "cook", words[1:]
        return
    for place, word in enumerate(words):
        if re.fullmatch(r"(cook|scripts|examples|docs)/[\w/]+\.(py|sh)|do_prune\.py", word):
            yield word, words[place + 1 :]
            return


@functools.cache
def options_of(program: str) -> frozenset[str]:
    """The options that a script of the project has."""
    text = (ROOT / program).read_text(encoding="utf-8")
    if program in PARSED:
        text = run(sys.executable, str(ROOT / program), "--help", folder=ROOT)
    return frozenset(re.findall(r"--[a-z][\w-]*", text))


def settings_exist(arguments: list[str]) -> None:
    for option, value in zip(arguments, arguments[1:], strict=False):
        if option == "--stage":
            assert value in (*STAGE_NAMES, "all", "NAME"), f"--stage {value}"
        if option == "--set" and value != "KEY=VALUE":
            keys = value.split("=")[0].split(".")
            assert any(has_key(schema(name), schema(name), keys) for name in ("bmcook", "l0_pruning")), value


def has_key(root: dict[str, Any], node: dict[str, Any], keys: list[str]) -> bool:
    while "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    if not keys:
        return True
    below = node.get("items") or node.get("properties", {}).get(keys[0])
    return below is not None and has_key(root, below, keys[1:])


def check_cook(arguments: list[str]) -> None:
    command = COMMAND
    while arguments and hasattr(command, "commands") and not arguments[0].startswith("-"):
        if arguments[0] not in command.commands and not IS_WHOLE:
            return
        assert arguments[0] in command.commands, f"cook has no command {arguments[0]!r}"
        command = command.commands[arguments[0]]
        arguments = arguments[1:]
    if (command.context_settings or {}).get("ignore_unknown_options"):
        return
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    known |= {"--help", "--install-completion"}
    for word in arguments:
        assert not word.startswith("--") or word.partition("=")[0] in known, f"{command.name} has no option {word}"
    settings_exist(arguments)


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED], ids=name_of)
def test_commands_and_their_options_exist(page):
    for line in shell_lines(page):
        for program, arguments in programs(line):
            if program == "cook":
                check_cook(arguments)
                continue
            assert (ROOT / program).is_file(), line
            if program.endswith(".py"):
                for word in arguments:
                    assert not word.startswith("--") or word.partition("=")[0] in options_of(program), f"{line}: {word}"
            if program in ("cook/train.py", "do_prune.py"):
                settings_exist(arguments)


def test_commands_are_found_in_all_their_forms():
    nested = "srun bash -c 'exec torchrun --nnodes 2 cook/train.py --config a --stage all'"
    assert list(programs(nested)) == [("cook/train.py", ["--config", "a", "--stage", "all"])]
    assert list(programs("a=b bash scripts/run.sh prune 0   # now")) == [("scripts/run.sh", ["prune", "0"])]
    with pytest.raises(AssertionError, match="no option --keeps"):
        check_cook(["prune", "MODEL", "--keeps", "params=0.7"])
    with pytest.raises(AssertionError, match="training.step="):
        settings_exist(["--set", "training.step=3"])


@functools.cache
def schema(name: str) -> dict[str, Any]:
    return json.loads((SCHEMAS / f"{name}.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "json")], ids=name_of)
def test_settings_in_json_pass_the_schema(page):
    for text in blocks(page, "json"):
        is_whole = text.lstrip().startswith("{")
        value = json.loads(text if is_whole else f"{{{text}}}")
        name = "l0_pruning" if value.keys() <= schema("l0_pruning")["properties"].keys() else "bmcook"
        rules = schema(name) if is_whole else {**schema(name), "required": []}
        jsonschema.Draft202012Validator(rules).validate(value)


# Examples


@pytest.mark.parametrize(
    "page, number",
    [(ROOT / "README.md", 0), (DOCS / "start" / "five_minutes.md", 0), (DOCS / "reference" / "api.md", 0)],
)
def test_python_examples_run_as_they_are_printed(page, number, tmp_path):
    (tmp_path / "example.py").write_text(blocks(page, "python")[number], encoding="utf-8")
    printed = run(sys.executable, "example.py", folder=tmp_path)
    if page.name == "README.md":
        assert (tmp_path / "small" / "config.json").is_file()
        assert float(printed.split()[-1]) < 1e-5  # rounding of fp32
    if page.name == "five_minutes.md":
        # The table of the page, which no processor changes.
        assert [line for line in printed.splitlines() if line.startswith("|")] == [
            line for line in blocks(page, "")[0].splitlines() if line.startswith("|")
        ]


def started(line: str) -> list[str]:
    """A command of the pages with the interpreter and the checkout of this test."""
    words = shlex.split(line, comments=True)
    if words[0] == "cook":
        return [sys.executable, "-m", "cook", *words[1:]]
    words[0] = sys.executable
    return [words[0], *(str(ROOT / word) if (ROOT / word).is_file() else word for word in words[1:])]


def words(text: str) -> set[str]:
    """The lines of a text without their numbers, ranges and spaces, which differ from machine to machine."""
    return {re.sub(r"[\d.,:%]+[kMe-]*|[\s–-]+", "", line) for line in text.splitlines()}


@pytest.fixture(scope="module")
def first_job(tmp_path_factory) -> Path:
    """A folder in which the commands of the first page were typed, one after the other."""
    folder = tmp_path_factory.mktemp("first")
    page = DOCS / "start" / "five_minutes.md"
    (folder / "make_tiny.py").write_text(blocks(page, "python")[1], encoding="utf-8")
    make, look = (block for block in blocks(page, "bash") if "tiny" in block or "small/model" in block)
    printed = "".join(run(*started(line), folder=folder) for line in make.replace("\\\n", " ").splitlines())
    listing = next(block for block in blocks(page, "") if block.startswith("plan"))
    assert words(listing) <= words(printed), f"{words(listing) - words(printed)}\n{printed}"
    if "eval" in COMMAND.commands:
        measured = json.loads(run(*started(look.strip()), folder=folder))
        assert measured["parameters"] < 0.72 * 1.05e6
    return folder


def test_the_first_page_leaves_what_it_says(first_job):
    for name in ("recipe/bmcook.json", "recipe/l0_pruning.json", "model/config.json", "report/report.md"):
        assert (first_job / "small" / name).is_file(), name


def test_the_steps_of_a_recipe_run_as_they_are_printed(first_job):
    """On the recipe that the first page has written: its stages are finished, so that they are only found again."""
    shutil.copytree(first_job / "small" / "recipe", first_job / "config" / "mine", dirs_exist_ok=True)
    page = DOCS / "start" / "your_model.md"
    steps = next(block for block in blocks(page, "bash") if "config/mine/bmcook.json --stage all" in block)
    lines = steps.splitlines()
    assert len(lines) == 4
    plan, trained, reshaped, reported = (run(*started(line), folder=first_job) for line in lines)
    assert plan.startswith("plan") and "already finished" in trained
    assert "equal to rounding" in reshaped and "report.md" in reported


def test_recipes_are_listed_and_copied_as_printed(tmp_path):
    page = DOCS / "start" / "your_model.md"
    block = next(block for block in blocks(page, "bash") if "recipes copy" in block)
    for line in block.strip().splitlines():
        run(*started(line), folder=tmp_path)
    assert "results/mine" in (tmp_path / "config" / "mine" / "bmcook.json").read_text(encoding="utf-8")
