"""Malicious files: masks and checkpoints that would run code, fill the memory or leave their folder."""

from __future__ import annotations

import io
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from arithmetic import _sign
from proof import OPTIONS, Scene, Trial, resumes
from ranks import run

from tests.recipe.tiny_run import contents

FINETUNE = (
    "--stage",
    "layer_finetune",
    "--set",
    "model.path=out/pretrain/model",
    "--set",
    'stages=[{"name": "layer_finetune"}]',
    "--set",
    "coarse-grained.coarse_mask=malicious.pt",
)
LIMIT = 2 << 30
"""Bytes that a rank may map beyond what it starts with."""


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


def _masks() -> dict[str, torch.Tensor]:
    return {"self_att_layer_z": torch.ones(3), "cross_att_layer_z": torch.zeros(0), "ffn_layer_z": torch.ones(3)}


def _archive(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _packed(content: bytes, name: str | None = None, grow: int = 0) -> bytes:
    """The same archive with compressed members, one of them grown, or one more with a name."""
    out = io.BytesIO(content if name else b"")
    if name:
        with zipfile.ZipFile(out, "a") as archive:
            archive.writestr(name, b"x")
        return out.getvalue()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            with new.open(member.filename, "w", force_zip64=True) as file:
                file.write(old.read(member))
                for _ in range(grow if member.filename.endswith("data/0") else 0):
                    file.write(bytes(1 << 20))
    return out.getvalue()


def _with(**changes: object) -> bytes:
    return _archive(_masks() | changes)


def _mask_files(canary: Path) -> dict[str, bytes]:
    half, nan = torch.tensor([1.0, 0.5, 1.0]), torch.tensor([1.0, float("nan"), 1.0])
    return {
        "a pickle that runs code": _with(ffn_layer_z=Canary(canary)),
        "a bare pickle": b"cos\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR.",
        "a zip bomb": _packed(_archive(_masks()), grow=4096),
        "a view of 400 GB": _with(ffn_layer_z=torch.zeros(1).expand(10**11)),
        "a member outside": _packed(_archive(_masks()), name="../../evil"),
        "0.5": _with(ffn_layer_z=half),
        "NaN": _with(ffn_layer_z=nan),
        "another model's": _with(ffn_layer_z=torch.ones(5)),
        "integers": _with(ffn_layer_z=torch.ones(3, dtype=torch.int64)),
        "an unknown key": _with(x=torch.ones(1)),
    }


def _limit(_rank: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT,) * 2)


def files(scene: Scene, trials: int, random: Random) -> Iterator[Trial]:
    """Each is refused by all ranks with code 2, nothing is run and nothing written; slipped into a checkpoint too."""
    canary = scene.root / "canary"
    for name, content in list(_mask_files(canary).items())[:trials]:
        scene.fresh()
        (scene.run / "malicious.pt").write_bytes(content)
        yield _refused(scene, canary, name, *FINETUNE)
    for name in ("gates.pt", "rng-0.pt"):
        scene.fresh("stopped")
        (scene.run / "out" / "run.lock").unlink()
        for folder in scene.checkpoints.glob("step-*"):
            torch.save({"cpu": Canary(canary)}, folder / name)
            _sign(folder, folder / name)  # by somebody who can write the manifest too
        yield _refused(scene, canary, f"{name}, signed", *OPTIONS, unchanged=False)
    scene.fresh("stopped")
    for path in (scene.checkpoints / "step-8").rglob("*.pt"):
        torch.save({"cpu": Canary(canary)}, path)
    trial = resumes(scene, at_least=4, note="every file of the newest checkpoint")
    yield trial if not canary.exists() else Trial(survived=False, note="code was run")


def _refused(scene: Scene, canary: Path, name: str, *options: str, unchanged: bool = True) -> Trial:
    before = contents(scene.run)
    ended = run(scene.run, options, before=_limit)
    same = not unchanged or contents(scene.run) == before
    # A file of one rank's own is refused by that rank, and the others end because it does.
    plain = 2 in ended.codes and set(ended.codes) <= {2, 76} and "Traceback" not in ended.out
    right = plain and same and not canary.exists()
    return Trial(survived=right, note=name if right else f"{name}: unchanged {same}, canary {canary.exists()} {ended}")
