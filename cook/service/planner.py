"""Plans submissions in a process of its own: it needs torch, may open a GPU, and may be killed by a huge model.

The process starts with the first submission and ends when it has been idle for a while, or when the server ends. It
reads one JSON request per line from stdin, and answers each with one line.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cook.base.errors import RunFailed, UserError, UserErrors, machine_trouble
from cook.service.environment import base_environment
from cook.service.paths import Refused
from cook.service.submission import CONFIG, problems

IDLE = 600.0
"""Seconds without a request after which the process ends, and frees its memory."""
TIMEOUT = 300.0
"""Seconds that a plan may take."""


def plan_here(folder: Path, processes: int, refused: Sequence[Refused] = ()) -> dict[str, Any]:
    """Checks the two files in `folder` and returns the plan of the whole recipe. Changes the working directory.

    Args:
        folder: It holds `bmcook.json` and `l0_pruning.json`, and nothing else.
        processes: Number of ranks.
        refused: Errors that are known already; see `load_config`.

    Raises:
        UserError: The configuration cannot be used; `UserErrors` lists all mistakes.
    """
    from cook.config.load import load_config

    with contextlib.chdir(folder):
        settings = load_config(CONFIG, world_size=processes, refused=refused)
        from cook.recipe.dry_run import plan_facts
        from cook.recipe.plan import recipe

        stages = recipe(settings)
        if not stages:
            raise UserError(f"{CONFIG}: there are no stages to run", remedy='list them under "stages"')
        return plan_facts(settings, stages, world_size=processes)


class Planner:
    """Plans submissions in another process. Threads may share it; they wait for one another."""

    def __init__(self, *, idle: float = IDLE, timeout: float = TIMEOUT):
        self._idle, self._timeout = idle, timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def __call__(self, folder: Path, processes: int, refused: Sequence[Refused] = ()) -> dict[str, Any]:
        """Does what `plan_here` does.

        Raises:
            UserError: The configuration cannot be used, or planning it failed.
        """
        known = [(section, text) for section, error in refused for text in problems(error)]
        request = {"folder": str(folder), "processes": processes, "refused": known}
        with self._lock:
            answer = self._ask(f"{json.dumps(request)}\n".encode())
        if answer is None:
            # The errors that are known may be enough to mend the submission.
            what = "planning failed: the process took too long, or was killed"
            lost = UserError(what, remedy="check the size of the model")
            raise UserErrors("the submission cannot be used", [*(error for _, error in refused), lost])
        if "problems" in answer:
            raise UserErrors("the submission cannot be used", [UserError(text) for text in answer["problems"]])
        return answer["plan"]

    def warm(self) -> None:
        """Starts the process and lets it import torch, so that the first submission need not wait."""
        with self._lock:
            self._ask(b"{}\n")

    def close(self) -> None:
        """Ends the process, also while it plans."""
        self._closed = True
        if (process := self._process) is not None:
            process.kill()
        with self._lock:
            self._end(kill=True)

    def _ask(self, line: bytes) -> dict[str, Any] | None:
        for _ in range(2):  # the process may have ended, idle, just now
            if self._closed:
                break
            if self._process is None or self._process.poll() is not None:
                self._end()
                self._process = self._start()
            assert self._process.stdin is not None and self._process.stdout is not None
            with contextlib.suppress(OSError):
                self._process.stdin.write(line)
                self._process.stdin.flush()
                ready, _, _ = select.select([self._process.stdout], [], [], self._timeout)
                answer = self._process.stdout.readline() if ready else b""
                if answer.endswith(b"\n"):
                    return json.loads(answer)
                if not ready:
                    break
        self._end(kill=True)
        return None

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "cook.service.planner", str(self._idle)]
        environment = base_environment() | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
        )

    def _end(self, *, kill: bool = False) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        process.communicate()  # stdin closes, which ends it


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    if not request:
        import cook.recipe.dry_run  # noqa: F401  # only to have it imported

        return {}
    try:
        refused = [(section, UserError(text)) for section, text in request["refused"]]
        return {"plan": plan_here(Path(request["folder"]), request["processes"], refused)}
    except UserError as error:
        return {"problems": problems(error)}
    except RunFailed as error:
        return {"problems": [str(error)]}
    except Exception as error:
        traceback.print_exc()
        trouble = machine_trouble(error)
        reason = trouble[0] if trouble else f"{type(error).__name__}: {error}"
        return {"problems": [f"planning failed: {reason}"]}


def main() -> None:
    """Answers requests until stdin closes."""
    idle = float(sys.argv[1])
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print
    while select.select([sys.stdin.buffer], [], [], idle)[0]:
        line = sys.stdin.buffer.readline()
        if not line:
            return
        answers.write(f"{json.dumps(_answer(json.loads(line)))}\n".encode())
        answers.flush()


if __name__ == "__main__":
    main()
