"""The commands of an attempt."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cook.service.jobs import Job


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of an attempt."""

    name: str
    command: Sequence[str]
    trains: bool = False  # it writes outcome.json
    launches: bool = False  # it is a launcher of ranks
    needed: bool = True  # its failure is the failure of the job

    def arguments(self, error_folder: Path) -> list[str]:
        """The command; torchrun leaves the errors of the ranks below `error_folder`."""
        return [word.replace("{ERRORS}", str(error_folder)) for word in self.command]


def steps_of(job: Job) -> list[Step]:
    """Training of all stages; reshaping where the job asks for it; the report."""
    config = str(job.folder / "config" / "bmcook.json")
    cook = [sys.executable, "-m", "cook"]
    train, launcher = ["-m", "cook", "train", "--config", config, "--stage", "all"], []
    if job.processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={job.processes}"]
        launcher += ["--log-dir", "{ERRORS}"]
    steps = [Step(name="train", command=[sys.executable, *launcher, *train], trains=True, launches=bool(launcher))]
    if job.spec.get("reshape"):
        steps.append(Step(name="reshape", command=[*cook, "reshape", "--config", config, "--verify"]))
    return [*steps, Step(name="report", command=[*cook, "report", "--config", config], needed=False)]
