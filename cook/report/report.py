"""The report of a whole run: one Markdown file with the ladder and the figures."""

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
    """One sentence below it."""
    path: Path
    """Its file, anywhere; the report links to it relatively."""


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
        folder: Made when missing.
        rows: The ladder, the dense model first.
        figures: Shown below the table in this order.
        title: The headline.
        notes: Paragraphs between the table and the figures: the machine, what was measured how.
    """
    path = Path(folder) / REPORT_NAME
    parts = [f"# {title}", ladder_table(rows), *notes]
    for figure in figures:
        link = quote(Path(os.path.relpath(figure.path.resolve(), path.parent.resolve())).as_posix())
        parts.append(f"![{figure.caption}]({link})\n\n{figure.caption}")
    write_atomically(path, "\n\n".join(parts) + "\n")
    return path
