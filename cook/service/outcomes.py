"""The documented exit code of a run, behind launchers that hide it."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

from cook.base.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, EXIT_RANK_LOST, EXIT_USER_ERROR
from cook.service.jobs import read_outcome

# The first of these that any rank ended with is that of the run: others may be its consequences.
ORDER = (EXIT_USER_ERROR, EXIT_FAILED, EXIT_RANK_LOST, EXIT_INTERRUPTED)
SCARCE = 1 << 20  # bytes: with fewer, the disk is full
TAIL = 16384  # bytes of the log that are searched for the reason
DOCUMENTED = (EXIT_OK, *ORDER)


def outcome_of(code: int | None, run: Path | None, attempt: Path, stopping: bool) -> tuple[int, str]:
    """The outcome of a command.

    Args:
        code: Its exit code, negative for a signal.
        run: The run folder, for the outcome that the trainer wrote; None for other commands.
        attempt: The folder of the attempt, with output.log and torchrun's error files.
        stopping: Whether a stop was requested, by whomever.

    Returns:
        One of the documented codes, and a sentence.
    """
    told = read_outcome(run) if run is not None else None
    if told is not None and told.get("code") in DOCUMENTED and (code == EXIT_OK) == (told["code"] == EXIT_OK):
        return told["code"], str(told.get("message") or "")
    if code == EXIT_OK:
        return EXIT_OK, "finished"
    ranks = _ranks(attempt / "ranks") if run is not None else {}
    for each in ORDER:
        if each in ranks:
            return each, ranks[each]
    if stopping:
        return EXIT_INTERRUPTED, "killed before it could save" if code == -signal.SIGKILL else "stopped"
    if code is not None and code < 0:
        name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
        return EXIT_RANK_LOST, f"ended by {name}, which nobody asked for (out of memory?); see output.log"
    reason = _last_words(attempt / "output.log") or _scarcity(attempt) or f"ended with exit code {code}"
    return (code if code is not None and code in DOCUMENTED else EXIT_FAILED), f"{reason}; see output.log"


def _last_words(log: Path) -> str:
    """The last line of a log that says why a command of this project ended."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in reversed(lines) if line.startswith(("error: ", "failed: ", "stopped: "))), "")


def _scarcity(folder: Path) -> str:
    """What a command could not write into its log, because it could not write at all."""
    return "failed: the disk is full: free some space" if shutil.disk_usage(folder).free < SCARCE else ""


def _ranks(folder: Path) -> dict[int, str]:
    """The message of one rank for each exit code in torchrun's error files."""
    found: dict[int, str] = {}
    for path in sorted(folder.rglob("error.json")):
        try:
            message = json.loads(path.read_bytes())["message"]["message"]
            code = re.match(r"exit code (\d+): ", message)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if code:
            found.setdefault(int(code[1]), message[code.end() :])
    return found
