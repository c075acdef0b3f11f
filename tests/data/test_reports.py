import json

import cook.data.reports as progress_module
from cook.data.reports import LeftOut, Progress


def test_reasons_are_counted_and_the_first_names_are_kept():
    found = LeftOut()
    assert not found and found.sentences("x") == [] and found.count("files") == 0
    found.add("files", 0, "none")
    assert not found
    for name in "abcdefg":
        found.add("files", 1, name)
    found.add("tokens", 12345)
    assert found.sentences("data") == ["data: left out: files: 7 (a, b, c, d, e, …)", "data: left out: tokens: 12,345"]
    assert str(found) == "files: 7 (a, b, c, d, e, …); tokens: 12,345" and found.count("files") == 7


def test_a_record_is_json_and_adds_up():
    found = LeftOut()
    found.add("files", 2, "a", "b")
    record = json.loads(json.dumps(found.record()))
    again = LeftOut(record)
    again.include(record)
    again.add("files", 1, "c")
    assert again.record() == {"files": {"count": 5, "named": ["a", "b", "a", "b", "c"]}}
    assert found.record() == {"files": {"count": 2, "named": ["a", "b"]}}


def run(monkeypatch, seconds_a_step, steps, total):
    clock = iter(seconds_a_step * tick for tick in range(10_000))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with Progress("tokenising", total) as progress:
        for _ in range(steps):
            progress.advance(1e6)


def test_without_a_terminal_a_line_every_few_seconds(monkeypatch, capsys):
    run(monkeypatch, 1.0, 12, 12e6)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and 1 <= len(lines) <= 4
    assert lines[0].startswith("tokenising: ") and "of 12.0 MB" in lines[0] and "s left" in lines[0]


def test_quick_work_says_nothing(monkeypatch, capsys):
    run(monkeypatch, 0.01, 12, 12e6)
    assert capsys.readouterr().err == ""


def test_an_unknown_total_shows_the_time(monkeypatch, capsys):
    run(monkeypatch, 6.0, 1, 0)
    assert capsys.readouterr().err == "tokenising: 1.0 MB, 12 s\n"


def test_on_a_terminal_the_line_is_redrawn_and_cleared(monkeypatch, capsys):
    monkeypatch.setattr(progress_module.sys.stderr, "isatty", lambda: True, raising=False)
    run(monkeypatch, 1.0, 3, 3e6)
    err = capsys.readouterr().err
    assert "\n" not in err and err.count("\r\x1b[K") >= 4 and err.endswith("\r\x1b[K")
