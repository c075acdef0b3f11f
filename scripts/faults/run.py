"""Injects faults into real runs of two ranks and counts what survives: `python scripts/faults/run.py`.

Every trial starts `cook/train.py` on two gloo processes with a tiny model (dropout, gates, λ, ZeRO 2), injects a
fault, starts it again, and compares its files with those of an uninterrupted run: every line of the log, the
optimizer's and the gates' tensors, the generators of all ranks, the final weights and masks must be the same bits.

--kills N      how often the whole group is killed in mid-save (default 50); the other faults are tried in proportion
--only NAME    some faults only, may be repeated: their rows in the JSON are replaced      --list   their names
--output FILE  where the JSON goes (default results/bench/faults.json)
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts" / "bench")]
# Read by torch when it is imported, here and so in every rank.
os.environ.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")

import arithmetic  # noqa: E402
import failing_calls  # noqa: E402
import files  # noqa: E402
import hostile  # noqa: E402
import hosts  # noqa: E402
import launched  # noqa: E402
import lost  # noqa: E402
import saves  # noqa: E402
import worlds  # noqa: E402
import writes  # noqa: E402
from common import publish  # noqa: E402
from proof import Scene, Trial, prepare  # noqa: E402
from ranks import warm_up  # noqa: E402

from cook.base.files import read_json  # noqa: E402

Fault = Callable[[Scene, int, Random], Iterator[Trial]]
FAULTS: dict[str, tuple[Fault, float]] = {
    "kill -9 in mid-save": (saves.in_saves, 1.0),
    "kill -9 at each named point": (saves.at_points, 1.0),
    "kill -9 in mid-step": (saves.in_steps, 0.2),
    "kill -9 while deleting": (saves.while_deleting, 0.04),
    "file truncated": (files.truncated, 0.1),
    "bit flipped": (files.flipped, 0.1),
    "file deleted, exchanged, added": (files.exchanged, 0.1),
    "latest wrong": (files.wrong_latest, 0.12),
    "newest corrupt, one kept": (files.newest_corrupt, 0.06),
    "all corrupt": (files.all_damaged, 0.02),
    "disk full": (files.full_disk, 0.02),
    "RLIMIT_FSIZE": (files.size_limit, 0.06),
    "folder read-only": (files.read_only, 0.02),
    "fsync fails": (files.failing_fsync, 0.08),
    "other files: disk full or broken": (writes.broken, 0.28),
    "log, TensorBoard: broken for a moment": (writes.passing, 0.12),
    "small disk for the model": (writes.small_disk, 0.02),
    "few open files, little memory": (writes.limits, 0.12),
    "SIGTERM, SIGINT": (lost.signals, 0.12),
    "SIGUSR1": (lost.save_and_continue, 0.04),
    "SIGTERM to the launcher": (launched.told_to_stop, 0.04),
    "launcher gone while ranks start": (launched.gone_while_starting, 0.2),
    "SIGKILL of a rank, its launcher stops the other": (launched.lost_rank, 0.08),
    "SIGKILL of a rank": (lost.killed_ranks, 0.08),
    "SIGSTOP of a rank": (lost.frozen_ranks, 0.08),
    "two hosts, one lost": (hosts.lost, 0.14),
    "rank 1 sees another newest": (lost.other_view, 0.02),
    "second run, stale lock": (lost.taken_folder, 0.04),
    "other number of ranks": (worlds.changed, 0.06),
    "NaN loss, Inf gradient on a rank": (arithmetic.not_finite, 0.24),
    "gradient × 1e6": (arithmetic.huge_gradient, 0.04),
    "part of the state left out": (arithmetic.controls, 0.06),
    "malicious mask or checkpoint": (hostile.files, 0.2),
}
"""Name: the fault, and how many of its trials go with one kill."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--only", action="append", choices=FAULTS, metavar="NAME")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(FAULTS))
        return
    _let_calls_fail()
    warm_up()
    rows, failures = [], []
    with tempfile.TemporaryDirectory(prefix="cook-faults-") as folder:
        scene = prepare(Path(folder) / "scene")
        for name in arguments.only or FAULTS:
            fault, share = FAULTS[name]
            tried = list(watched(name, fault(scene, max(1, round(share * arguments.kills)), Random(arguments.seed))))
            counted = [trial for trial in tried if trial.counts]
            bad = [trial for trial in counted if not trial.survived]
            failures += [f"{name}: {trial.note}" for trial in bad]
            rows.append({"fault": name, "trials": len(counted), "survived": len(counted) - len(bad), "lost": len(bad)})
    output = Path(arguments.output) if arguments.output else ROOT / "results" / "bench" / "faults.json"
    settings = {"kills": arguments.kills, "seed": arguments.seed, "ranks": 2}
    publish("faults", settings, merged(rows, output if arguments.only else None), str(output))
    print("\n\n".join(failures), file=sys.stderr)
    sys.exit(1 if failures else 0)


def _let_calls_fail() -> None:
    """Starts this program again with the library preloaded that lets single calls fail, if it can be built."""
    if failing_calls.is_on():
        return
    with tempfile.TemporaryDirectory(prefix="cook-faults-library-") as folder:
        if library := failing_calls.build(Path(folder)):
            environment = os.environ | failing_calls.preloaded(library)
            sys.exit(subprocess.run([sys.executable, *sys.argv], env=environment).returncode)


def merged(rows: list[dict[str, Any]], old: Path | None) -> list[dict[str, Any]]:
    """The rows in the order of the list, with those of earlier runs where these ones say nothing."""
    found = read_json(old)["rows"] if old and old.exists() else []
    by_name = {row["fault"]: row for row in [*found, *rows]}
    return [by_name[name] for name in FAULTS if name in by_name]


def watched(name: str, trials: Iterator[Trial]) -> Iterator[Trial]:
    """Prints the outcome of each trial."""
    for number, trial in enumerate(trials, start=1):
        word = ("survived" if trial.survived else "LOST") if trial.counts else "not tried"
        print(f"{name} {number}: {word}  {trial.note.partition(chr(10))[0]}", flush=True)
        yield trial


if __name__ == "__main__":
    main()
