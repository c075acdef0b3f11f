"""Real ranks that are forked: processes that run `cook/train.py`, from a parent that has imported everything.

Importing torch and DeepSpeed takes seconds, a fork milliseconds. It is sound because the parent has a single thread and
has never computed anything: each child joins its own process group, opens its own files and ends with its own code.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cook.base.errors import run_entry
from cook.train import main as train_main

ROOT = Path(__file__).resolve().parents[2]
WORLD = 2


def warm_up() -> None:
    """Imports what a run imports."""
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  (most of a start: it imports torch's compiler)
    import setuptools  # noqa: F401

    import cook.base.watchdog  # noqa: F401
    import cook.recipe.language_model  # noqa: F401

    assert len(deepspeed.ops.__compatible_ops__)  # looked up once, with a compiler's help


@dataclass(kw_only=True)
class Ended:
    """How a run ended."""

    codes: list[int]
    """Exit code of each rank; a signal's number negated."""
    out: str
    """What all ranks printed, standard error included."""
    seconds: float

    def __str__(self) -> str:
        return f"exit codes {self.codes} after {self.seconds:.1f} s\n{self.out[-4000:]}"


class Ranks:
    """A run of `cook/train.py` with some options, on forked ranks; a context manager that leaves none behind.

    Args:
        folder: The working directory.
        options: Of the command line.
        world: How many ranks.
        environment: Variables for every rank, or for one rank by its number.
        before: Called in each child with its rank, before anything else.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        world: int = WORLD,
        environment: dict[str, str] | None = None,
        before: Callable[[int], None] | None = None,
    ):
        self.folder, self.options, self.world = folder, options, world
        self.environment, self.before = environment or {}, before
        self.output = folder.parent / f"{folder.name}.out"
        self.pids: list[int] = []
        self.codes: dict[int, int] = {}

    def __enter__(self) -> Ranks:
        self.output.write_text("")
        self.began = time.monotonic()
        port = free_port()
        threads = len(os.listdir("/proc/self/task"))
        assert threads == 1, f"{threads} threads: a fork would not be sound"
        for rank in range(self.world):
            pid = os.fork()
            if not pid:
                self._be(rank, port)
            self.pids.append(pid)
            os.setpgid(pid, self.pids[0])
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def _be(self, rank: int, port: int) -> None:
        code = 70
        try:
            os.setpgid(0, self.pids[0] if self.pids else 0)
            out = os.open(self.output, os.O_WRONLY | os.O_APPEND)
            for handle in (1, 2):
                os.dup2(out, handle)
            os.chdir(self.folder)
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(self.world),
                LOCAL_WORLD_SIZE=str(self.world),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
            os.environ.update(self.environment)
            if self.before:
                self.before(rank)
            sys.argv = ["cook/train.py", "--config", "bmcook.json", *self.options]
            run_entry(train_main)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self, rank: int | None = None, number: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to one rank, or to the whole process group; a killed group is waited for."""
        left = [pid for index, pid in enumerate(self.pids) if pid not in self.codes and rank in (None, index)]
        for pid in left:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                pass
        if rank is None and number == signal.SIGKILL:
            for pid in left:
                self.codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def poll(self) -> bool:
        """Whether a rank is still at work."""
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) < len(self.pids)

    def until(self, happened: Callable[[], bool], seconds: float = 60.0) -> bool:
        """Waits until something has happened, at most until the run ends or time is up; says whether it has."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if happened():
                return True
            if not self.poll():
                return happened()
            time.sleep(0.001)
        return False

    def wait(self, seconds: float = 90.0) -> Ended:
        """Waits for the end; what has not ended in time is killed, and its code is that of SIGKILL."""
        deadline = time.monotonic() + seconds
        while self.poll() and time.monotonic() < deadline:
            time.sleep(0.02)
        took = time.monotonic() - self.began
        self.kill()
        return Ended(codes=[self.codes[pid] for pid in self.pids], out=self.printed(), seconds=took)

    def printed(self) -> str:
        return self.output.read_text(errors="replace")


def run(folder: Path, options: Sequence[str], **keywords: object) -> Ended:
    """A run from its start to its end."""
    with Ranks(folder, *options, **keywords) as ranks:  # type: ignore[arg-type]
        return ranks.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
