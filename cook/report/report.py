"""The report of a run: one Markdown file with the table of models and the figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from cook.base.files import write_atomically
from cook.report.tables import LadderRow, ladder_table

REPORT_NAME = "report.md"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An image of the report."""

    caption: str
    """One sentence below the image."""
    path: Path
    """The image file. The report uses a relative link."""


def write_report(
    folder: str | Path,
    rows: Sequence[LadderRow],
    figures: Sequence[Figure] = (),
    *,
    title: str = "Report",
    notes: Sequence[str] = (),
) -> Path:
    """Writes `folder/report.md` and returns its path.

    Args:
        folder: The folder to write to. Made if missing.
        rows: The rows of the table, the dense model first.
        figures: The figures, shown below the table in this order.
        title: The title of the report.
        notes: Paragraphs between the table and the figures, for example about the machine and the measurements.
    """
    path = Path(folder) / REPORT_NAME
    parts = [f"# {title}", ladder_table(rows), *notes]
    for figure in figures:
        link = quote(Path(os.path.relpath(figure.path.resolve(), path.parent.resolve())).as_posix())
        parts.append(f"![{figure.caption}]({link})\n\n{figure.caption}")
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path
