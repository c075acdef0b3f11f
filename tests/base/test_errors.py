from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap

import pytest

from cook.base.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, UserErrors, run_entry, with_home


def test_an_error_says_what_wanted_got_and_remedy():
    error = UserError("it is broken", wanted=[1], got=0, remedy="mend it")
    assert str(error) == "it is broken\n  wanted: [1]\n  got:    0\n  remedy: mend it"
    assert str(UserError("alone")) == "alone"


def test_several_errors_are_numbered_and_counted():
    both = UserErrors("bad config", [UserError("a", got=1), UserError("b")])
    assert str(both) == "bad config: 2 errors\n1. a\n  got:    1\n2. b"
    assert str(UserErrors("bad config", [UserError("a")])).startswith("bad config: 1 error\n")


@pytest.mark.parametrize(
    "error", [UserError("a", wanted=1, remedy="b"), UserErrors("t", [UserError("a"), UserError("b")])]
)
def test_errors_travel_between_processes(error):
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error) and str(back) == str(error)
    assert getattr(back, "remedy", None) == error.remedy


@pytest.mark.parametrize(
    ("body", "code", "words"),
    [
        ("raise UserError('no mask', remedy='make one')", EXIT_USER_ERROR, ["error: no mask", "remedy: make one"]),
        ("raise Interrupted('saved step 3')", EXIT_INTERRUPTED, ["stopped: saved step 3"]),
        ("raise KeyError('ours')", EXIT_FAILED, ["Traceback", "KeyError"]),
        ("return None", 0, []),
        ("return 1", EXIT_FAILED, []),
    ],
)
def test_exit_codes(body, code, words):
    source = f"""
        from cook.base.errors import *
        def main():
            {body}
        run_entry(main)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True)
    assert done.returncode == code and all(word in done.stderr for word in words)
    assert ("Traceback" in done.stderr) == (words[:1] == ["Traceback"])
    assert (EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_FAILED) == (2, 75, 1)  # documented


@pytest.mark.parametrize(
    ("body", "code"), [("return None", 0), ("sys.exit()", 0), ("sys.exit(0)", 0), ("sys.exit(2)", 2)]
)
def test_an_output_on_a_full_disk_does_not_change_the_exit_code(body, code):
    source = f"""
        import sys
        from cook.base.errors import run_entry
        def main():
            print("kept in a buffer")
            {body}
        run_entry(main)
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], stdout=full, env=environment)
    assert done.returncode == code


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_request_that_arrives_while_a_stopped_run_ends_does_not_change_the_exit_code(number):
    source = f"""
        import atexit, os, signal
        from cook.base.errors import Interrupted, run_entry
        atexit.register(lambda: os.kill(os.getpid(), signal.{number}))
        def main():
            raise Interrupted("at step 5")
        run_entry(main)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(source)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (EXIT_INTERRUPTED, "stopped: at step 5\n")


def test_a_tilde_is_resolved_wherever_a_path_starts_in_an_argument(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    resolved = {
        "~": "/h",
        "~/a~b": "/h/a~b",
        "--output=~/x": "--output=/h/x",
        "model.path=~/m": "model.path=/h/m",
        "a=~/m,coarse=~/c.pt": "a=/h/m,coarse=/h/c.pt",
        "./~/x": "./~/x",
        "a/~/b~": "a/~/b~",
        "~nobody-of-this-name/x": "~nobody-of-this-name/x",
        "--seed": "--seed",
    }
    assert {argument: with_home(argument) for argument in resolved} == resolved


def test_every_command_resolves_its_arguments(monkeypatch):
    monkeypatch.setenv("HOME", "/h")
    monkeypatch.setattr("sys.argv", ["cook", "--model=~/m"])
    seen = []
    with pytest.raises(SystemExit):
        run_entry(lambda: seen.extend(sys.argv))
    assert seen == ["cook", "--model=/h/m"]
