import io
import os
import pty
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from cook.report.console import Progress, print_plan, print_table

ROOT = str(Path(__file__).parents[2])


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_pipe_gets_one_line_every_so_often_and_always_the_last():
    clock, stream, asked = Clock(), io.StringIO(), []
    with Progress("att_mask", 200, 100, final_target=0.75, stream=stream, clock=clock) as progress:
        for step in range(101, 201):
            clock.now += 0.4
            sparsity = partial(lambda step: asked.append(step) or (0.004 * step, min(0.75, 0.005 * step)), step)
            progress.update(step, loss=4.2131, tokens_per_second=12345.0, sparsity=sparsity)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "att_mask  101/200  loss 4.213  12.3k tok/s  sparsity 0.404 → 0.505 (target 0.750)  ETA 0:40"
    assert lines[1].startswith("att_mask  114/200  ")  # 13 * 0.4 s is the first multiple beyond 5 s
    assert lines[-1] == "att_mask  200/200  loss 4.213  12.3k tok/s  sparsity 0.800 → 0.750 (target 0.750)  ETA 0:00"
    assert len(lines) == len(asked) == 9  # what is not shown is not computed


def test_only_given_numbers_are_shown_and_counts_are_aligned():
    stream = io.StringIO()
    progress = Progress("pretrain", 1000, stream=stream, clock=Clock(), every=0)
    progress.update(0)
    progress.update(5, loss=float("nan"), sparsity=lambda: (0.1, 0.2))
    assert stream.getvalue().splitlines() == [
        "pretrain     0/1000  ETA -:--",
        "pretrain     5/1000  loss nan  sparsity 0.100 → 0.200  ETA 0:00",
    ]


def test_the_time_to_go_counts_this_runs_steps_alone():
    clock, stream = Clock(), io.StringIO()
    progress = Progress("s", 1000, 900, stream=stream, clock=clock)
    clock.now += 50
    progress.update(910)  # 5 s a step, 90 to go
    assert "ETA 7:30" in stream.getvalue()


def test_other_ranks_are_silent(capsys):
    with Progress("s", 10, enabled=False) as progress:
        progress.update(10, loss=1.0)
        progress.note("hello")
    assert capsys.readouterr().out == ""


def test_notes_and_standard_output(capsys):
    with Progress("s", 10) as progress:
        progress.note("saved [bold]x[/bold]")
    assert capsys.readouterr().out == "saved [bold]x[/bold]\n"


def test_a_stream_without_the_arrow_gets_a_question_mark():
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Progress("s", 10, stream=stream, clock=Clock()).update(10, sparsity=lambda: (0.5, 0.5))
    stream.seek(0)
    assert stream.read() == "s  10/10  sparsity 0.500 ? 0.500  ETA 0:00\n"


def test_a_table_in_a_pipe_is_plain_and_whole(capsys):
    print_table([{"stage": "x" * 150, "steps": 3}, {"stage": "层 [red]", "note": "a"}], title="all [x]")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "all [x]",
        "stage".ljust(150) + "  steps  note",
        "-" * 150 + "  -----  ----",
        "x" * 150 + "      3",
        "层 [red]" + " " * (150 - 8) + "  " + " " * 5 + "  " + "   a",
    ]


def test_an_empty_table_prints_its_title_only(capsys):
    print_table([], title="nothing")
    assert capsys.readouterr().out == "nothing\n"


def test_a_plan_is_facts_and_stages(capsys):
    print_plan({"model": "tiny", "parameters": 12}, [{"stage": "pretrain", "steps": 3}])
    assert capsys.readouterr().out.splitlines() == [
        "plan",
        "  model:      tiny",
        "  parameters: 12",
        "stage     steps",
        "--------  -----",
        "pretrain      3",
    ]


DEMO = """
from cook.report.console import Progress, print_table
with Progress("att_mask", 200, 100, final_target=0.75) as progress:
    progress.update(120, loss=4.213, tokens_per_second=12345, sparsity=lambda: (0.412, 0.45))
    progress.note("saved [bold]it[/bold]")
    progress.update(200, loss=4.213, tokens_per_second=12345, sparsity=lambda: (0.412, 0.45))
print_table([{"name": "[red]left", "n": 1}])
print_table([{"name": "w" * 200, "n": 1}])
"""


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_gets_a_bar_and_loses_nothing_when_narrow(columns):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": str(columns), "PYTHONUTF8": "1", "PYTHONPATH": ROOT}
    process = subprocess.Popen([sys.executable, "-c", DEMO], stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while block := os.read(ours, 65536):
            shown += block
    except OSError:  # Linux's way to say that the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0
    text = shown.decode()
    assert "\x1b[?25l" in text and "\x1b[?25h" in text  # the cursor is hidden and given back
    assert "━" in text and "200/200" in text and "ETA 0:00" in text and "(target 0.750)" in text
    assert "saved [bold]it[/bold]" in text and "[red]left" in text and "w" * 200 in text and "…" not in text
