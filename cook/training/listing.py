"""What checkpoints there are, and whether they are whole (`cook checkpoint`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.report.tables import human_count, markdown_table
from cook.training.manifest import MANIFEST, folder_of, looks_whole, read_manifest, steps, verify

COLUMNS = ("checkpoint", "step", "tokens", "ranks", "layout", "size", "state")


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder: a checkpoint itself, a stage's checkpoints, or a run's output folder.

    Raises:
        UserError: there are none.
    """
    if (folder / MANIFEST).is_file() or folder.name.startswith("step-"):
        return [folder]
    roots = [folder, folder / "checkpoints", *sorted(folder.glob("*/checkpoints"))]
    found = [folder_of(root, step) for root in roots if root.is_dir() for step in steps(root)]
    if not found:
        raise UserError(f"{folder}: no checkpoints", wanted="step-<n>, a folder of them, or a run's output folder")
    return found


def describe(folder: Path) -> dict[str, Any]:
    """A checkpoint's manifest in short, and whether its files are there with their sizes."""
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return {"checkpoint": str(folder), "state": f"damaged: {error.what.removeprefix(f'{folder}/')}"}
    return {
        "checkpoint": str(folder),
        "step": manifest["step"],
        "tokens": manifest["tokens"],
        "ranks": manifest["world_size"],
        "layout": manifest["layout"],
        "size": sum(entry["size"] for entry in manifest["files"].values()),
        "state": "complete" if looks_whole(folder) else "damaged: a file is missing or has another size",
    }


def table(described: list[dict[str, Any]]) -> str:
    """What `describe` says of checkpoints, in Markdown."""
    return markdown_table(list(COLUMNS), [[_cell(name, row.get(name)) for name in COLUMNS] for row in described])


def verified(folder: Path) -> tuple[bool, str]:
    """Whether every file is what was saved, by checksum, and a sentence about it."""
    try:
        return True, f"{folder}: complete, {len(verify(folder)['files'])} files"
    except UserError as error:
        return False, f"{folder}: DAMAGED: {error.what}"


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "layout":
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return f"{human_count(value)}B" if name == "size" else str(value)
