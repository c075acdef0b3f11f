"""Starting a run: reads the configuration, creates the process group, and runs the stages."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

from cook.base.distributed import launched_rank, launched_world_size
from cook.base.errors import EXIT_OK, EXIT_RANK_LOST, UserError
from cook.base.outcome import Outcome, recorded_code
from cook.base.signals import ending_quietly
from cook.base.watchdog import At
from cook.config.load import load_config
from cook.config.tasks import PlanOptions, TaskConfig
from cook.config.types import RunConfig
from cook.recipe.plan import Stage, plan_stage, recipe


def start(
    config: str, overrides: Sequence[str] = (), *, stage: str | None = None, resume: str = "auto", dry_run: bool = False
) -> None:
    """Trains one stage, or the whole recipe.

    Args:
        config: Path of a `bmcook.json`.
        overrides: Changes to it, `KEY=VALUE`.
        stage: A stage's name; `all`; None: the one stage that the two files describe.
        resume: `auto`, `never`, or the folder of a checkpoint.
        dry_run: Check everything and print the plan, without writing anything.

    Raises:
        UserError: the configuration or a file is not valid.
        Interrupted: stopped by a signal, after saving.
    """
    if dry_run:
        if launched_rank() == 0:
            from cook.recipe.dry_run import show_plan

            show_plan(make_plan(config, overrides, stage=stage, resume=resume))
        return
    settings, stages = _read(config, overrides, stage, resume, launched_world_size())
    with ending_quietly():
        _run(settings, stages, resume=resume)


def make_plan(
    config: str,
    overrides: Sequence[str] = (),
    *,
    stage: str | None = "all",
    resume: str = "auto",
    options: PlanOptions | None = None,
) -> dict[str, Any]:
    """Checks everything and returns the plan, as `cook.recipe.dry_run.plan_facts` does; nothing is written.

    Without `options`, the plan is for the ranks that a launcher has announced.

    Raises:
        UserError: as `start` does.
    """
    from cook.recipe.dry_run import plan_facts

    # A plan made outside any launcher must not be held to the single rank that it happens to have.
    known = launched_world_size() if "WORLD_SIZE" in os.environ else None
    options = options or PlanOptions()
    options.check()
    if options.gpus or options.hosts > 1:
        known = (options.gpus or 1) * options.hosts
    settings, stages = _read(config, overrides, stage, resume, known)
    return plan_facts(settings, stages, world_size=known or 1, options=options)


def _read(
    config: str, overrides: Sequence[str], stage: str | None, resume: str, world_size: int | None
) -> tuple[RunConfig, list[Stage]]:
    if stage == "all" and resume not in ("auto", "never"):
        raise UserError(
            "--resume PATH applies to a single stage", got="--stage all", remedy="name the stage: --stage NAME"
        )
    settings = load_config(config, list(overrides), world_size=world_size)
    stages = recipe(settings) if stage == "all" else [plan_stage(settings, stage or settings.stage)]  # type: ignore[arg-type]
    if not stages:
        raise UserError(f"{config}: there are no stages to run", remedy='list them under "stages"')
    return settings, stages


def _run(config: RunConfig, stages: Sequence[Stage], *, resume: str) -> None:
    from cook.recipe.language_model import LanguageModelRun
    from cook.recipe.quantize import check_early
    from cook.recipe.runner import is_finished, say_finished

    folder, training = config.output_dir, config.training
    if all(is_finished(stage, resume) for stage in stages):
        if launched_rank() == 0:
            for stage in stages:
                say_finished(stage)
            _note_finished(folder)
        return
    for stage in stages:
        if stage.quantization:  # days before its turn
            check_early(stage)
    outcome = Outcome(folder, launched_rank())
    with outcome, ranks(folder, training.threads, training.rank_timeout, outcome) as at:
        for number, stage in enumerate(stages, start=1):
            outcome.begin(stage.name)
            LanguageModelRun(stage, resume=resume, at=at).run()
            _say_remaining(stage, stages[number:])


def _note_finished(folder: str) -> None:
    """Writes the outcome that a killed run did not write after its last stage."""
    from cook.base.lock import run_lock

    if recorded_code(folder) != EXIT_OK:
        with contextlib.suppress(UserError), Outcome(folder) as outcome, run_lock(folder):
            outcome.taken()


def _say_remaining(stage: Stage, later: Sequence[Stage]) -> None:
    """Prints how long the later stages will take at the speed of the one that has finished."""
    from cook.base.distributed import say
    from cook.base.files import read_json
    from cook.report.tables import human_duration

    def tokens(planned: Stage) -> int:
        training = planned.config.training
        return training.steps * training.train_batch_size * planned.config.data.max_length

    seconds = float(read_json(stage.done)["seconds"])
    if later and seconds:
        rest = sum(map(tokens, later)) * seconds / tokens(stage)
        say(
            f"{stage.name} took {human_duration(seconds)}; at this speed the other {len(later)} stages take "
            f"{human_duration(rest)}"
        )


def start_task(config: TaskConfig) -> None:
    """Runs one mode of a benchmark run: fine-tuning, pruning or export of an encoder.

    Raises:
        UserError: an option or a file is not valid.
        Interrupted: stopped by a signal, after saving.
    """
    with ending_quietly():
        import transformers

        from cook.recipe.benchmarks.task import task_info
        from cook.recipe.benchmarks.task_export import run_export
        from cook.recipe.benchmarks.task_plan import prune_stages
        from cook.recipe.benchmarks.task_stages import run_pretrain, run_prune

        task_info(config)
        if config.mode != "pretrain":
            prune_stages(config)
        # transformers would repeat its notes on missing heads and its progress bars in every stage.
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        run_mode = {"pretrain": run_pretrain, "prune": run_prune, "export": run_export}[config.mode]
        folder = str(config.folder)
        outcome = Outcome(folder, launched_rank())
        with outcome, ranks(folder, config.threads or None, config.rank_timeout, outcome) as at:
            run_mode(config, at)


@contextlib.contextmanager
def ranks(folder: str, threads: int | None, rank_timeout: float, outcome: Outcome) -> Iterator[At]:
    """A context with the process group of all ranks, a watchdog and a locked folder; yields a callback for progress."""
    # Imported late: an error in the settings must not wait for torch, deepspeed and a process group.
    from cook.base.environment import check_versions
    from cook.base.lock import run_lock
    from cook.base.rendezvous import meet
    from cook.base.watchdog import Watchdog
    from cook.training.engine import initialise_processes, leave_processes

    check_versions()
    meeting = meet()
    with Watchdog(rank_timeout, meeting) as watchdog:

        def at(step: int, phase: str) -> None:
            outcome.at(step)
            watchdog.at(step, phase)

        initialise_processes(threads, meeting)
        try:
            with run_lock(folder) as withdraw:
                outcome.taken()

                def at_loss(verdict: str) -> None:
                    outcome.write(EXIT_RANK_LOST, f"failed: {verdict}")
                    withdraw()

                watchdog.at_loss = at_loss
                yield at
        finally:
            leave_processes()
