"""`outcome.json` in a run's output folder: how the run ended, for programs that watch it.

Launchers hide the exit codes of the ranks. `{"code", "message", "stage", "step", "at"}` has the code that the run ended
with, its message, the stage and step that it had reached, and the UTC time. The first rank writes the file, also at the
loss of another rank. If the first rank itself is lost, another rank writes it. A run that has taken the folder removes
the file of the run before it. A killed run leaves no file, and neither does a refused run in a folder that it has made
itself: that folder is removed.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import TracebackType

from cook.base.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_RANK_LOST, EXIT_USER_ERROR, ending
from cook.base.files import read_json, write_json

NAME = "outcome.json"
CODES = (EXIT_OK, EXIT_FAILED, EXIT_USER_ERROR, EXIT_INTERRUPTED, EXIT_RANK_LOST)


class Outcome:
    """A context that writes the outcome of what happens inside, once the folder is `taken`.

    Args:
        folder: The run's output folder.
        rank: This process's rank.
    """

    def __init__(self, folder: str | Path, rank: int = 0):
        self.path = Path(folder) / NAME
        self.stage: str | None = None
        self.step: int | None = None
        self._rank, self._taken = rank, False

    def taken(self) -> None:
        """Called when this run holds the lock of the folder: the outcome of the run before it is removed."""
        self._taken = True
        if self._rank == 0:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def at(self, step: int) -> None:
        """Records the progress."""
        self.step = step

    def begin(self, stage: str) -> None:
        """Records which stage begins."""
        self.stage, self.step = stage, None

    def write(self, code: int, message: str) -> None:
        """Writes the file if this run holds or held the folder and no other run has taken it since.

        No error is raised: the run ends anyway. A rank other than the first does not replace what is there.
        """
        if not self._taken or (self._rank != 0 and code != EXIT_RANK_LOST):
            return
        record = {
            "code": code if code in CODES else EXIT_FAILED,
            "message": message,
            "stage": self.stage,
            "step": self.step,
            "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

        from cook.base.lock import in_own_folder  # imports torch, for which `cook --help` must not wait

        folder = self.path.parent

        def put() -> None:
            if self._rank == 0 or not self.path.exists():
                write_json(self.path, record)

        with contextlib.suppress(OSError):
            if code != EXIT_USER_ERROR:
                folder.mkdir(parents=True, exist_ok=True)
            if folder.is_dir():
                in_own_folder(folder, put)

    def __enter__(self) -> Outcome:
        global _current
        _current = self
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        global _current
        _current = None
        if self._rank == 0:
            self.write(*(ending(error) if error else (EXIT_OK, "finished")))


_current: Outcome | None = None


def note_end(code: int, message: str) -> None:
    """Writes the outcome of the run of this process, if it has one, before a thread ends the process."""
    if _current is not None and _current._rank == 0:
        _current.write(code, message)


def recorded_code(folder: str | Path) -> int | None:
    """The code in a folder's `outcome.json`; None without a valid one."""
    try:
        found = read_json(Path(folder) / NAME)
    except Exception:
        return None
    code = found.get("code") if isinstance(found, dict) else None
    return code if isinstance(code, int) else None
