"""The one exception that a user's mistake raises, and the exit codes of every command."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # stopped by a signal after saving a checkpoint: start again to go on
EXIT_RANK_LOST = 76  # a rank died, froze or got stuck: start again to go on from the last checkpoint


class UserError(Exception):
    """Something that the user can mend: a config value, a missing file, a mask of another model.

    Args:
        what: What went wrong, one sentence.
        wanted: What would have been accepted.
        got: What was found instead.
        remedy: What to do about it.
    """

    def __init__(self, what: str, *, wanted: object = None, got: object = None, remedy: str | None = None):
        self.what, self.wanted, self.got, self.remedy = what, wanted, got, remedy
        parts = [what]
        parts += [f"  wanted: {wanted}"] if wanted is not None else []
        parts += [f"  got:    {got}"] if got is not None else []
        parts += [f"  remedy: {remedy}"] if remedy is not None else []
        super().__init__("\n".join(parts))


class UserErrors(UserError):
    """Several mistakes reported at once, numbered."""

    def __init__(self, title: str, errors: Sequence[UserError]):
        self.title, self.errors = title, tuple(errors)
        listed = "\n".join(f"{number}. {error}" for number, error in enumerate(self.errors, start=1))
        super().__init__(f"{title}: {len(self.errors)} error{'s' if len(self.errors) != 1 else ''}\n{listed}")

    def __reduce__(self) -> tuple:
        return type(self), (self.title, self.errors)  # one rank's errors travel to the others


class RunFailed(Exception):
    """The run cannot go on, through no mistake in its settings; what it saved before is intact."""


class RankLost(RunFailed):
    """Another rank died, froze or failed, and this one cannot go on without it."""


class Interrupted(Exception):
    """A signal asked the run to stop; everything needed to go on has been saved."""


@contextlib.contextmanager
def library_errors(what: str, **more: Any) -> Iterator[None]:
    """Turns whatever a library raises while it reads a user's file into a `UserError` that says `what`.

    Anything: libraries raise plain `Exception`, and a panic in Rust code derives from `BaseException` alone.

    Args:
        what: What could not be read.
        more: `wanted` and `remedy` of the error.
    """
    try:
        yield
    except (UserError, RunFailed, Interrupted, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(what, got=_reason(error), **more) from None


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    # Messages of several lines end with the reason itself.
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines[-1].strip() else type(error).__name__


_NO_MEMORY = re.compile(r"allocate memory|out of memory|not enough memory|bad_alloc|start new thread", re.IGNORECASE)
_NO_FILES = re.compile(r"too many open files", re.IGNORECASE)


def machine_trouble(error: BaseException) -> tuple[str, str] | None:
    """What the machine refused, and the remedy; None where it is not to blame.

    A disk that is full or broken, a folder that cannot be written, too little memory, too few open files.
    """
    text = str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
        said = f": {text.splitlines()[0][:200]}" if text else ""
        return f"out of memory{said}", "give it more memory, or take smaller batches"
    if _NO_FILES.search(text) and isinstance(error, OSError | RuntimeError):
        where = getattr(error, "filename", None)
        return f"{where or 'the process'}: Too many open files", "raise the limit with `ulimit -n`"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}", "free some space or mend the disk or folder"
    return None


def with_home(argument: str) -> str:
    """A command-line argument with `~` and `~name` resolved where a path starts: at its beginning, after `=` or `,`.

    Shells resolve only the first of these. A file whose name begins with `~` is written `./~file`.
    """
    return re.sub(r"(?<![^=,])~[^/,=]*", lambda found: os.path.expanduser(found[0]), argument)


def run_entry(main: Callable[[], int | None]) -> None:
    """Runs a command's `main` and turns its outcome into the documented exit code, without a traceback for users."""
    sys.argv[1:] = map(with_home, sys.argv[1:])
    try:
        code = main() or EXIT_OK
    except UserError as error:
        code = _told(f"error: {error}", EXIT_USER_ERROR)
    except RunFailed as failure:
        code = _told(f"failed: {failure}", EXIT_RANK_LOST if isinstance(failure, RankLost) else EXIT_FAILED)
    except Interrupted as stop:
        code = _told(f"stopped: {stop}", EXIT_INTERRUPTED)
    except (OSError, MemoryError, RuntimeError) as error:
        trouble = machine_trouble(error)
        if trouble is None:
            raise
        code = _told(f"failed: {trouble[0]}\n{remedy_of(trouble[1])}", EXIT_FAILED)
    for stream in (sys.stdout, sys.stderr):
        # A log on a full disk: Python would try once more at its end, and end with 120.
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def remedy_of(what: str) -> str:
    """The last lines of a message about the machine."""
    return f"  What was finished and saved before is intact.\n  remedy: {what}, then start the same command again"


def _told(text: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    # torchrun's own summary quotes this file; its exit code is 1 whatever the ranks end with.
    summary = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if summary:
        said = {"message": f"exit code {code}: {text}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(summary).write_text(json.dumps({"message": said}), encoding="utf-8")
    return code
