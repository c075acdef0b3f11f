"""Starts programs of this project from a process that has already imported torch, transformers and DeepSpeed.

Importing them takes about 6 seconds of processor time per process, which was half of the time of all tests. A warm
interpreter is a small program that takes the place of `sys.executable`. It sends its arguments, environment, working
directory, standard streams and namespaces to the warm process of this test process. That process forks, and the child
runs the same script, module or code as `__main__` in a session of its own. Signals are forwarded. If the small program
dies, the child is killed.

A child that has ended its threads and left its process group leaves out the teardown of the interpreter, which takes
1.7 seconds. Any other child ends as Python does, so that a test sees it if that aborts.

Programs whose settings of the environment libraries read at import are started as usual.

    COOK_COLD_STARTS=1 bash scripts/test.sh     # starts all programs as usual
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
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
import threading
import time
import types
import warnings
from functools import cache
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
IMPORTED = (
    "cook.cli",
    "cook.recipe.language_model",
    "cook.recipe.benchmarks.session",
    "cook.recipe.start",
    "torch.distributed.run",
)
LATER = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "sentencepiece.sentencepiece_model_pb2",
    "setuptools",
)
"""What training imports on its way; DeepSpeed itself must have been imported before."""
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
NAMESPACES = ("net", "uts", "mnt")
INTERPRETER = """#!{python} -IS
import json, os, signal, socket, sys
if sys.argv[1].startswith("-") and sys.argv[1] not in ("-u", "-W", "-m", "-c", "-"):  # such as -I: as usual
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
connection = socket.socket(socket.AF_UNIX)
connection.connect({socket!r})
request = json.dumps([sys.argv, dict(os.environ), os.getcwd()]).encode()
spaces = [os.open("/proc/self/ns/" + name, os.O_RDONLY) for name in {namespaces}]
socket.send_fds(connection, [len(request).to_bytes(8, "big")], [0, 1, 2, *spaces])
connection.sendall(request)
answers = connection.makefile("rb")
child = int(answers.readline())
for number in {signals}:
    signal.signal(number, lambda received, _frame: os.kill(child, received))
code = int(answers.readline())
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""
INHERITED = "inherited"
"""The folder of the interpreter whose programs take it for `sys.executable`, and of a `deepspeed` that runs on it."""


def interpreter(*, inherited: bool = False) -> str:
    """The path of a warm interpreter; the first call starts the warm process of this test process.

    Args:
        inherited: What a program starts by `sys.executable`, as launchers start ranks, is warm as well.
    """
    if os.environ.get("COOK_COLD_STARTS"):
        return sys.executable
    return str(_folder() / INHERITED / "python") if inherited else str(_folder() / "python")


def process_of(interpreter: int) -> int:
    """The process that runs the program of a warm interpreter, by the interpreter's own process; itself if not warm."""
    if os.environ.get("COOK_COLD_STARTS"):
        return interpreter
    file, deadline = _folder() / "children" / str(interpreter), time.monotonic() + 30
    while not (file.exists() and file.read_text()):  # it is written after the start: the program may be faster
        assert time.monotonic() < deadline, f"no program of {interpreter}"
        time.sleep(0.01)
    return int(file.read_text())


@cache
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cook-warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / INHERITED).mkdir()
    (folder / "children").mkdir()
    text = INTERPRETER.format(
        python=sys.executable,
        socket=str(folder / "socket"),
        namespaces=NAMESPACES,
        signals=[int(number) for number in FORWARDED],
    )
    for program in (folder / "python", folder / INHERITED / "python"):
        program.write_text(text)
        program.chmod(0o755)
    # The console script of DeepSpeed names its own interpreter.
    deepspeed = Path(sys.executable).with_name("deepspeed")
    (folder / INHERITED / "deepspeed").write_text(f'#!/bin/sh\nexec {folder}/{INHERITED}/python {deepspeed} "$@"\n')
    (folder / INHERITED / "deepspeed").chmod(0o755)
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
    _folder.process = process  # type: ignore[attr-defined]  # its pipe stays open
    return folder


class _Server:
    """Accepts requests, forks a child per request, and reports its exit code."""

    def __init__(self, path: str):
        self._children = Path(path).parent / "children"
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
        length, descriptors, _, _ = socket.recv_fds(connection, 8, 3 + len(NAMESPACES))
        text = b""
        while len(text) < int.from_bytes(length, "big"):
            text += connection.recv(1 << 20)
        child = os.fork()
        if child == 0:
            self._become(connection, descriptors)
            return json.loads(text)
        for descriptor in descriptors:
            os.close(descriptor)
        self._waiting[child] = connection
        # The first of its credentials is its process.
        asking = int.from_bytes(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)
        (self._children / str(asking)).write_text(str(child))
        connection.sendall(f"{child}\n".encode())
        self._events.register(connection, selectors.EVENT_READ, lambda _: self._gone(child))
        return None

    def _become(self, connection: socket.socket, descriptors: list[int]) -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        for name, space in zip(NAMESPACES, descriptors[3:], strict=True):
            if os.stat(space).st_ino != os.stat(f"/proc/self/ns/{name}").st_ino:
                assert ctypes.CDLL(None, use_errno=True).setns(space, 0) == 0, os.strerror(ctypes.get_errno())
            os.close(space)
        for number, stream in enumerate(descriptors[:3]):
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
    """Runs the arguments of a Python interpreter: `[-u] [-W ignore] [-m MODULE | -c CODE | - | SCRIPT] ARGUMENT…`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    own, *arguments = arguments
    if Path(own).parent.name == INHERITED:
        sys.executable = own
    tempfile.tempdir = None
    sys.path[:1] = environment["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in environment else []
    while arguments[0] in ("-u", "-W"):
        if arguments.pop(0) == "-W":
            warnings.simplefilter(arguments.pop(0))  # type: ignore[arg-type]
    if arguments[0] == "-m":
        sys.path.insert(0, folder)
        sys.argv = arguments[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    elif arguments[0] in ("-", "-c"):
        code = sys.stdin.read() if arguments[0] == "-" else arguments.pop(1)
        sys.path.insert(0, "")
        sys.argv = arguments
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")


def _exit_code() -> int:
    """The exit code for the exception that ends the program, which is reported as Python does."""
    kind, error, traceback = sys.exc_info()
    if not isinstance(error, SystemExit):
        assert kind is not None and error is not None
        sys.excepthook(kind, error, traceback)
        return 1
    if error.code is None or isinstance(error.code, int):
        return error.code or 0
    print(error.code, file=sys.stderr)
    return 1


def _leave(code: int) -> None:
    """Ends the process at once if it has left nothing behind; else Python ends it."""
    import torch.distributed

    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    has_group = torch.distributed.is_available() and torch.distributed.is_initialized()
    # The thread that watches for the end of the launcher only sleeps.
    left = {thread.name for thread in threading.enumerate()} - {threading.main_thread().name, "launcher"}
    if not left and not has_group:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code & 0xFF)
    gc.unfreeze()
    sys.exit(code)


def _serve(path: str) -> None:
    sys.path[0] = str(REPOSITORY)
    from cook.base.environment import quiet_torchao

    quiet_torchao()
    for name in IMPORTED:
        importlib.import_module(name)
    from cook.training.deepspeed_checks import import_deepspeed

    import_deepspeed()
    for name in LATER:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # children do not look through what is imported, and share its memory
    server = _Server(path)
    print("ready", flush=True)
    request = server.next_request()
    del server
    try:
        _execute(*request)
        code = 0
    except (SystemExit, Exception):
        code = _exit_code()
    _leave(code)


if __name__ == "__main__":
    _serve(sys.argv[1])
