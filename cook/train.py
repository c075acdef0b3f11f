"""Trains one stage, or the whole recipe: `deepspeed cook/train.py --config config/bmcook.json`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

if not __package__:
    # A launcher runs this file as a script: Python has put cook/ on the path, where the package itself must be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cook.base.distributed import launched_rank, launched_world_size  # noqa: E402
from cook.base.errors import UserError, run_entry  # noqa: E402
from cook.base.signals import ending_quietly  # noqa: E402
from cook.config.load import load_config  # noqa: E402
from cook.config.types import STAGE_NAMES, RunConfig  # noqa: E402
from cook.stages.plan import Stage, plan_stage, recipe  # noqa: E402


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="cook/train.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", default="config/bmcook.json", help="what to do (default: %(default)s)")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[],
                        help="change a config value, such as training.steps=200; may be repeated")  # fmt: skip
    parser.add_argument("--stage", metavar="NAME", choices=[*STAGE_NAMES, "all"],
                        help=f"one of {', '.join(STAGE_NAMES)}, or all: every stage of the recipe "
                             "(default: the one stage that the config files describe)")  # fmt: skip
    parser.add_argument("--resume", metavar="auto|never|PATH", default="auto",
                        help="go on from the newest valid checkpoint, start over, or take that one "
                             "(default: auto)")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and stop")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # some launchers pass it
    return parser.parse_args(arguments)


def main() -> int | None:
    """Parses, builds, runs."""
    arguments = parse_arguments()
    if arguments.stage == "all" and arguments.resume not in ("auto", "never"):
        raise UserError("--resume PATH belongs to one stage", got="--stage all", remedy="name the stage: --stage NAME")
    # A plan made outside any launcher must not be held to the single rank that it happens to have.
    unknown = arguments.dry_run and "WORLD_SIZE" not in os.environ
    config = load_config(
        arguments.config, arguments.overrides, world_size=None if unknown else launched_world_size()
    )
    if arguments.stage == "all":
        stages = recipe(config)
        if not stages:
            raise UserError(f"{arguments.config}: there are no stages to run", remedy='list them under "stages"')
    else:
        stages = [plan_stage(config, arguments.stage or config.stage)]
    if arguments.dry_run:
        from cook.stages.dry_run import print_plan

        if launched_rank() == 0:
            print_plan(config, stages, world_size=launched_world_size())
        return None

    with ending_quietly():
        run(config, stages, resume=arguments.resume)
    return None


def run(config: RunConfig, stages: list[Stage], *, resume: str) -> None:
    """Runs stages one after the other, as the only run in their folder."""
    # Only now: torch, deepspeed and a process group, none of which a mistake in the config should wait for.
    from cook.base.lock import run_lock
    from cook.base.versions import check_versions
    from cook.base.watchdog import Watchdog
    from cook.stages.runner import is_finished, run_stage, say_finished
    from cook.training.engine import initialise_processes, leave_processes

    if all(is_finished(stage, resume) for stage in stages):
        for stage in stages if launched_rank() == 0 else ():
            say_finished(stage)
        return
    check_versions()
    initialise_processes(config.training.threads)
    try:
        with run_lock(config.output_dir), Watchdog(config.training.rank_timeout) as watchdog:
            for stage in stages:
                run_stage(stage, resume=resume, at=watchdog.at)
    finally:
        leave_processes()


if __name__ == "__main__":
    run_entry(main)
