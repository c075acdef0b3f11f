"""Exceptions for the mistakes of users and for failed runs, and the exit codes of all commands."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 75  # stopped by a signal after saving a checkpoint: the same command resumes
EXIT_KEYBOARD = 130  # Ctrl-C while nothing was trained
EXIT_RANK_LOST = 76  # a rank died, froze or got stuck: the same command resumes from the last checkpoint


class UserError(Exception):
    """An error that the user can fix, such as a bad config value, a missing file or a mask of another model.

    Args:
        what: What went wrong, in one sentence.
        wanted: What would have been accepted.
        got: What was found instead.
        remedy: How to fix it.
    """

    def __init__(self, what: str, *, wanted: object = None, got: object = None, remedy: str | None = None):
        self.what, self.wanted, self.got, self.remedy = what, wanted, got, remedy
        parts = [what]
        parts += [f"  wanted: {wanted}"] if wanted is not None else []
        parts += [f"  got:    {got}"] if got is not None else []
        parts += [f"  remedy: {remedy}"] if remedy is not None else []
        super().__init__("\n".join(parts))


class UserErrors(UserError):
    """Several errors, numbered and reported at once."""

    def __init__(self, title: str, errors: Sequence[UserError]):
        self.title, self.errors = title, tuple(errors)
        listed = "\n".join(f"{number}. {error}" for number, error in enumerate(self.errors, start=1))
        super().__init__(f"{title}: {len(self.errors)} error{'s' if len(self.errors) != 1 else ''}\n{listed}")

    def __reduce__(self) -> tuple:
        return type(self), (self.title, self.errors)  # errors are sent to other ranks


class RunFailed(Exception):
    """The run cannot continue, and its settings are not the cause. Everything saved before is intact."""


class RankLost(RunFailed):
    """Another rank died, froze or failed, and this rank cannot continue without it."""


class Interrupted(Exception):
    """A signal stopped the run. Everything needed to resume has been saved."""


@contextlib.contextmanager
def library_errors(what: str, **more: Any) -> Iterator[None]:
    """Turns exceptions of a library that reads a user's file into a `UserError` of `what` and `more`.

    `UserError`, `RunFailed`, `Interrupted` and the exceptions that end a process pass through unchanged. All others are
    caught, also `BaseException`, from which a panic in Rust code derives directly.
    """
    try:
        yield
    except (UserError, RunFailed, Interrupted, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise UserError(what, got=_reason(error), **more) from None


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    # The last line of a multi-line message gives the reason.
    return f"{type(error).__name__}: {lines[-1].strip()[:300]}" if lines[-1].strip() else type(error).__name__


_NO_MEMORY = re.compile(r"allocate memory|out of memory|not enough memory|bad_alloc|start new thread", re.IGNORECASE)
_NO_FILES = re.compile(r"too many open files", re.IGNORECASE)


def out_of_memory(error: BaseException) -> bool:
    """Whether a CPU or an accelerator had not enough memory."""
    return isinstance(error, MemoryError) or bool(isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)))


def machine_trouble(error: BaseException) -> tuple[str, str] | None:
    """What failed, and the remedy, if the machine caused an error (disk, memory, open files); else None."""
    text = str(error)
    if out_of_memory(error):
        reason = f": {text.splitlines()[0][:200]}" if text else ""
        return f"out of memory{reason}", "give the process more memory, or use smaller batches"
    if _NO_FILES.search(text) and isinstance(error, OSError | RuntimeError):
        where = getattr(error, "filename", None)
        return f"{where or 'the process'}: Too many open files", "raise the limit with `ulimit -n`"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'a file'}: {error.strerror}", "free some space, or repair the disk or folder"
    return None


def with_home(argument: str) -> str:
    """Expands `~` and `~name` in a command-line argument, at its beginning and after each `=` and `,`.

    Shells expand only the first of these. To name a file that begins with `~`, write `./~file`.
    """
    return re.sub(r"(?<![^=,])~[^/,=]*", lambda found: os.path.expanduser(found[0]), argument)


def run_entry(main: Callable[[], int | None]) -> None:
    """Runs the `main` of a command and exits with the documented code. Users see no traceback for their mistakes."""
    sys.argv[1:] = map(with_home, sys.argv[1:])
    try:
        code: int | str | None = main() or EXIT_OK
    except SystemExit as end:  # the parser of the command line ends so, also after success and after Ctrl-C
        code = end.code
    except KeyboardInterrupt:
        code = EXIT_KEYBOARD
    except (UserError, RunFailed, Interrupted, OSError, MemoryError, RuntimeError) as error:
        expected = _expected_ending(error)
        if expected is None:
            raise
        code = _report(expected[1], expected[0])
    if code == EXIT_INTERRUPTED and threading.current_thread() is threading.main_thread():
        # Another rank may have passed on the request to stop before this one's own signal arrives: the code stays.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, lambda *_: None)
    if code == EXIT_KEYBOARD:
        _report("stopped: by Ctrl-C; the same command starts again, or resumes from the newest checkpoint", code)
    for stream in (sys.stdout, sys.stderr):
        # If the log is on a full disk, Python would flush again when it exits, and exit with code 120.
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def ending(error: BaseException) -> tuple[int, str]:
    """The exit code of a command that ends with `error`, and the message that it prints."""
    return _expected_ending(error) or (EXIT_FAILED, f"{type(error).__name__}: {error}")


def _expected_ending(error: BaseException) -> tuple[int, str] | None:
    """The same; None for an error that is a bug, of which users see the traceback."""
    if isinstance(error, UserError):
        return EXIT_USER_ERROR, f"error: {error}"
    if isinstance(error, RunFailed):
        return EXIT_RANK_LOST if isinstance(error, RankLost) else EXIT_FAILED, f"failed: {error}"
    if isinstance(error, Interrupted):
        return EXIT_INTERRUPTED, f"stopped: {error}"
    trouble = machine_trouble(error)
    return (EXIT_FAILED, f"failed: {trouble[0]}\n{remedy_of(trouble[1])}") if trouble else None


def write_to_stderr(text: str) -> None:
    """Writes a line, also from a thread or a signal handler: `print` is not reentrant. Errors are ignored."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode())


def remedy_of(what: str) -> str:
    """The last lines of an error message about the machine; `what` is the remedy."""
    return f"  Everything saved before is intact.\n  remedy: {what}, then run the same command again"


def _report(text: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)
    # torchrun quotes this file in its summary. Its own exit code is always 1, whatever code the ranks exit with.
    summary = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if summary:
        message = {"message": f"exit code {code}: {text}", "extraInfo": {"timestamp": str(int(time.time()))}}
        with contextlib.suppress(OSError):
            Path(summary).write_text(json.dumps({"message": message}), encoding="utf-8")
    return code
