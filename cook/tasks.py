"""Fine-tunes, prunes or exports an encoder on a task: `deepspeed cook/tasks.py prune --task_name SST-2`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # A launcher runs this file as a script: Python has put cook/ on the path, where the package itself must be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cook.base.errors import run_entry  # noqa: E402
from cook.base.signals import ending_quietly, heed_launcher  # noqa: E402
from cook.config.tasks import TaskConfig, parse_task_options  # noqa: E402
from cook.recipe.benchmarks.task_plan import pattern_spec, prune_stages  # noqa: E402


def main() -> None:
    """Parses, builds, runs."""
    heed_launcher()
    config = parse_task_options()
    if config.mode != "pretrain":
        pattern_spec(config)
        prune_stages(config)

    with ending_quietly():
        run(config)


def run(config: TaskConfig) -> None:
    """Runs a mode, as the only run in its folder."""
    # Only now: torch, deepspeed and a process group, none of which a mistake in the options should wait for.
    import transformers

    from cook.base.lock import run_lock
    from cook.base.rendezvous import meet
    from cook.base.versions import check_versions
    from cook.base.watchdog import Watchdog
    from cook.recipe.benchmarks.task_export import run_export
    from cook.recipe.benchmarks.task_runner import run_pretrain, run_prune
    from cook.training.engine import initialise_processes, leave_processes

    # Its notes on missing heads and its bars for reading a file would be repeated by every stage.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    check_versions()
    run_mode = {"pretrain": run_pretrain, "prune": run_prune, "export": run_export}[config.mode]
    meeting = meet()
    with Watchdog(config.rank_timeout, meeting) as watchdog:
        initialise_processes(config.threads or None, meeting)
        try:
            with run_lock(config.folder) as watchdog.at_loss:
                run_mode(config, watchdog.at)
        finally:
            leave_processes()


if __name__ == "__main__":
    run_entry(main)
