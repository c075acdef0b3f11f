"""Damaged checkpoints, and disks on which they cannot be written."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

from proof import EVERY, OPTIONS, STEPS, Scene, Trial, resumes
from ranks import Ended, run

from cook.training.checkpoint import find_checkpoint
from tests.recipe.tiny_run import contents

FLIPS = 20
NEWEST, BEFORE = 8, 4
Harm = Callable[[Path], None]


def _members(scene: Scene, step: int = NEWEST) -> list[str]:
    folder = scene.root / "stopped" / "out"
    found = next(folder.rglob(f"checkpoints/step-{step}"))
    return sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file())


def _cut(length: float) -> Harm:
    def harm(path: Path) -> None:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) - 1 if length == -1 else int(len(content) * length)])

    return harm


def _flip(random: Random) -> Harm:
    def harm(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)

    return harm


def _noticed(scene: Scene) -> bool:
    """Whether the damaged newest checkpoint is passed over, without unpickling anything of it."""
    with contextlib.redirect_stderr(io.StringIO()):
        found = find_checkpoint(scene.checkpoints, "auto")
    return found is not None and found[0].name == f"step-{BEFORE}"


def _harmed(scene: Scene, harms: list[tuple[str, Harm]], random: Random, runs: int) -> Iterator[Trial]:
    """Each harm to each file of the newest checkpoint; a few of them, by chance, through a whole run."""
    cases = [(name, what, harm) for name in _members(scene) for what, harm in harms]
    whole = set(random.sample(range(len(cases)), min(runs, len(cases))))
    target = scene.checkpoints / f"step-{NEWEST}"
    for index, (name, what, harm) in enumerate(cases):
        if index == 0 or index - 1 in whole:
            scene.fresh("stopped")
        before = (target / name).read_bytes()
        harm(target / name)
        note = f"{name} {what}"
        changed = not (target / name).is_file() or (target / name).read_bytes() != before
        if not changed:
            yield Trial(survived=True, note=f"{note}: the same content", counts=False)
        elif index in whole or not _noticed(scene):
            # What is not noticed may still mean nothing, as a space in a manifest: the run will tell.
            yield resumes(scene, at_least=BEFORE, note=note)
            whole.add(index)
        else:
            yield Trial(survived=_noticed(scene), note=note)
        if index not in whole:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).write_bytes(before)


def truncated(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """Every file cut to nothing, to half, by one byte."""
    yield from _harmed(scene, [("to 0", _cut(0)), ("to half", _cut(0.5)), ("by 1", _cut(-1))], random, trials)


def flipped(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """One bit flipped, at 20 offsets of every file."""
    yield from _harmed(scene, [("a bit", _flip(random))] * FLIPS, random, trials)


def exchanged(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """Every file deleted, or exchanged for that of the step before; a file added."""

    def swap(path: Path) -> None:
        own = path.relative_to(scene.checkpoints / f"step-{NEWEST}")
        shutil.copy(scene.checkpoints / f"step-{BEFORE}" / own, path)

    def remove(path: Path) -> None:
        path.unlink()

    yield from _harmed(scene, [("deleted", remove), ("of the step before", swap)], random, trials)
    for name in ("more.pt", "engine/zero_pp_rank_9_mp_rank_00_optim_states.pt"):
        scene.fresh("stopped")
        (scene.checkpoints / f"step-{NEWEST}" / name).parent.mkdir(exist_ok=True)
        (scene.checkpoints / f"step-{NEWEST}" / name).write_bytes(b"cos\nsystem\n")
        yield resumes(scene, at_least=BEFORE, note=f"{name} added")


def wrong_latest(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """`latest` empty, garbage, a path outside, dangling, gone, a folder."""
    contents = ["", "\x00\xff garbage", "../../x\n", "step-999\n", None, Path("/nowhere/at/all")]
    for content in contents[: max(1, trials)]:
        scene.fresh("stopped")
        latest = scene.checkpoints / "latest"
        latest.unlink()
        if isinstance(content, Path):
            latest.symlink_to(content)
        elif content is not None:
            latest.write_text(content, encoding="latin-1")
        yield resumes(scene, at_least=NEWEST, note=f"latest: {content!r}")


def all_damaged(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """Every checkpoint damaged: an error with code 2 on all ranks, nothing written, no fresh start."""
    for _ in range(trials):
        scene.fresh("stopped")
        for path in scene.checkpoints.glob("step-*/rng-*.pt"):
            _cut(0.5)(path)
        (scene.run / "out" / "run.lock").unlink()
        before = contents(scene.run)
        ended = run(scene.run, OPTIONS)
        same = contents(scene.run) == before
        right = ended.codes == [2, 2] and "no checkpoint is valid" in ended.out and same
        yield Trial(survived=right, note=str(ended))


def newest_corrupt(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """Two are kept and the newest is corrupt: the last valid one must not be what is deleted."""
    for _ in range(trials):
        scene.fresh("stopped")
        _flip(random)(scene.checkpoints / f"step-{NEWEST}" / random.choice(_members(scene)[:-1]))
        options = (*OPTIONS, "--set", "training.keep_checkpoints=1")
        ended = run(scene.run, options)
        last = [path.name for path in scene.checkpoints.glob("step-*")]
        valid = find_checkpoint(scene.checkpoints, "auto")
        right = set(ended.codes) == {0} and last == [f"step-{STEPS}"] and valid is not None
        yield Trial(survived=right, note=f"{last} {ended}")


def _refused_write(scene: Scene, ended: Ended, note: str) -> Trial | None:
    left = sorted(path.name for path in scene.checkpoints.iterdir())
    told = "could not be written" in ended.out and "Traceback" not in ended.out
    if ended.codes == [1, 1] and told and left == ["latest", f"step-{BEFORE}", f"step-{NEWEST}"]:
        return None
    return Trial(survived=False, note=f"{note}: {left} {ended}")


def full_disk(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """A file system with room for the old checkpoints only, then for all."""
    scene.fresh("stopped")
    size = sum(path.stat().st_blocks * 512 for path in scene.run.rglob("*"))
    spare = scene.checkpoints / f"step-{NEWEST}"
    room = size + sum(path.stat().st_blocks * 512 for path in spare.rglob("*")) // 2
    shutil.rmtree(scene.run)
    scene.run.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(scene.run)]
    if subprocess.run(mount, capture_output=True).returncode:
        scene.fresh()
        yield Trial(survived=True, note="not tried: mounting a small file system is not allowed here", counts=False)
        return
    try:
        shutil.copytree(scene.root / "stopped", scene.run, dirs_exist_ok=True)
        ended = run(scene.run, OPTIONS)
        failed = _refused_write(scene, ended, "a full disk")
        subprocess.run([*mount[:3], "-o", f"remount,size={room * 8}", *mount[5:]], check=True)
        yield failed or resumes(scene, at_least=NEWEST, note=f"{room} bytes")
    finally:
        subprocess.run(["umount", str(scene.run)], check=True)


def size_limit(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """RLIMIT_FSIZE on one rank or both: no file may grow beyond it."""
    for number in range(trials):
        scene.fresh("stopped")
        limited = ((0, 1), (1,), (0,))[number % 3]

        def limit(rank: int, limited: tuple[int, ...] = limited) -> None:
            if rank in limited:
                resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

        failed = _refused_write(scene, run(scene.run, OPTIONS, before=limit), f"ranks {limited}")
        yield failed or resumes(scene, at_least=NEWEST, note=f"limit on ranks {limited}")


def read_only(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """The checkpoints' folder cannot be written: a read-only mount, as modes mean nothing to root."""
    for _ in range(trials):
        scene.fresh("stopped")
        folder, mode = str(scene.checkpoints), scene.checkpoints.stat().st_mode
        if os.geteuid() == 0:
            if subprocess.run(["mount", "--bind", folder, folder], capture_output=True).returncode:
                yield Trial(survived=True, note="not tried: mounting is not allowed here", counts=False)
                return
            subprocess.run(["mount", "-o", "remount,ro,bind", folder], check=True)
        else:
            scene.checkpoints.chmod(0o555)
        try:
            failed = _refused_write(scene, run(scene.run, OPTIONS), "read-only")
        finally:
            if os.geteuid() == 0:
                subprocess.run(["umount", folder], check=True)
            else:
                scene.checkpoints.chmod(mode)
        yield failed or resumes(scene, at_least=NEWEST, note="read-only")


def failing_fsync(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """fsync reports an error on one rank, at a random call inside a save."""
    for number in range(trials):
        scene.fresh("stopped")

        def fail(rank: int, chosen: int = number % 2, nth: int = random.randrange(1, 3)) -> None:
            real, calls = os.fsync, [0]

            def fsync(handle: int) -> None:
                inside = "/tmp-" in os.readlink(f"/proc/self/fd/{handle}")
                calls[0] += inside
                if inside and rank == chosen and calls[0] == nth:
                    raise OSError(5, "Input/output error")
                real(handle)

            os.fsync = fsync

        ended = run(scene.run, OPTIONS, before=fail)
        note = f"fsync fails on rank {number % 2}"
        if ended.codes == [0, 0]:
            yield Trial(survived=True, note=f"{note}: this rank does not call it", counts=False)
        else:
            yield _refused_write(scene, ended, note) or resumes(scene, at_least=NEWEST, note=note)


assert EVERY == BEFORE
