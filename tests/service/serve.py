"""The command `cook serve` with the stand-in in place of the trainer: `python tests/service/serve.py OPTION…`."""

from __future__ import annotations

from cook import cli
from cook.service.executors import LocalExecutor
from cook.service.planner import Planner
from tests.service.parts import SUPERVISOR

if __name__ == "__main__":
    LocalExecutor.__init__.__defaults__ = ((), 4, SUPERVISOR)
    Planner.warm = lambda self: None  # it imports torch, and nothing is submitted
    cli.main("serve")
