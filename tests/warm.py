"""Starts programs of this project from a process that has already imported torch, transformers and DeepSpeed.

Importing them takes about 6 seconds of processor time per process, which was half of the time of all tests. A warm
interpreter is a small program that takes the place of `sys.executable`. It sends its arguments, environment, working
directory and standard streams to the warm process of this test process. That process forks, and the child runs the same
script or module as `__main__` in a session of its own. Signals are forwarded. If the small program dies, the child is
killed.

Programs that a test stops or kills, and those with other settings of their environment, are started as usual.

    COOK_COLD_STARTS=1 bash scripts/test.sh     # starts all programs as usual
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
SOCKET = "COOK_TEST_WARM"
"""Environment variable: the path of the warm process's socket."""
IMPORTED = ("cook.cli", "cook.recipe.language_model", "cook.recipe.benchmarks.session", "torch.distributed.run")
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
INTERPRETER = """#!{python} -IS
import json, os, signal, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect(os.environ["{variable}"])
request = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2])
connection.sendall(request)
answers = connection.makefile("rb")
child = int(answers.readline())
for number in {signals}:
    signal.signal(number, lambda received, _frame: os.kill(child, received))
code = int(answers.readline())
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@cache
def interpreter() -> str:
    """The path of a warm interpreter; the first call starts the warm process of this test process."""
    if os.environ.get("COOK_COLD_STARTS"):
        return sys.executable
    folder = Path(tempfile.mkdtemp(prefix="cook-warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    program = folder / "python"
    text = INTERPRETER.format(python=sys.executable, variable=SOCKET, signals=[int(number) for number in FORWARDED])
    program.write_text(text)
    program.chmod(0o755)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    # It ends when this process does, which holds the other end of its standard input.
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder / "socket")],
        cwd=REPOSITORY,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    interpreter.process = process  # type: ignore[attr-defined]  # its pipe stays open
    os.environ[SOCKET] = str(folder / "socket")
    return str(program)


class _Server:
    """Accepts requests, forks a child per request, and reports its exit code."""

    def __init__(self, path: str):
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(path)
        self._listening.listen(64)
        self._waiting: dict[int, socket.socket] = {}
        self._events = selectors.DefaultSelector()
        self._events.register(self._listening, selectors.EVENT_READ, self._accept)
        self._events.register(0, selectors.EVENT_READ, self._end)
        wake, self._wake = socket.socketpair()
        wake.setblocking(False)
        self._wake.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._events.register(wake, selectors.EVENT_READ, self._reap)

    def next_request(self) -> tuple[list[str], dict[str, str], str]:
        """Returns only in a child, with its arguments, environment and working directory."""
        while True:
            for key, _ in self._events.select():
                request = key.data(key.fileobj)
                if request is not None:
                    return request  # type: ignore[no-any-return]

    def _accept(self, listening: socket.socket) -> Any:
        connection, _ = listening.accept()
        length, streams, _, _ = socket.recv_fds(connection, 8, 3)
        text = b""
        while len(text) < int.from_bytes(length, "big"):
            text += connection.recv(1 << 20)
        child = os.fork()
        if child == 0:
            self._become(connection, streams)
            return json.loads(text)
        for stream in streams:
            os.close(stream)
        self._waiting[child] = connection
        connection.sendall(f"{child}\n".encode())
        self._events.register(connection, selectors.EVENT_READ, lambda _: self._gone(child))
        return None

    def _become(self, connection: socket.socket, streams: list[int]) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        self._events.close()
        for other in (connection, self._listening, self._wake, *self._waiting.values()):
            other.close()

    def _reap(self, wake: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            wake.recv(4096)
        while self._waiting:
            child, status = os.waitpid(-1, os.WNOHANG)
            if child == 0:
                return
            self._kill(child)  # what it left behind
            connection = self._waiting.pop(child)
            if connection in self._events.get_map():
                self._events.unregister(connection)
                connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
            connection.close()

    def _gone(self, child: int) -> None:
        self._events.unregister(self._waiting[child])
        self._kill(child)

    def _end(self, _stream: int) -> None:
        for child in self._waiting:
            self._kill(child)
        os._exit(0)

    @staticmethod
    def _kill(child: int) -> None:
        for kill in (os.killpg, os.kill):  # a child that was just forked has no group yet
            with contextlib.suppress(ProcessLookupError):
                kill(child, signal.SIGKILL)


def _execute(arguments: list[str], environment: dict[str, str], folder: str) -> None:
    """Runs the arguments of a Python interpreter: `[-u] [-W ignore] [-m MODULE | SCRIPT] ARGUMENT…`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:1] = environment["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in environment else []
    while arguments[0] in ("-u", "-W"):
        if arguments.pop(0) == "-W":
            warnings.simplefilter(arguments.pop(0))  # type: ignore[arg-type]
    if arguments[0] == "-m":
        sys.path.insert(0, folder)
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _serve(path: str) -> None:
    sys.path[0] = str(REPOSITORY)
    for name in IMPORTED:
        importlib.import_module(name)
    from cook.training.deepspeed_checks import import_deepspeed

    import_deepspeed()
    server = _Server(path)
    print("ready", flush=True)
    request = server.next_request()
    del server
    _execute(*request)


if __name__ == "__main__":
    _serve(sys.argv[1])
