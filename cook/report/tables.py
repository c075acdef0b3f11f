"""Numbers, durations and tables as text. Tables are aligned in a terminal and valid Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len  # a wide (Chinese) character takes two cells

_UNITS = ("", "k", "M", "B", "T")


def human_count(value: float) -> str:
    """Formats a count: exact if whole and below 1000, else three digits and a decimal unit: 12.3k, 7.42M, 9.39B."""
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) < 1000 and float(value).is_integer():
        return str(int(value))
    size = abs(value)
    # Rounding comes before the choice of the unit, so that 999,950 is 1.00M and never 1000k.
    rounded = float(f"{size:.2e}") if size >= 1000 or size >= 999.5 else size
    power = min(int(math.log10(rounded) + 1e-9) // 3, len(_UNITS) - 1) if rounded >= 1 else 0
    scaled = rounded / 1000**power
    digits = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
    return f"{'-' if value < 0 else ''}{scaled:.{digits}f}{_UNITS[power]}"


def human_bytes(value: float) -> str:
    """Formats a number of bytes in decimal units: 999B, 145MB, 1.42GB."""
    text = human_count(value)
    return f"{text[:-1]}GB" if text.endswith("B") else f"{text}B"


def human_duration(seconds: float) -> str:
    """Formats a time in seconds as m:ss, h:mm:ss or "3d 04:05:06". A non-finite time is "-:--"."""
    if not math.isfinite(seconds):
        return "-:--"
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02d}:{minute:02d}:{second:02d}"
    return f"{hour}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class LadderRow:
    """One row of the table of models, which lists them from the dense model to the smallest."""

    model: str
    """Name of the model."""
    att_layers: int
    """Number of remaining attention blocks."""
    ffn_layers: int
    """Number of remaining FFN blocks."""
    heads: str
    """Heads per attention block: "4", or "2–6" if blocks differ."""
    dim_ff: str
    """FFN dimension per block: "350", or a range if blocks differ."""
    head_dim: tuple[int, int] | None = None
    """Dimensions per head, after and before, if some are removed."""
    hidden: tuple[int, int] | None = None
    """The hidden size, after and before, if it is pruned."""
    parameters: int
    """Total number of parameters, including embeddings."""
    held_out_loss: float | None
    """Mean held-out loss in nats per token. None if it was not measured."""
    tokens_per_second: float | None
    """Speed. None if it was not measured. Only values from the same machine and run can be compared."""


LADDER_HEADERS = ("model", "att layers", "ffn layers", "heads", "dim_ff", "parameters", "held-out loss", "tokens/s")


def ladder_cells(row: LadderRow) -> tuple[str, ...]:
    """Returns the cells of one row, in the order of `LADDER_HEADERS`."""
    return (
        row.model,
        str(row.att_layers),
        str(row.ffn_layers),
        row.heads,
        row.dim_ff,
        human_count(row.parameters),
        MISSING if row.held_out_loss is None else f"{row.held_out_loss:.3f}",
        MISSING if row.tokens_per_second is None else human_count(row.tokens_per_second),
    )


def ladder_table(rows: Sequence[LadderRow]) -> str:
    """Formats the models as a Markdown table with aligned columns, without a final newline.

    The size of heads and the hidden size have columns if some model has others than the first.
    """
    headers, cells = list(LADDER_HEADERS), [list(ladder_cells(row)) for row in rows]
    for header, key in (("hidden", "hidden"), ("head dims", "head_dim")):
        sizes = [getattr(row, key) for row in rows]
        if before := next((size[1] for size in sizes if size), None):
            headers.insert(5, header)
            for row, size in zip(cells, sizes, strict=True):
                row.insert(5, str(size[0] if size else before))
    return markdown_table(headers, cells)


def range_text(sizes: Sequence[int]) -> str:
    """Formats the sizes of all blocks: "4" if they are equal, "2–6" if they differ, a dash if there are none."""
    if not sizes:
        return MISSING
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low}–{high}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a Markdown table with padded cells: the first column left-aligned, the others right-aligned."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (headers, *rows)]
    widths = _widths(escaped)
    ruler = [("-" * width) if column == 0 else ("-" * (width - 1) + ":") for column, width in enumerate(widths)]
    lines = [_padded(row, widths) for row in escaped]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], ruler, *lines[1:]))


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats aligned columns without truncation, for logs and pipes."""
    texts = [[cell.replace("\n", " ") for cell in row] for row in (headers, *rows)]
    widths = _widths(texts)
    lines = [_padded(row, widths) for row in texts]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    assert all(len(row) == len(rows[0]) for row in rows), "the rows of a table differ in length"
    return [max(3, *(cell_len(row[column]) for row in rows)) for column in range(len(rows[0]))]


def _padded(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    pads = [" " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
    return [cell + pad if column == 0 else pad + cell for column, (cell, pad) in enumerate(zip(row, pads, strict=True))]
