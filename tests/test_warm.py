"""A program on a warm interpreter ends, prints and is stopped as on Python itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.warm import interpreter, process_of

ENDS = {
    "nothing": "",
    "a code": "import sys; sys.exit(75)",
    "a large code": "import sys; sys.exit(257)",
    "a text": "import sys; sys.exit('refused')",
    "an error": "int('x')",
    "at exit": "import atexit, sys; atexit.register(print, 'last'); print('first'); sys.exit(3)",
    "a thread": "import threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('late'))).start()",
    "a daemon": "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    "arguments": "import sys; print(sys.argv)",
    "its name": "print(__name__)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_program_ends_as_on_python(end):
    cold, warm = (
        subprocess.run([python, "-c", ENDS[end], "one", "two"], capture_output=True, text=True, timeout=60)
        for python in (sys.executable, interpreter())
    )
    assert (warm.returncode, warm.stdout) == (cold.returncode, cold.stdout)
    assert warm.stderr.splitlines()[-1:] == cold.stderr.splitlines()[-1:]


def test_a_daemon_inside_a_library_is_there_while_python_ends():
    """The end of the interpreter, at which such threads may abort a program, is left out only where there are none."""
    code = "import os, threading, time\nclass Held:\n    def __del__(self, write=os.write): write(1, b'freed')\n"
    code += "held = Held()\n"
    daemon = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"
    printed = [
        subprocess.run([interpreter(), "-c", text], capture_output=True, text=True, timeout=60).stdout
        for text in (code, code + daemon)
    ]
    assert printed == ["", "freed"]


def test_a_program_reads_its_code_and_what_it_starts_is_warm_only_if_asked_for():
    for inherited in (False, True):
        program = interpreter(inherited=inherited)
        done = subprocess.run([program, "-"], input="import sys; print(sys.executable)", capture_output=True, text=True)
        assert done.stdout.strip() == (program if inherited else sys.executable)


def test_options_that_change_the_interpreter_start_it_as_usual():
    done = subprocess.run(
        [interpreter(inherited=True), "-I", "-c", "import sys; print(sys.flags.isolated)"], capture_output=True
    )
    assert done.stdout == b"1\n", done


def test_signals_reach_the_program_and_it_ends_with_its_interpreter():
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(9))\n"
    code += "print(1, flush=True); time.sleep(60)"
    for number, ended in ((signal.SIGTERM, 9), (signal.SIGKILL, -9)):
        with subprocess.Popen([interpreter(), "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"1\n"
            child = process_of(process.pid)
            assert os.path.exists(f"/proc/{child}")
            process.send_signal(number)
            assert process.wait(30) == ended and process.stdout.read() == b""  # the pipe ends with the child
