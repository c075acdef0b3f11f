"""Tables as text that is aligned in a terminal and renders as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len  # a wide (Chinese) character takes two cells

from cook.report.human import human_count

MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class LadderRow:
    """One model of the ladder, from the dense one down to the smallest."""

    model: str
    """Its name."""
    att_layers: int
    """Attention blocks that are left."""
    ffn_layers: int
    """FFN blocks that are left."""
    heads: str
    """Heads in an attention block: "4", or "2–6" where blocks differ."""
    dim_ff: str
    """Inner width of an FFN block: "350", or a range where blocks differ."""
    parameters: int
    """All parameters, embeddings included."""
    held_out_loss: float | None
    """Mean loss a token on text kept out of training, in nats; None if it was not measured."""
    tokens_per_second: float | None
    """Speed; None if it was not measured. Compare only numbers of one machine and run."""


LADDER_HEADERS = ("model", "att layers", "ffn layers", "heads", "dim_ff", "parameters", "held-out loss", "tokens/s")


def ladder_cells(row: LadderRow) -> tuple[str, ...]:
    """The texts of one row, in the order of `LADDER_HEADERS`."""
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
    """The ladder as a Markdown table whose columns are also aligned as plain text; ends without a newline."""
    return markdown_table(LADDER_HEADERS, [ladder_cells(row) for row in rows])


def range_text(sizes: Sequence[int]) -> str:
    """The size of all blocks in one text: "4" when they agree, "2–6" when not, a dash when there are none."""
    if not sizes:
        return MISSING
    low, high = min(sizes), max(sizes)
    return str(low) if low == high else f"{low}–{high}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with padded cells: the first column to the left, the others to the right."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (headers, *rows)]
    widths = _widths(escaped)
    ruler = [("-" * width) if column == 0 else ("-" * (width - 1) + ":") for column, width in enumerate(widths)]
    lines = [_padded(row, widths) for row in escaped]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (lines[0], ruler, *lines[1:]))


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns under their headers, nothing cut: for logs and pipes."""
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
