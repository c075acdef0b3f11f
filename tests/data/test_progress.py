import cook.data.progress as progress_module
from cook.data.progress import Progress


def run(monkeypatch, seconds_a_step, steps, total):
    clock = iter(seconds_a_step * tick for tick in range(10_000))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    with Progress("tokenising", total, unit="MB", scale=1e6) as progress:
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
