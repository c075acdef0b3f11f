"""The supervisor of an attempt whose steps run in a warm interpreter: `warm_supervisor.py INTERPRETER JOBFOLDER N`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from cook.service.steps import steps_of
from cook.service.supervisor import supervise

if __name__ == "__main__":
    interpreter, folder, number = sys.argv[1:]

    def steps(job):
        return [replace(step, command=[interpreter, *step.command[1:]]) for step in steps_of(job)]

    sys.exit(supervise(Path(folder), int(number), steps))
