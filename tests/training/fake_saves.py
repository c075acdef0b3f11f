"""Checkpoints of an engine that only writes a number, and ways to harm them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cook.training.checkpoint import Position, Saver


class FakeEngine:
    """Writes and reads one number."""

    layout = {"zero_stage": 0, "precision": "fp32", "optimizer": "AdamW"}

    def __init__(self, number: int = 0, fails: Exception | None = None):
        self.number, self.fails, self.resharded = number, fails, False

    def save(self, folder: Path) -> list[Path]:
        (folder / "engine").mkdir()
        (folder / "engine" / "number").write_text(str(self.number))
        (folder / "engine" / "beside").write_text("DeepSpeed's own")
        if self.fails:
            raise self.fails
        return [folder / "engine" / "number"]

    def load(self, folder: Path) -> None:
        self.number = int((folder / "engine" / "number").read_text())

    def load_resharded(self, folder: Path) -> None:
        self.load(folder)
        self.resharded = True

    def model_config(self) -> dict[str, Any]:
        return {"layers": 2}


def position(step: int, **others: Any) -> Position:
    return Position(step=step, updates=step - 1, tokens=100 * step, **others)


def save(root: Path, step: int, *, keep: int = 10, engine: Any = None, gates: Any = None, **others: Any) -> Path:
    """Saves and waits for the publication."""
    also, projections = others.pop("also", lambda: None), others.pop("projections", None)
    with Saver(root, stage="s", fingerprint="f", keep=keep) as saver:
        at = position(step, **others)
        saver.save(engine or FakeEngine(step), gates, at, also=also, projections=projections)
    assert saver.newest is not None
    return saver.newest


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def delete(path: Path) -> None:
    path.unlink()
