"""Opens files below a job's folder. A job may put links and pipes there, so no part of a path is followed blindly."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_FOLLOW_NONE = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_below(folder: Path, path: str) -> int:
    """Opens a regular file for reading and returns its descriptor.

    Every folder on the way is opened by its parent's descriptor, so that no later change of the path matters.

    Args:
        folder: A folder of the service.
        path: The file, relative to the folder.

    Raises:
        FileNotFoundError: There is no such file; or the path leaves the folder, contains a link, or is no regular file.
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise FileNotFoundError(errno.ENOENT, "not a path inside the job", path)
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        for number, part in enumerate(parts, start=1):
            kind = os.O_NONBLOCK if number == len(parts) else os.O_DIRECTORY
            try:
                below = os.open(part, _FOLLOW_NONE | kind, dir_fd=handle)
            finally:
                os.close(handle)
            handle = below
    except (OSError, ValueError) as error:
        raise FileNotFoundError(errno.ENOENT, f"cannot be opened: {error}", path) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise FileNotFoundError(errno.ENOENT, "not a regular file", path)
    return handle


def read_below(folder: Path, path: str, limit: int = 1 << 24) -> bytes:
    """The content of a small file, up to `limit` bytes; raises FileNotFoundError as `open_below` does."""
    with open(open_below(folder, path), "rb") as file:
        return file.read(limit)
