"""The pages in a real browser, on a real server. The files of a run are written here as a trainer writes them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from cook.report.events import EventLog
from cook.report.gate_log import GateGroup, GateLog
from cook.service import pages
from cook.service.jobs import Job
from tests.service.live import Live, serving
from tests.service.parts import local, spec, wait_state

LAYERS, HEADS, DIMS, STEPS = 3, 4, 40, 50
HOSTILE = "</script><script>document.title='taken'</script><b>bold</b>"


def stage(name: str, learns: list[str]) -> dict[str, Any]:
    facts = {"stage": name, "learns": learns, "steps": STEPS, "tokens_at_most": STEPS * 100}
    return facts | {"parameters_before": 1000, "parameters_after": 600, "state_bytes_per_rank": 16000}


PLAN = {"data": "text (docs)", "stages": [stage("pretrain", []), stage("joint_mask", ["heads", "dims"])]}


class Trainer:
    """Writes what a trainer writes for one job."""

    def __init__(self, job: Job):
        self.job = job
        self.out = job.folder / "run" / "out"
        kinds = [("heads", "att", HEADS), ("dimff", "ffn", DIMS)]
        groups = [
            GateGroup(name=f"layers.{layer}.{kind}", layer=layer, site=site, kind=kind, units=units)
            for kind, site, units in kinds
            for layer in range(LAYERS)
        ]
        self.logs = {name: EventLog(self.out / name, tensorboard=False) for name in ("pretrain", "joint_mask")}
        self.gates = GateLog(self.out / "joint_mask", groups)

    def steps(self, stage: str, *steps: int) -> None:
        for step in steps:
            record: dict[str, Any] = {
                "step": step,
                "loss": 5 - step / 20,
                "tokens": 100 * step,
                "tokens_per_second": 50.0,
            }
            if stage == "joint_mask":
                record |= {"expected_sparsity": {"a": step / 100}, "target_sparsity": {"a": step / 100}}
            self.logs[stage].write(record)
        self.logs[stage].close()

    def open_gates(self, step: int, share: float) -> None:
        if step == 1:
            self.gates.rewind(-1)
        self.gates.write(step, torch.linspace(0, 1, LAYERS * (HEADS + DIMS)).ge(1 - share).float())

    def say(self, text: str) -> None:
        with open(self.job.attempt_folder / "output.log", "a", encoding="utf-8") as file:
            file.write(text)


def submit(live: Live, name: str = "a job", **config: Any) -> Job:
    made = live.controller.submit(spec(name=name, owner="admin", plan=PLAN), {"seconds": 300, **config}, {})
    return wait_state(live.controller, made, "running") if config.get("seconds", 300) > 1 else made


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def live(home: Path) -> Iterator[Live]:
    with serving(home, executor=local(slots=8)) as running:
        yield running
        end_all(running)


def end_all(live: Live) -> None:
    for job in live.controller.list(state=["queued", "starting", "running", "stopping"]):
        live.controller.stop(job.id, now=True)
    for job in live.controller.list():
        wait_state(live.controller, job, "succeeded", "stopped", "failed")


def points(page: Any, number: int, chart: str = "loss-chart") -> None:
    page.wait_for_selector(f'#{chart}[data-points="{number}"]')


def until(page: Any, condition: str) -> None:
    """Waits for an expression; the page's policy forbids Playwright's own way."""
    for _ in range(300):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never true: {condition}")


def state(page: Any, name: str) -> None:
    page.wait_for_selector(f'#state[data-state="{name}"]')


def grid(page: Any) -> int:
    return int(page.get_attribute("#structure", "data-sum"))


def test_the_curve_moves_the_grid_changes_and_a_reload_shows_the_same(live, visit):
    trainer = Trainer(submit(live, "first"))
    page = visit(live, f"/jobs/{trainer.job.id}")
    state(page, "running")
    assert page.is_visible("#structure-empty") and not page.is_visible("#structure")
    trainer.steps("pretrain", *range(5, 51, 5))
    points(page, 10)
    trainer.steps("joint_mask", 1, 5)
    trainer.open_gates(1, 1.0)
    points(page, 2)  # the page follows the newest stage
    page.wait_for_selector("#structure:visible")
    everything = grid(page)
    trainer.open_gates(5, 0.5)
    until(page, f"Number(document.getElementById('structure').dataset.sum) < {everything}")
    assert f"{LAYERS} layers" in page.get_attribute("#structure", "aria-label")
    page.click("summary")
    kept = page.inner_text("#structure-table")
    assert f"{DIMS} of {DIMS}" in kept and f"0 of {HEADS}" in kept
    trainer.steps("joint_mask", 10)
    with trainer.logs["joint_mask"] as log:
        log.write({"step": 10, "held_out_loss": 4.4})
    trainer.say("a line\nprogress 1\rprogress 2\r\nund ä\n")
    points(page, 3)
    until(page, "document.getElementById('log').textContent.includes('ä')")
    assert page.inner_text("#log").endswith("\na line\nprogress 2\nund ä\n")
    until(page, "document.getElementById('loss-chart').ariaLabel.includes('Held out 4.4')")
    assert page.inner_text("#n-loss") == "4.5000" and page.inner_text("#n-sparsity") == "10.0%"
    assert page.inner_text("#n-eta") == "1 min 20 s", "40 steps of 100 tokens at 50 tokens per second"

    shown = [page.inner_text("#log"), grid(page), page.inner_text(".numbers"), page.inner_text("#stages")]
    page.reload()
    points(page, 3)
    page.wait_for_selector("#structure:visible")
    until(page, "document.getElementById('log').textContent.includes('ä')")
    assert [page.inner_text("#log"), grid(page), page.inner_text(".numbers"), page.inner_text("#stages")] == shown

    page.click('[data-stage="pretrain"] button')
    points(page, 10)
    page.reload()
    points(page, 10)  # the choice of a stage survives, too


def test_a_resumed_run_takes_back_what_it_had_not_saved(live, visit):
    trainer = Trainer(submit(live, "rewound"))
    trainer.steps("joint_mask", *range(1, 9))
    for step in (1, 3, 5):
        trainer.open_gates(step, 1 - step / 10)
    page = visit(live, f"/jobs/{trainer.job.id}")
    points(page, 8)
    page.wait_for_selector("#structure:visible")
    closed = grid(page)
    trainer.logs["joint_mask"].rewind(3)
    trainer.gates.rewind(3)
    points(page, 3)
    until(page, f"Number(document.getElementById('structure').dataset.sum) > {closed}")
    trainer.steps("joint_mask", 4)
    points(page, 4)
    assert page.get_attribute("#loss-chart", "data-last") == "4"
    page.focus("#replay")
    page.keyboard.press("Home")
    until(page, "document.getElementById('structure-when').textContent.includes('step 1')")
    page.keyboard.press("End")
    until(page, "document.getElementById('structure-when').textContent.includes('step 3')")


def test_a_stop_by_keyboard_in_one_browser_is_seen_in_another(live, visit):
    job = submit(live, "stopped by hand")
    one, other = visit(live, f"/jobs/{job.id}"), visit(live, f"/jobs/{job.id}")
    state(one, "running")
    state(other, "running")
    for _ in range(12):
        one.keyboard.press("Tab")
        if one.evaluate("document.activeElement.id") == "stop":
            break
    assert one.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", "the focus is visible"
    one.keyboard.press("Enter")
    state(one, "stopped")
    state(other, "stopped")
    assert one.evaluate("document.activeElement.id") == "resume", "the focus is not lost with the button"
    one.keyboard.press("Enter")
    state(other, "running")
    until(other, "document.getElementById('f-attempt').textContent === '2'")
    assert other.get_attribute("#status", "aria-live") == "polite"


def test_a_stop_without_saving_is_confirmed_and_a_refusal_is_shown(live, visit):
    job = submit(live, "deaf", ignores_term=True)
    page = visit(live, f"/jobs/{job.id}", allowed="409")
    page.click("#stop")
    state(page, "stopping")
    page.click("#stop-now")
    page.keyboard.press("Escape")
    page.wait_for_selector("#confirm", state="hidden")
    assert live.controller.get(job.id).state == "stopping"
    page.click("#stop-now")
    page.click("#confirm button[value=yes]")
    state(page, "stopped")
    page.route("**/resume", lambda route: route.fulfill(status=409, json={"error": "job x has ended", "problems": []}))
    page.click("#resume")
    page.wait_for_selector("#problem:visible")
    assert page.inner_text("#problem") == "job x has ended"


def test_a_page_survives_a_restart_of_the_server(tmp_path, visit):
    home = tmp_path / "home"
    with serving(home, executor=local()) as live:
        trainer, port = Trainer(submit(live, "long")), live.port
        trainer.steps("pretrain", 1, 2, 3)
        trainer.say("before\n")
        page = visit(live, f"/jobs/{trainer.job.id}", allowed="ERR_|Failed to load")
        points(page, 3)
        until(page, "document.getElementById('log').textContent.includes('before')")
    page.wait_for_selector('#live[data-live="lost"]')
    trainer.steps("pretrain", 4)
    trainer.say("after\n")
    with serving(home, executor=local(), port=port) as live:
        page.wait_for_selector('#live[data-live="live"]')
        points(page, 4)
        until(page, "document.getElementById('log').textContent.includes('after')")
        printed = page.inner_text("#log")
        assert printed.endswith("\nbefore\nafter\n"), "nothing is missing"
        assert printed.count("before") == 1, "nothing is repeated"
        state(page, "running")
        end_all(live)
        state(page, "stopped")


def test_the_list_follows_the_jobs(live, visit):
    page = visit(live)
    page.wait_for_selector('#live[data-live="live"]')
    job = submit(live, HOSTILE, seconds=0.01, code=1)
    page.wait_for_selector(f'tr[data-id="{job.id}"] [data-state="failed"]')
    row = page.locator("#jobs tbody tr").first
    assert HOSTILE in row.inner_text() and "the stand-in ended with 1" in row.inner_text()
    page.reload()
    assert HOSTILE in page.locator("#jobs tbody tr").first.inner_text()
    page.select_option("#state", "failed")
    page.wait_for_url("**/?state=failed")
    states = page.locator("#jobs .state").all_inner_texts()
    assert states and set(states) == {"failed"}
    page.goto(f"{live.url}/jobs/{job.id}")
    state(page, "failed")
    assert page.inner_text("h1") == HOSTILE and page.title() == f"{HOSTILE} · cook"
    assert not page.is_visible("#stop") and page.is_visible("#resume")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_without_scrolling_sideways(live, visit, scheme):
    trainer = Trainer(submit(live, "x" * 200, seconds=0.01))
    wait_state(live.controller, trainer.job, "succeeded")
    trainer.steps("joint_mask", 1, 2)
    trainer.open_gates(1, 0.5)
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme, "has_touch": True}
    page = visit(live, allowed="404", **phone)
    for path in ("/", f"/jobs/{trainer.job.id}", "/login", "/jobs/none"):
        answer = page.goto(f"{live.url}{path}")
        if "jobs/" in path and answer.status == 200:
            points(page, 2)
            page.wait_for_selector("#structure:visible")
        assert page.evaluate("document.documentElement.scrollWidth") == 390, path
    back = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 150) == (scheme == "dark")


def test_a_browser_logs_in_with_the_token_and_out_again(live, browser):
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{live.url}/")
    assert page.url == f"{live.url}/login"
    page.keyboard.type("x" * 43)
    page.keyboard.press("Enter")
    page.wait_for_selector("#problem:visible")
    assert "not known" in page.inner_text("#problem")
    page.keyboard.type(live.token)  # the wrong one is selected
    page.keyboard.press("Enter")
    page.wait_for_url(f"{live.url}/")
    page.click("#logout")
    page.wait_for_url(f"{live.url}/login")
    page.goto(f"{live.url}/")
    assert page.url == f"{live.url}/login"
    context.close()


def test_the_pages_are_complete_without_scripts_and_have_landmarks(live):
    job = submit(live, HOSTILE, seconds=0.01)
    wait_state(live.controller, job, "succeeded")
    listed, one = live.http.get("/").text, live.http.get(f"/jobs/{job.id}").text
    for text in (listed, one):
        assert "&lt;b&gt;bold&lt;/b&gt;" in text and HOSTILE not in text
        assert '<html lang="en">' in text and text.count("<main") == text.count("<h1") == text.count("<header") == 1
        assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=", text), "the policy forbids inline code"
        assert not re.search(r'(?:src|href)="(?:https?:)?//', text), "the pages work offline"
    assert job.id in listed and "succeeded" in listed
    assert "joint mask" in one and "heads, dims" in one and "text (docs)" in one
    missing = live.http.get("/jobs/aaaaaaaaaaaa")
    assert missing.status_code == 404 and "No such job" in missing.text
    assert live.http.get("/?state=nonsense").status_code == 200


def test_files_of_the_page_need_no_token_and_are_checked_for_changes(live):
    with httpx.Client(base_url=live.url, trust_env=False) as stranger:
        answer = stranger.get("/static/job.js")
        assert answer.status_code == 200 and answer.headers["cache-control"] == "no-cache"
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        again = stranger.get("/static/job.js", headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304
        for path in ("/static/../pages.py", "/static/%2e%2e/templates/base.html", "/static/"):
            assert stranger.get(path).status_code in (303, 404), path
        assert stranger.get(f"/jobs/{'a' * 12}", follow_redirects=False).status_code == 303


def test_scripts_are_small_and_the_wheel_has_all_files():
    import tomllib

    files = [path for path in pages.PAGE.rglob("*") if path.is_file()]
    assert len(files) > 12
    own = [path for path in files if path.suffix == ".js" and "uplot" not in path.parts]
    assert own and all(len(path.read_text().splitlines()) < 320 for path in own)
    project = Path(__file__).parents[2] / "pyproject.toml"
    patterns = tomllib.loads(project.read_text())["tool"]["setuptools"]["package-data"]["cook.service"]
    for path in files:
        name = path.relative_to(pages.PAGE.parent).as_posix()
        assert any(fnmatch(name, pattern.replace("**/*", "*")) for pattern in patterns), name
