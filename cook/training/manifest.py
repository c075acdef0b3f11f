"""A folder of checkpoints: which there are, which are whole, how one is published and how old ones go.

A checkpoint is a folder `step-<n>` whose manifest names every file with its size and SHA-256. It appears by a rename,
so it is there whole or not at all; `latest` names the newest for people and other tools, and is never followed here.
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

MANIFEST = "manifest.json"
LATEST = "latest"
MANIFEST_TYPES = {
    "stage": str,
    "step": int,
    "tokens": int,
    "world_size": int,
    "fingerprint": str,
    "layout": dict,
    "files": dict,
    "digest": str,
}
SCRATCH, ASIDE, REMOVED = "tmp-", "tmp-replaced-", "tmp-removed-"
"""How the names of folders begin that are being written, replaced, deleted."""


def steps(root: Path) -> list[int]:
    """The steps of the checkpoints under `root`, valid or not, newest first."""
    found = [path.name.removeprefix("step-") for path in root.glob("step-*") if path.is_dir()]
    return sorted((int(number) for number in found if number.isdecimal() and str(int(number)) == number), reverse=True)


def folder_of(root: Path, step: int) -> Path:
    return root / f"step-{step}"


def file_entry(path: Path) -> dict[str, Any]:
    """A file's place in a manifest, once its content is on the disk: the disk and the processor work side by side."""
    with ThreadPoolExecutor(1) as beside:
        flushed = beside.submit(_flush, path)
        entry = {"size": path.stat().st_size, "sha256": sha256(path)}
        flushed.result()
    return entry


def _flush(path: Path) -> None:
    with naming(path), open(path, "rb+") as file:
        os.fsync(file.fileno())


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the digest of all else that it says: it is a file too, and may be damaged like the others."""
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return {**said, "digest": hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()}


def publish(scratch: Path, final: Path, manifest: Mapping[str, Any], *, keep: int) -> None:
    """Makes a written folder the checkpoint `final`, then lets the oldest ones beyond `keep` go.

    Args:
        scratch: The folder, every file of it on the disk.
        final: Its name from now on.
        manifest: What `MANIFEST_TYPES` lists, but for the digest.
        keep: How many of the newest checkpoints stay; at least the new one does.
    """
    write_atomically(scratch / MANIFEST, json.dumps(seal(manifest), indent=1, allow_nan=False) + "\n")
    point("save.manifest")
    for folder in [path for path in scratch.rglob("*") if path.is_dir()] + [scratch]:
        fsync_folder(folder)
    point("save.synced")
    root, aside = final.parent, final.with_name(f"{ASIDE}{final.name.removeprefix('step-')}")
    if final.exists():
        # Never deleted before the other is in its place: `recover` undoes this where a crash falls between the two.
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
    """Puts back what a crash has left set aside, and clears away what was never published."""
    for aside in root.glob(f"{ASIDE}*"):
        final = root / f"step-{aside.name.removeprefix(ASIDE)}"
        if not final.exists():
            os.rename(aside, final)
    for rubbish in root.glob(f"{SCRATCH}*"):
        shutil.rmtree(rubbish, ignore_errors=True)
    for half_written in root.glob(f".{LATEST}.tmp"):  # only if it is there: a read-only folder may need no order
        half_written.unlink()
    newest = [folder.name for folder in (folder_of(root, step) for step in steps(root)) if looks_whole(folder)][:1]
    # Killed between the renaming of a folder and that of `latest`, it would name the one before for good.
    if newest and (not (root / LATEST).is_file() or (root / LATEST).read_bytes() != f"{newest[0]}\n".encode()):
        write_atomically(root / LATEST, f"{newest[0]}\n")


def remove_old(root: Path, newest: int, keep: int) -> None:
    """Removes what is older than the `keep` newest that look whole; nothing goes if `newest` itself does not.

    Beyond `newest` lie those of a future that was given up: damaged ones, or more than was gone back to.
    """
    if not looks_whole(folder_of(root, newest)):
        return
    kept = 0
    for step in steps(root):
        folder = folder_of(root, step)
        if step <= newest and kept < max(1, keep):
            kept += looks_whole(folder)
            continue
        # Renamed first: a half-deleted folder must not look like a checkpoint.
        doomed = root / f"{REMOVED}{folder.name}"
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(folder, doomed)
        point("save.removing")
        shutil.rmtree(doomed, ignore_errors=True)


def looks_whole(folder: Path) -> bool:
    """Whether every file of the manifest is there in its size; contents are not read."""
    try:
        entries = read_manifest(folder)["files"]
        return all((folder / name).stat().st_size == entry["size"] for name, entry in entries.items())
    except (UserError, OSError):
        return False


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, as it stands.

    Raises:
        UserError: there is none, it is not one, or it has been changed.
    """
    manifest = read_json(folder / MANIFEST)
    if not _sound(manifest):
        raise UserError(f"{folder / MANIFEST}: not a checkpoint's manifest")
    if seal(manifest)["digest"] != manifest["digest"]:
        raise UserError(f"{folder / MANIFEST}: not what was saved")
    return manifest


def _sound(manifest: Any) -> bool:
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(k), t) for k, t in MANIFEST_TYPES.items()):
        return False
    for name, entry in manifest["files"].items():
        if not isinstance(entry, dict) or not isinstance(entry.get("size"), int):
            return False
        # A name that leads out of the folder would be compared with a file elsewhere.
        if not isinstance(entry.get("sha256"), str) or Path(name).is_absolute() or ".." in Path(name).parts:
            return False
    return True


def verify(folder: Path, part: int = 0, parts: int = 1) -> dict[str, Any]:
    """The manifest of a checkpoint, after the files have been compared with it.

    Args:
        folder: The checkpoint.
        part: Which of `parts` equal shares of the files' contents is compared; their sizes all are.
        parts: In how many the contents are shared out.

    Raises:
        UserError: a file is missing, of another size or another content, or does not belong here.
    """
    try:
        return _compared(folder, read_manifest(folder), part, parts)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read: {error.strerror}") from None


def _compared(folder: Path, manifest: dict[str, Any], part: int, parts: int) -> dict[str, Any]:
    files = manifest["files"]
    strange = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    strange -= {*files, MANIFEST}
    if strange:
        # The engine looks its files up by pattern.
        raise UserError(f"{folder / min(strange)}: not part of the checkpoint", remedy="move it elsewhere")
    for name, entry in files.items():
        path = folder / name
        if not path.is_file() or path.is_symlink():
            raise UserError(f"{path}: missing from the checkpoint")
        if path.stat().st_size != entry["size"]:
            raise UserError(f"{path}: not what was saved", wanted=f"{entry['size']} bytes", got=path.stat().st_size)
    # The largest files first, dealt out in turn: the shares take about as long.
    for name in sorted(files, key=lambda name: (-files[name]["size"], name))[part::parts]:
        if sha256(folder / name) != files[name]["sha256"]:
            raise UserError(f"{folder / name}: not what was saved", wanted=f"sha256 {files[name]['sha256']}")
    return manifest


def none_to_go_on_from(root: Path, problems: list[str]) -> UserError | None:
    """The error where checkpoints were published and none is valid; None where none has ever been."""
    if not problems and (root / LATEST).exists():
        problems = [f"{LATEST} is there, the checkpoints are not"]
    if not problems:
        return None
    return UserError(
        f"{root}: no checkpoint is valid",
        got="; ".join(problems),
        remedy="restore a good copy, or start over with --resume never",
    )
