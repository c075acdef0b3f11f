"""The content of TensorBoard event files, as bytes.

The caller writes the bytes, and so gets an error at once if the disk is full. TensorBoard's own writer uses a thread,
which would die with a traceback.
"""

from __future__ import annotations

import io
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

PREFIX = "events.out.tfevents."


def event_file_name(folder: Path) -> str:
    """Returns a name for the next file in `folder`. TensorBoard reads the files in the order of their names."""
    stamps = [path.name.removeprefix(PREFIX).split(".")[0] for path in folder.glob(f"{PREFIX}*")]
    stamp = max([int(time.time()), *(int(stamp) + 1 for stamp in stamps if stamp.isdecimal())])
    return f"{PREFIX}{stamp:010d}.{socket.gethostname()}.{os.getpid()}"


def beginning(purge_step: int | None) -> bytes:
    """Returns the first records of a file. TensorBoard hides `purge_step` and later steps of earlier files."""
    head = _record(Event(wall_time=time.time(), file_version="brain.Event:2"))
    if purge_step is None:
        return head
    start = SessionLog(status=SessionLog.START)
    return head + _record(Event(wall_time=time.time(), step=purge_step, session_log=start))


def scalar_event(step: int, values: Mapping[str, float]) -> bytes:
    """Returns the record of a step's scalars, given by tag."""
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
    return _record(Event(wall_time=time.time(), step=step, summary=summary))


def _record(event: Event) -> bytes:
    framed = io.BytesIO()
    RecordWriter(framed).write(event.SerializeToString())
    return framed.getvalue()
