"""Saves of two ranks in which each call that writes fails in turn: `failing_saves.py FOLDER OUT`.

Started with the library of `scripts/faults/failing_calls.py` preloaded. Every rank writes what came of each save.
"""

from __future__ import annotations

import errno
import json
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts" / "faults"))

import failing_calls  # noqa: E402

from cook.base import distributed  # noqa: E402
from cook.base.errors import RunFailed  # noqa: E402
from cook.pruning.mask_file import write_mask_file  # noqa: E402
from cook.training.checkpoint import Position, Saver  # noqa: E402
from cook.training.engine import Engine, initialise_processes  # noqa: E402
from cook.training.manifest import steps, verify  # noqa: E402
from tests.training import tiny_training as tiny  # noqa: E402


def main(folder: Path, out: str) -> None:
    initialise_processes(1)
    engine = Engine(tiny.build, tiny.weights(), tiny.TRAINING, {"zero_optimization": {"stage": 2}})
    gates, root = tiny.make_gates(), folder / "checkpoints"

    def masks() -> None:
        if distributed.rank() == 0:
            write_mask_file(folder / "layer.pt", {"mask": gates.binary()[next(iter(gates.binary()))].cpu()})

    def save(step: int) -> str | None:
        try:
            with Saver(root, stage="s", fingerprint="f", keep=100) as saver:
                saver.save(engine, gates, Position(step=step, tokens=step), also=masks)
        except RunFailed as error:
            return str(error)
        return None

    assert save(1) is None
    results, step = [], 1
    for culprit in (0, 1):
        mine = distributed.rank() == culprit
        for code, for_good in ((errno.EIO, False), (errno.ENOSPC, True)):
            nth = count = 0
            while nth <= count:
                step += 1
                if mine:
                    failing_calls.arm(str(folder), nth, code, for_good=for_good)
                began = time.monotonic()
                said = save(step)
                seconds = time.monotonic() - began
                passed = distributed.broadcast(failing_calls.disarm() if mine else 0, culprit)
                count = count or passed  # the first save of each round only counts
                distributed.barrier()
                valid = [s for s in steps(root) if verify(root / f"step-{s}")]
                rubbish = [p.name for f in (folder, root) for p in f.iterdir() if p.name.startswith(("tmp-", "."))]
                results.append(
                    {
                        "culprit": culprit,
                        "code": code,
                        "for_good": for_good,
                        "nth": nth,
                        "said": said,
                        "step": step,
                        "seconds": seconds,
                        "valid": valid,
                        "rubbish": rubbish,
                    }
                )
                distributed.barrier()
                nth += 1
    assert save(step + 1) is None
    Path(f"{out}.{distributed.rank()}").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
