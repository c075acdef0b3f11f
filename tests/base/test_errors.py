from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap

import pytest

from cook.base.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError, UserErrors


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
