"""Downloads of the artifacts that the manifest of a job lists."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from cook.service.below import open_below, read_below

MANIFEST = "run/artifacts.json"


def read_manifest(folder: Path) -> list[dict[str, Any]]:
    """The artifacts of a job; none before it has succeeded. Entries of another shape are left out."""
    try:
        listed = json.loads(read_below(folder, MANIFEST))
    except (FileNotFoundError, ValueError, RecursionError):
        return []
    kinds = {"name": str, "path": str, "bytes": int, "sha256": str}
    return [
        {key: entry[key] for key in kinds}
        for entry in (listed if isinstance(listed, list) else ())
        if isinstance(entry, dict) and all(type(entry.get(key)) is kind for key, kind in kinds.items())
    ]


class Download(FileResponse):
    """The content of one artifact, or the ranges of it that a request names.

    Args:
        folder: The job's folder.
        name: A name of the manifest.

    Raises:
        FileNotFoundError: The manifest has no such name, or the file is not a regular file inside of the job's run.
    """

    def __init__(self, folder: Path, name: str):
        entry = next((entry for entry in read_manifest(folder) if entry["name"] == name), None)
        if entry is None:
            raise FileNotFoundError(name)
        self._handle = open_below(folder / "run", entry["path"])
        try:
            headers = {
                "ETag": f'"{entry["sha256"]}"',
                "X-Checksum-SHA256": entry["sha256"],
                "Content-Security-Policy": "sandbox; default-src 'none'",
            }
            super().__init__(
                f"/proc/self/fd/{self._handle}",  # the file that was checked, whatever its path leads to by now
                headers=headers,
                media_type="application/octet-stream",
                filename=Path(name).name,
                stat_result=os.fstat(self._handle),
            )
        except BaseException:
            os.close(self._handle)
            raise

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self._handle)
