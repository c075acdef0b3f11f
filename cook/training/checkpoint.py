"""Checkpoints: writing, finding and loading them. They are complete or absent, and mostly written in the background.

All ranks write into `tmp-<step>/` (DeepSpeed its shards, rank 0 the rest) and agree that all writes succeeded. Then
training continues, while a thread on each rank flushes that rank's files to the disk and hashes them. The threads
agree again; rank 0's thread writes the manifest, flushes the folder, renames it to `step-<n>/` and updates `latest`.
Until then there is no new checkpoint. The next save, a signal and the end of the stage wait for it. A failure is raised
on all ranks in the same step.

To resume, the ranks agree on the newest valid checkpoint that all of them can read, before any of its files is opened.
If checkpoints exist and none is valid, that is an error and never a silent fresh start.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from cook.base import distributed
from cook.base.distributed import in_words
from cook.base.errors import Interrupted, RankLost, RunFailed, UserError, out_of_memory
from cook.base.faults import point
from cook.base.files import naming, read_json
from cook.base.seeds import derived_seed, restore_rng_state, rng_state, seed_everything
from cook.base.tensor_files import load_pt, save_pt
from cook.distill.teacher_loss import Projections
from cook.pruning.gates import Gates
from cook.training.engine import Engine
from cook.training.manifest import (
    MANIFEST,
    SCRATCH,
    file_entry,
    folder_of,
    no_valid_checkpoint,
    publish,
    recover,
    steps,
    verify,
)
from cook.training.shards import checkpoint_weights

STATE = "state.json"  # the file in a checkpoint with the position and the small states of every rank
CONFIG = "config.json"
PATIENCE = timedelta(hours=3)  # time limit for the slowest rank to hash its files


@dataclass(frozen=True, kw_only=True)
class Position:
    """The progress of a stage."""

    step: int  # number of global batches read; names the checkpoint
    updates: int = 0  # number of batches applied; the learning rate and the gates' targets depend on it
    tokens: int  # number of target tokens read
    seconds: float = field(default=0.0, compare=False)  # spent on training, over all runs of the stage
    guard: Mapping[str, Any] = field(default_factory=dict)  # state of the guard against bad steps
    data: Any = None  # state of this rank's loader, as JSON; None if the loader has none
    log: Sequence[str] = ()  # log entries that could not be written yet


class Saver:
    """Writes the checkpoints of one stage into `root` and keeps the last ones; all ranks create and call it together.

    As a context manager, it waits at the end for a save in progress, also if all ranks leave with the same failure.
    `fingerprint` is a hash of the settings that the run's outcome depends on.
    """

    def __init__(self, root: Path, *, stage: str, fingerprint: str, keep: int):
        self._root, self._keep = root, keep
        self._head = {"stage": stage, "fingerprint": fingerprint}
        self._group = distributed.side_group(PATIENCE)
        self._thread: threading.Thread | None = None
        self._step = 0
        self._failures: list[str] = []
        self.newest: Path | None = None  # the last checkpoint that this saver published

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if error is None:
            self.wait()
            distributed.leave_group(self._group)
        elif self._thread and not isinstance(error, RankLost):
            if isinstance(error, RunFailed | Interrupted) or out_of_memory(error):
                self._thread.join()  # the process group stays: this rank may have failed alone, and will end soon

    @property
    def failed(self) -> bool:
        """Whether the save in progress has failed; ranks may learn it at different times."""
        return bool(self._failures)

    def save(
        self,
        engine: Engine,
        gates: Gates | None,
        position: Position,
        *,
        also: Callable[[], None],
        projections: Projections | None = None,
    ) -> None:
        """Writes checkpoint `step-<n>`; returns once the files are written, before they are hashed and published.

        `also` writes files that belong to a checkpoint but are stored elsewhere; it is called first.

        Raises:
            RunFailed: on every rank, if any rank could not write; older checkpoints are untouched.
        """
        self.wait()
        self._step = position.step
        scratch = self._root / f"{SCRATCH}{position.step}"
        point("save.begin")

        def begin() -> None:
            recover(self._root)
            scratch.mkdir(parents=True)

        error = attempt(begin) if distributed.rank() == 0 else None
        # The masks first: flushing a small file takes long while gigabytes wait to be flushed. The ranks agree at
        # once, because the engine's save has collectives that all ranks must reach.
        error = error or attempt(also)
        self._fail_if([e for e in distributed.gather(error) if e])
        point("save.scratch")
        written: list[Path] = []
        try:
            written += engine.save(scratch)
        except RunFailed as failure:  # other errors come from inside its collectives and are not caught
            error = f"rank {distributed.rank()}: {failure}"
        error = error or attempt(lambda: _write_own(scratch, gates, projections, written))
        point("save.written")
        small = {"guard": position.guard, "data": position.data}
        reports = distributed.gather((error, [path.relative_to(scratch).as_posix() for path in written], small))
        failures = [error for error, *_ in reports if error]
        if not failures:
            names = {name for _, names, _ in reports for name in names}
            states = [state for *_, state in reports]
            error = attempt(lambda: _write_rest(scratch, engine, position, states, names, written))
            failures = [e for e in distributed.gather(error) if e]
        self._fail_if(failures)
        point("save.agreed")
        manifest = {**self._head, "step": position.step, "tokens": position.tokens}
        manifest |= {"world_size": distributed.world_size(), "layout": engine.layout}
        self._thread = threading.Thread(target=self._finish, args=(scratch, written, manifest), daemon=True)
        self._thread.start()

    def _finish(self, scratch: Path, written: list[Path], manifest: dict[str, Any]) -> None:
        try:
            entries: dict[str, Any] = {}
            names = [path.relative_to(scratch).as_posix() for path in written]
            error = attempt(lambda: entries.update((name, file_entry(scratch / name)) for name in names))
            point("save.hashed")
            reports = distributed.gather((error, entries), self._group)
            point("save.gathered")
            failures = [error for error, _ in reports if error]
            if not failures and distributed.rank() == 0:
                files = {name: entry for _, entries in reports for name, entry in sorted(entries.items())}
                final = folder_of(self._root, self._step)
                error = attempt(lambda: publish(scratch, final, {**manifest, "files": files}, keep=self._keep))
                failures = [error] if error else []
            failures = distributed.broadcast(failures, group=self._group)
            point("save.done")
        except Exception as error:  # another rank has ended, or this one has left the group
            failures = [f"rank {distributed.rank()}: {in_words(error)}"]
        self._failures = failures

    def wait(self) -> None:
        """Waits until the save in progress is published; all ranks call it, and raise RunFailed if the save failed."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failures, self._failures = self._failures, []
        self._fail_if(failures)
        self.newest = folder_of(self._root, self._step)

    def _fail_if(self, failures: list[str]) -> None:
        if not failures:
            return
        if distributed.rank() == 0:
            attempt(lambda: recover(self._root))
        raise RunFailed(
            f"the checkpoint of step {self._step} could not be written to {self._root}\n  {failures[0]}\n"
            "  remedy: free space or repair the folder, then run the command again; older checkpoints are intact"
        )


def attempt(action: Callable[[], Any]) -> str | None:
    """Runs `action`, without collectives; returns a message for the other ranks if it fails on this rank, else None."""
    try:
        action()
    except Exception as error:  # all ranks must learn of any error
        return f"rank {distributed.rank()}: {in_words(error)}"
    return None


def _write_own(scratch: Path, gates: Gates | None, projections: Projections | None, written: list[Path]) -> None:
    rank = distributed.rank()
    tensors: dict[str, dict] = {f"rng-{rank}.pt": rng_state()}
    if rank == 0 and gates:
        tensors["gates.pt"] = gates.state_dict()
    if rank == 0 and projections:
        tensors["projections.pt"] = projections.state_dict()
    for name, state in tensors.items():
        written.append(scratch / name)
        save_pt(state, scratch / name)


def _write_rest(
    scratch: Path, engine: Engine, position: Position, states: list[Any], names: set[str], written: list[Path]
) -> None:
    """Writes rank 0's files, and lists files that no rank reported: those that DeepSpeed adds to its shards."""
    if distributed.rank() != 0:
        return
    own = {key: value for key, value in asdict(position).items() if key not in ("guard", "data")}
    state, config = ({**own, "ranks": states}, engine.model_config())
    texts = {name: json.dumps(value, indent=1, allow_nan=False) for name, value in ((STATE, state), (CONFIG, config))}
    for name, text in {**texts, "latest": "engine"}.items():  # `latest` is for DeepSpeed's own tools
        with naming(scratch / name):
            (scratch / name).write_text(f"{text}\n")  # flushed together with the other files
    found = {path.relative_to(scratch).as_posix(): path for path in scratch.rglob("*") if path.is_file()}
    written += [path for name, path in sorted(found.items()) if name not in names]


def find_checkpoint(root: Path, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """Finds the checkpoint that `--resume` selects (`auto`, `never`, or a checkpoint's folder); all ranks agree on it.

    Every rank verifies its share of the files, so that together they read each checkpoint once.

    Raises:
        UserError: on every rank, if no checkpoint is valid or the named one is not.
    """
    if resume == "never":
        return None
    if resume != "auto":
        found = _verified_together(Path(resume))
        if isinstance(found, UserError):
            raise found
        return Path(resume), found
    error = attempt(lambda: recover(root)) if distributed.rank() == 0 else None
    error = distributed.broadcast(error)
    if error:
        raise UserError(f"{root}: cannot be cleaned up", got=error, remedy="correct the folder's permissions")
    seen = distributed.gather(steps(root))
    problems = []
    for step in sorted({step for own in seen for step in own}, reverse=True):
        folder = folder_of(root, step)
        blind = [rank for rank, own in enumerate(seen) if step not in own]
        verdict = UserError(f"{folder}: rank {blind[0]} cannot see it") if blind else _verified_together(folder)
        if isinstance(verdict, UserError):
            problems.append(verdict.what)
            continue
        for problem in problems:
            distributed.warn(f"{problem}; using {folder.name} instead")
        point("load.found")
        return folder, verdict
    none = distributed.broadcast(no_valid_checkpoint(root, problems))
    if none:
        raise none
    return None


def _verified_together(folder: Path) -> dict[str, Any] | UserError:
    verdict: dict[str, Any] | UserError
    try:
        verdict = verify(folder, distributed.rank(), distributed.world_size())
    except UserError as error:
        verdict = error
    # The digest covers the rest of the manifest.
    reports = distributed.gather(verdict if isinstance(verdict, UserError) else verdict["digest"])
    if errors := [report for report in reports if isinstance(report, UserError)]:
        return errors[0]
    return verdict if len(set(reports)) == 1 else UserError(f"{folder}: differs between ranks")


def load_checkpoint(
    folder: Path,
    manifest: dict[str, Any],
    engine: Engine,
    gates: Gates | None,
    *,
    fingerprint: str,
    projections: Projections | None = None,
) -> Position:
    """Restores engine, gates and random generators from a verified checkpoint; all ranks call it together.

    With another world size or another ZeRO stage, fp32 weights, moments, schedules and gates are restored exactly,
    and the same batches follow in the same order; random numbers of each rank (dropout) differ.

    Raises:
        UserError: it was saved under other settings.
    """
    if manifest["fingerprint"] != fingerprint:
        raise UserError(
            f"{folder}: saved by a run with other settings, another corpus or other masks",
            remedy="restore them, choose another output_dir, or start over with --resume never",
        )
    for key in ("precision", "optimizer"):
        saved, own = manifest["layout"].get(key), engine.layout[key]
        if saved != own:
            remedy = f"restore the {key}, or start over with --resume never"
            raise UserError(f"{folder}: saved with another {key}", wanted=saved, got=own, remedy=remedy)
    position = _position(folder, manifest["world_size"])
    if manifest["world_size"] == distributed.world_size() and manifest["layout"] == engine.layout:
        engine.load(folder)
    else:
        engine.load_resharded(folder)
    point("load.engine")
    if gates:
        gates.load_state_dict(load_pt(folder / "gates.pt"))
    if projections:
        projections.load_state_dict(load_pt(folder / "projections.pt"))
    if distributed.rank() < manifest["world_size"]:
        restore_rng_state(load_pt(folder / f"rng-{distributed.rank()}.pt"))
    else:
        seed_everything(derived_seed(torch.initial_seed() % 2**63, "resumed at", position.step))
    point("load.done")
    return position


def _position(folder: Path, world_size: int) -> Position:
    state = read_json(folder / STATE)
    ranks = state.pop("ranks")
    state["log"] = tuple(state.get("log", ()))
    if world_size == distributed.world_size():
        return Position(**state, **ranks[distributed.rank()])
    if any(rank != ranks[0] for rank in ranks):
        raise UserError(
            f"{folder}: each rank has its own position in the data",
            wanted=f"{world_size} ranks",
            got=distributed.world_size(),
            remedy="use that many ranks, or --resume never",
        )
    return Position(**state, **ranks[0])


def stored_weights(folder: Path) -> Mapping[str, torch.Tensor]:
    """The fp32 weights in a checkpoint of cook, whose files are verified first, or of DeepSpeed itself."""
    if (folder / MANIFEST).is_file():
        verify(folder)
    return checkpoint_weights(folder)
