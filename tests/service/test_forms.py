"""The page that submits a recipe: by keyboard in a browser, and what it shows without scripts."""

from __future__ import annotations

import json
import os
import re

import pytest

from tests.recipe.tiny_run import write_run
from tests.service.live import STAGES, serving

CHANGES = "training.steps=0\ndata.max_length=0\nnonsense"


@pytest.fixture
def mine(inputs):
    """A recipe in a folder of its own; its texts are found below the root."""
    folder = inputs / "mine"
    if not folder.exists():
        write_run(folder, STAGES, data__paths=[str(folder / "docs")])
    return folder / "bmcook.json"


def submitted(live) -> list:
    return [job for job in live.controller.list() if job.name == "mine"]


def test_a_recipe_is_checked_and_submitted_by_keyboard(live, body, mine, visit):
    page = visit(live)

    def tab_to(id: str) -> None:
        for _ in range(20):
            if page.evaluate("document.activeElement.id") == id:
                return
            page.keyboard.press("Tab")
        raise AssertionError(f"{id} cannot be reached")

    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "Submit":
            break
    page.keyboard.press("Enter")
    page.wait_for_url("**/submit")
    tab_to("recipe")
    page.keyboard.type(str(mine))
    assert page.input_value("#recipe") == str(mine)
    tab_to("set")
    page.keyboard.type(CHANGES)
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # in a field: the form is checked
    page.wait_for_selector("#mistakes")
    told = page.inner_text("#mistakes")
    assert all(part in told for part in ("training.steps", "data.max_length", "nonsense")) and not submitted(live)
    assert page.input_value("#set") == CHANGES and page.input_value("#recipe") == str(mine)
    page.fill("#set", "training.steps=9")
    page.focus("#check button")
    page.keyboard.press("Enter")
    page.wait_for_selector("#plan")
    assert "pretrain" in page.inner_text("#plan") and not submitted(live), "it has only been checked"
    assert page.evaluate("document.activeElement.id") == "submit"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is visible"
    page.keyboard.press("Enter")
    page.wait_for_url("**/jobs/*")
    (job,) = submitted(live)
    assert page.url == f"{live.url}/jobs/{job.id}" and page.inner_text("h1") == "mine"
    assert json.loads((job.folder / "config" / "bmcook.json").read_text())["training"]["steps"] == 9


def test_a_job_that_is_refused_after_its_plan_says_why(live, mine, visit):
    page = visit(live, f"/submit?recipe={mine}", allowed="429")
    page.wait_for_selector("#plan")
    page.route("**/v1/jobs", lambda route: route.fulfill(status=429, json={"error": "too many jobs", "problems": []}))
    page.click("#submit")
    page.wait_for_selector("#problem:visible")
    assert page.inner_text("#problem") == "too many jobs" and page.is_enabled("#submit")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_the_form_without_scrolling_sideways(live, mine, visit, scheme):
    page = visit(live, viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True)
    for query in ("", f"?recipe={mine}", f"?recipe={mine}&set=training.{'x' * 200}=1"):
        page.goto(f"{live.url}/submit{query}")
        assert page.evaluate("document.documentElement.scrollWidth") == 390, query


def shown(live, **query: str) -> str:
    return live.http.get("/submit", params=query).raise_for_status().text


def test_the_page_works_without_scripts_up_to_the_last_step(live, mine):
    text = shown(live)
    assert str(mine) in text and "<option>local</option>" in text.replace(" selected", "")
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", text), "the policy forbids inline code"
    text = shown(live, recipe=str(mine), set=CHANGES, gpus="3", executor="slurm", name="<b>")
    assert "mistakes" in text and "&lt;b&gt;" in text and "<b>" not in text
    for part in ("training.steps", "data.max_length", "nonsense", "executor"):
        assert part in text
    assert "gpus" in shown(live, recipe=str(mine), gpus="many")
    text = shown(live, recipe=str(mine))
    assert 'id="submit"' in text and "pretrain" in text and not submitted(live)[1:]


def test_files_of_others_are_not_read(live, mine, inputs, tmp_path):
    (tmp_path / "bmcook.json").write_text('{"secret": 1}')
    for path in (tmp_path / "bmcook.json", inputs / "mine" / ".." / ".." / "x" / "bmcook.json", "/etc/passwd", "x\0"):
        text = shown(live, recipe=str(path))
        assert "mistake" in text and "secret" not in text and 'id="submit"' not in text
    linked = inputs / "linked"
    linked.mkdir()
    os.symlink(tmp_path / "bmcook.json", linked / "l0_pruning.json")
    config = json.loads(mine.read_text())
    (linked / "bmcook.json").write_text(json.dumps(config))
    assert "outside" in shown(live, recipe=str(linked / "bmcook.json"))
    (linked / "bmcook.json").write_text(json.dumps(config | {"deepspeed": str(tmp_path / "bmcook.json")}))
    (linked / "l0_pruning.json").unlink()
    text = shown(live, recipe=str(linked / "bmcook.json"))
    assert "does not read this file" in text and "secret" not in text
    (linked / "bmcook.json").write_text("[1")
    assert "not valid JSON" in shown(live, recipe=str(linked / "bmcook.json"))


def test_a_server_without_recipes_says_so(tmp_path):
    with serving(tmp_path) as live:
        assert "no recipes" in shown(live)
