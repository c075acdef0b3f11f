"""The figure of the kept structure, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cook.report import drawing
from cook.report.drawing import BLUE, GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_structure(structure: Mapping[str, Any], path: str | Path) -> Path:
    """Draws the kept parts of every layer: heads as cells, and the FFN as a bar.

    Args:
        structure: `{"layers": [{"att": [0 or 1, …] or None, "ffn": [0 or 1, …] or None}, …]}`, first layer first. 1 is
            a kept head or dimension. None or an empty list is a removed block.
        path: The image file.

    Returns:
        The path.
    """
    layers = structure["layers"]
    if not layers:
        return drawing.message_figure("Structure: the model has no layers", path)
    from matplotlib.patches import Patch

    row_inches = 0.34 if len(layers) <= 12 else 0.25 if len(layers) <= 24 else 0.19
    figure = drawing.new_figure(11, 1.9 + max(1.0, row_inches * len(layers)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    _draw_heads(left, [_kept(layer["att"]) for layer in layers])
    _draw_dims(right, [_kept(layer["ffn"]) for layer in layers])
    left.set_ylim(-0.6, len(layers) - 0.4)
    left.set_yticks(range(len(layers)), [str(index) for index in range(len(layers))], fontsize=8)
    left.set_ylabel("layer (0 is the first)")
    for axes in (left, right):
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
    handles = [
        Patch(facecolor=BLUE, edgecolor=BLUE, label="kept"),
        Patch(facecolor="white", edgecolor=GREY, label="pruned"),
        Patch(facecolor="#F4F4F4", edgecolor=GREY, hatch="////", label="whole block removed"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Kept structure by layer", x=0.01, ha="left", fontweight="bold")
    return drawing.save(figure, path)


def _kept(units: Sequence[float] | None) -> list[int]:
    units = [] if units is None else list(units)
    assert all(unit in (0, 1) for unit in units), "the structure is drawn of binary masks"
    return [int(unit) for unit in units]


def _draw_heads(axes: Axes, rows: Sequence[Sequence[int]]) -> None:
    widest = max(map(len, rows)) or 1
    for layer, heads in enumerate(rows):
        for head, keep in enumerate(heads):
            _cell(axes, head - 0.4, layer, 0.8, filled=keep == 1)
        if not heads:
            _removed(axes, layer, -0.4, widest - 0.2, "attention removed")
        axes.text(widest - 0.2, layer, f"{sum(heads)}" if heads else "–", va="center", fontsize=8, color=INK)
    axes.set_xlim(-0.6, 1.06 * widest - 0.2)
    step = 1 if widest <= 16 else 2
    axes.set_xticks(range(0, widest, step), [str(head) for head in range(0, widest, step)], fontsize=8)
    axes.set_xlabel("head (the number at the end is the number of kept heads)")
    axes.set_title(_summary("attention", "heads", rows), fontsize=10, loc="left")


def _draw_dims(axes: Axes, rows: Sequence[Sequence[int]]) -> None:
    from matplotlib.ticker import MaxNLocator

    widest = max(map(len, rows)) or 1
    for layer, dims in enumerate(rows):
        if dims:
            _cell(axes, 0, layer, len(dims), filled=False)
            _cell(axes, 0, layer, sum(dims), filled=True)
        else:
            _removed(axes, layer, 0, widest, "FFN removed")
        text = f"{sum(dims)} / {len(dims)}" if dims else "–"
        axes.text(widest * 1.02, layer, text, va="center", fontsize=8, color=INK)
    axes.set_xlim(-0.01 * widest, widest * 1.25)
    ticks = MaxNLocator(nbins=5, integer=True).tick_values(0, widest)
    axes.set_xticks([tick for tick in ticks if 0 <= tick <= widest])
    axes.set_xlabel("dimensions of the FFN (dim_ff)")
    axes.set_title(_summary("FFN", "dims", rows), fontsize=10, loc="left")


def _cell(axes: Axes, x: float, layer: int, width: float, *, filled: bool) -> None:
    from matplotlib.patches import Rectangle

    face, edge = (BLUE, BLUE) if filled else ("white", GREY)
    axes.add_patch(Rectangle((x, layer - 0.36), width, 0.72, facecolor=face, edgecolor=edge, linewidth=0.8))


def _removed(axes: Axes, layer: int, x: float, width: float, label: str) -> None:
    from matplotlib.patches import Rectangle

    place = (x, layer - 0.36)
    axes.add_patch(Rectangle(place, width, 0.72, facecolor="#F4F4F4", edgecolor="#BBBBBB", linewidth=0.8, hatch="////"))
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.text(x + width / 2, layer, label, ha="center", va="center", fontsize=8, color=INK, bbox=box)


def _summary(block: str, units: str, rows: Sequence[Sequence[int]]) -> str:
    kept, total = sum(map(sum, rows)), sum(map(len, rows))
    blocks = sum(1 for row in rows if row)
    return f"{block}: {blocks} of {len(rows)} blocks, {kept:,} of {total:,} {units}"
