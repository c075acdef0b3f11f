"""Listing and verifying checkpoints: `python -m cook.training.checkpoint ls|verify DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cook.base.errors import EXIT_FAILED, EXIT_OK, UserError
from cook.report.human import human_count
from cook.report.tables import markdown_table
from cook.training.manifest import MANIFEST, folder_of, looks_whole, read_manifest, steps, verify


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; exit code 1 if `verify` finds a damaged checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m cook.training.checkpoint", description=__doc__)
    parser.add_argument("command", choices=["ls", "verify"], help="list; or compare every file with the manifest")
    parser.add_argument("folder", metavar="DIR", help="a checkpoint, a stage's checkpoints, or a run's output folder")
    parsed = parser.parse_args(arguments)
    folders = _checkpoints(Path(parsed.folder))
    if parsed.command == "ls":
        rows = [_row(folder) for folder in folders]
        print(markdown_table(list(rows[0]), [list(row.values()) for row in rows]))
        return EXIT_OK
    problems = 0
    for folder in folders:
        try:
            files = len(verify(folder)["files"])
            print(f"{folder}: complete, {files} files")
        except UserError as error:
            problems += 1
            print(f"{folder}: DAMAGED: {error.what}")
    return EXIT_FAILED if problems else EXIT_OK


def _checkpoints(folder: Path) -> list[Path]:
    if (folder / MANIFEST).is_file() or folder.name.startswith("step-"):
        return [folder]
    roots = [folder, folder / "checkpoints", *sorted(folder.glob("*/checkpoints"))]
    found = [folder_of(root, step) for root in roots if root.is_dir() for step in steps(root)]
    if not found:
        raise UserError(f"{folder}: no checkpoints", wanted="step-<n>, a folder of them, or a run's output folder")
    return found


def _row(folder: Path) -> dict[str, str]:
    try:
        manifest = read_manifest(folder)
    except UserError as error:
        return {
            "checkpoint": str(folder),
            "step": "",
            "tokens": "",
            "ranks": "",
            "layout": "",
            "size": "",
            "state": f"damaged: {error.what.removeprefix(f'{folder}/')}",
        }
    return {
        "checkpoint": str(folder),
        "step": str(manifest["step"]),
        "tokens": str(manifest["tokens"]),
        "ranks": str(manifest["world_size"]),
        "layout": ", ".join(f"{key} {value}" for key, value in manifest["layout"].items()),
        "size": f"{human_count(sum(entry['size'] for entry in manifest['files'].values()))}B",
        "state": "complete" if looks_whole(folder) else "damaged: a file is missing or has another size",
    }
