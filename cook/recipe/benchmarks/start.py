"""Starts one mode of a benchmark run: fine-tuning, pruning or the export of an encoder."""

from __future__ import annotations

from cook.base.signals import ending_quietly
from cook.config.tasks import TaskConfig
from cook.recipe.benchmarks.task_plan import pattern_spec, prune_stages
from cook.recipe.start import ranks


def start_task(config: TaskConfig) -> None:
    """Runs a mode, as the only run in its folder.

    Raises:
        UserError: an option, or something on the disk, does not fit.
        Interrupted: stopped by a signal, after saving.
    """
    if config.mode != "pretrain":
        pattern_spec(config)
        prune_stages(config)
    with ending_quietly():
        import transformers

        from cook.recipe.benchmarks.task_export import run_export
        from cook.recipe.benchmarks.task_runner import run_pretrain, run_prune

        # Its notes on missing heads and its progress bars for reading a file would be repeated by every stage.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        run_mode = {"pretrain": run_pretrain, "prune": run_prune, "export": run_export}[config.mode]
        with ranks(str(config.folder), threads=config.threads or None, rank_timeout=config.rank_timeout) as at:
            run_mode(config, at)
