"""A folder of checkpoints: listing (`cook checkpoint`), verifying, publishing and removing them.

A checkpoint is a folder `step-<n>` whose manifest lists every file with its size and SHA-256. It appears by a rename,
so it is complete or absent. `latest` names the newest for people and other tools, and is never used here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cook.base.errors import UserError
from cook.base.faults import point
from cook.base.files import fsync_folder, naming, read_json, sha256, write_atomically
from cook.report.tables import human_bytes, markdown_table

MANIFEST, LATEST = "manifest.json", "latest"
MANIFEST_TYPES = {"stage": str, "step": int, "tokens": int, "world_size": int, "fingerprint": str, "layout": dict}
MANIFEST_TYPES |= {"files": dict, "digest": str}
SCRATCH, ASIDE, REMOVED = "tmp-", "tmp-replaced-", "tmp-removed-"
"""Prefixes of the names of folders that are being written, replaced or deleted."""
COLUMNS = ("checkpoint", "step", "tokens", "ranks", "layout", "size", "state")


def steps(root: Path) -> list[int]:
    """The steps of the checkpoints under `root`, valid or not, newest first."""
    found = [path.name.removeprefix("step-") for path in root.glob("step-*") if path.is_dir()]
    return sorted((int(number) for number in found if number.isdecimal() and str(int(number)) == number), reverse=True)


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def file_entry(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest; flushes the file to the disk while it is hashed."""
    with naming(path), open(path, "rb+") as file, ThreadPoolExecutor(1) as beside:
        flushed = beside.submit(os.fsync, file.fileno())
        entry = {"size": path.stat().st_size, "sha256": sha256(path)}
        flushed.result()
    return entry


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Adds to a manifest the digest of its own content, so that damage to the manifest itself is detected."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    return {**content, "digest": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def publish(scratch: Path, final: Path, manifest: Mapping[str, Any], *, keep: int) -> None:
    """Renames a written folder, whose files are on the disk, to the checkpoint `final`; then removes old checkpoints.

    `manifest` has the fields of `MANIFEST_TYPES` except the digest. The new checkpoint is always kept.
    """
    write_atomically(scratch / MANIFEST, json.dumps(seal(manifest), indent=1, allow_nan=False) + "\n")
    point("save.manifest")
    for folder in [path for path in scratch.rglob("*") if path.is_dir()] + [scratch]:
        fsync_folder(folder)
    point("save.synced")
    root, aside = final.parent, final.with_name(f"{ASIDE}{final.name.removeprefix('step-')}")
    if final.exists():
        # The old one is not deleted before the new one is in place; `recover` undoes this after a crash in between.
        os.rename(final, aside)
        point("save.aside")
    os.rename(scratch, final)
    fsync_folder(root)
    point("save.renamed")
    write_atomically(root / LATEST, final.name + "\n")
    point("save.latest")
    shutil.rmtree(aside, ignore_errors=True)
    remove_old(root, manifest["step"], keep)


def recover(root: Path) -> None:
    """After a crash: restores folders that were set aside, and removes folders that were never published."""
    for aside in root.glob(f"{ASIDE}*"):
        final = root / f"step-{aside.name.removeprefix(ASIDE)}"
        if not final.exists():
            os.rename(aside, final)
    for leftover in root.glob(f"{SCRATCH}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    for half_written in root.glob(f".{LATEST}.tmp"):  # only if it exists: the folder may be read-only
        half_written.unlink()
    newest = next((step for step in steps(root) if looks_whole(folder_of(root, step))), None)
    # After a kill between the two renames, `latest` would name the previous checkpoint permanently.
    line = f"{folder_of(root, newest).name}\n" if newest is not None else None
    if line and (not (root / LATEST).is_file() or (root / LATEST).read_bytes() != line.encode()):
        write_atomically(root / LATEST, line)


def remove_old(root: Path, newest: int, keep: int) -> None:
    """Removes checkpoints older than the `keep` newest complete ones; removes nothing if `newest` is incomplete.

    Checkpoints beyond `newest` are removed too: they are damaged, or the run was resumed from an earlier one.
    """
    if not looks_whole(folder_of(root, newest)):
        return
    kept = 0
    for step in steps(root):
        folder = folder_of(root, step)
        if step <= newest and kept < max(1, keep):
            kept += looks_whole(folder)
            continue
        # Renamed first, since a partly deleted folder must not look like a checkpoint.
        removed = root / f"{REMOVED}{folder.name}"
        shutil.rmtree(removed, ignore_errors=True)
        os.rename(folder, removed)
        point("save.removing")
        shutil.rmtree(removed, ignore_errors=True)


def looks_whole(folder: Path) -> bool:
    """Whether every file of the manifest exists with its size; contents are not read."""
    try:
        entries = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in entries.items())
    except (UserError, OSError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a checkpoint; raises a UserError if it is missing, malformed, or has been changed."""
    manifest = read_json(folder / MANIFEST)
    if not _sound(manifest):
        raise UserError(f"{folder / MANIFEST}: not a valid checkpoint manifest")
    if seal(manifest)["digest"] != manifest["digest"]:
        raise UserError(f"{folder / MANIFEST}: changed since it was saved")
    return manifest


def _sound(manifest: Any) -> bool:
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(k), t) for k, t in MANIFEST_TYPES.items()):
        return False
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
            return False
        # A name that points outside the folder would be compared with an unrelated file.
        if not isinstance(entry.get("sha256"), str) or Path(name).is_absolute() or ".." in Path(name).parts:
            return False
    return True


def verify(folder: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """Compares the files of a checkpoint with its manifest, and returns the manifest.

    All sizes are compared, and the contents of one of `parts` equal shares.

    Raises:
        UserError: a file is missing, has another size or content, or is not part of the checkpoint.
    """
    manifest = read_manifest(folder)
    try:
        _compare(folder, manifest["files"], part, parts)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None
    return manifest


def _compare(folder: Path, files: dict[str, Any], part: int, parts: int) -> None:
    unexpected = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    unexpected -= {*files, MANIFEST}
    if unexpected:
        # The engine finds its files by pattern.
        raise UserError(f"{folder / min(unexpected)}: not part of the checkpoint", remedy="move it elsewhere")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise UserError(f"{path}: missing from the checkpoint")
        if (size := path.stat().st_size) != entry["size"]:
            raise UserError(f"{path}: changed since it was saved", wanted=f"{entry['size']} bytes", got=size)
    # The largest files first, in turn, so that all shares take about the same time.
    for name in sorted(files, key=lambda name: (-files[name]["size"], name))[part::parts]:
        if sha256(folder / name) != files[name]["sha256"]:
            raise UserError(f"{folder / name}: changed since it was saved", wanted=f"sha256 {files[name]['sha256']}")


def no_valid_checkpoint(root: Path, problems: list[str]) -> UserError | None:
    """The error if checkpoints exist and none is valid; None if there has never been one."""
    if not problems and (root / LATEST).exists():
        problems = [f"{LATEST} exists, but no checkpoint does"]
    if not problems:
        return None
    return UserError(
        f"{root}: no checkpoint is valid",
        got="; ".join(problems),
        remedy="restore a valid checkpoint from a backup, or start over with --resume never",
    )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints (at least one) in a folder: one itself, a stage's checkpoints, or a run's output folder."""
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
    """The output of `describe` for several checkpoints, in Markdown."""
    return markdown_table(list(COLUMNS), [[_cell(name, row.get(name)) for name in COLUMNS] for row in described])


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if name == "layout":
        return ", ".join(f"{key} {each}" for key, each in value.items())
    return human_bytes(value) if name == "size" else str(value)


def verified(folder: Path) -> tuple[bool, str]:
    """Whether every file is what was saved, by checksum, and a sentence about it."""
    try:
        return True, f"{folder}: complete, {len(verify(folder)['files'])} files"
    except UserError as error:
        return False, f"{folder}: DAMAGED: {error.what}"
