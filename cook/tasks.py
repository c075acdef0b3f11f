"""Fine-tunes, prunes or exports an encoder on a task: `deepspeed cook/tasks.py prune --task_name SST-2`."""

from __future__ import annotations

import sys
from pathlib import Path

if not __package__:
    # A launcher runs this file as a script: Python has put cook/ on the path, where the package itself must be found.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from cook.base.errors import run_entry  # noqa: E402
from cook.config.tasks import parse_task_options  # noqa: E402
from cook.stages.tasks.plan import pattern_spec, prune_stages  # noqa: E402


def main() -> None:
    """Parses, builds, runs."""
    config = parse_task_options()
    if config.mode != "pretrain":
        pattern_spec(config)
        prune_stages(config)

    # Only now: torch, deepspeed and a process group, none of which a mistake in the options should wait for.
    import transformers

    from cook.stages.tasks.export import run_export
    from cook.stages.tasks.runner import run_pretrain, run_prune
    from cook.training.engine import initialise_processes, leave_processes

    # Its notes on missing heads and its bars for reading a file would be repeated by every stage.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    initialise_processes(config.threads or None)
    try:
        {"pretrain": run_pretrain, "prune": run_prune, "export": run_export}[config.mode](config)
    finally:
        leave_processes()


if __name__ == "__main__":
    run_entry(main)
