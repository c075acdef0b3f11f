"""Figures of what was pruned: the kept structure, the sparsity of each matrix, a task's metric against sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cook.report import drawing
from cook.report.drawing import BLUE, GREY, INK
from cook.report.tables import human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_structure(structure: Mapping[str, Any], path: str | Path) -> Path:
    """Draws the kept parts of every layer: heads as cells, and the FFN as a bar.

    Args:
        structure: `{"layers": [{"att": [0 or 1, …] or None, "ffn": [0 or 1, …] or None}, …]}`, first layer first. 1 is
            a kept head or dimension. None or an empty list is a removed block.
        path: The image file, which is also returned.
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


def _cell(axes: Axes, x: float, layer: int, width: float, *, filled: bool, **look: Any) -> None:
    from matplotlib.patches import Rectangle

    colours = {"facecolor": BLUE if filled else "white", "edgecolor": BLUE if filled else GREY}
    axes.add_patch(Rectangle((x, layer - 0.36), width, 0.72, linewidth=0.8, **colours | look))


def _removed(axes: Axes, layer: int, x: float, width: float, label: str) -> None:
    _cell(axes, x, layer, width, filled=False, facecolor="#F4F4F4", edgecolor="#BBBBBB", hatch="////")
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.text(x + width / 2, layer, label, ha="center", va="center", fontsize=8, color=INK, bbox=box)


def _summary(block: str, units: str, rows: Sequence[Sequence[int]]) -> str:
    kept, total = sum(map(sum, rows)), sum(map(len, rows))
    blocks = sum(1 for row in rows if row)
    return f"{block}: {blocks} of {len(rows)} blocks, {kept:,} of {total:,} {units}"


def plot_spending(rows: Sequence[tuple[str, int, int, int]], path: str | Path) -> Path:
    """Draws how many parameters went with each kind of units, as bars.

    Args:
        rows: Name, units before and after, and parameters removed.
        path: The image file, which is also returned.
    """
    figure = drawing.new_figure(8, 1.4 + 0.5 * len(rows))
    axes = figure.subplots()
    total = max(1, sum(parameters for *_, parameters in rows))
    shares = [100 * parameters / total for *_, parameters in rows]
    axes.barh(range(len(rows)), shares, color=BLUE, height=0.6)
    for number, (_, before, after, parameters) in enumerate(rows):
        text = f" {before:,} → {after:,}, {human_count(-parameters)} parameters" if parameters else " nothing"
        axes.text(max(0.0, shares[number]), number, text, va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(rows)), [name for name, *_ in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.5 * max(1.0, *shares))
    axes.set_xlabel("share of the removed parameters (%)")
    axes.set_title("What the budget was spent on", loc="left", fontweight="bold", fontsize=11)
    drawing.tidy(axes)
    return drawing.save(figure, path)


Curve = Sequence[tuple[float, float]]
"""Points (sparsity in percent, metric)."""

COLOURS = (BLUE, drawing.VERMILION, drawing.GREEN, drawing.ORANGE, drawing.PURPLE, INK, GREY)
MARKERS = "osD^vPX"


def plot_metric_curves(
    curves: Mapping[str, Curve], path: str | Path, *, metric: str, title: str, dense: float | None = None
) -> Path:
    """Draws a metric against sparsity, with one line per curve and a dashed line for the dense model.

    Args:
        curves: Points (sparsity in percent, metric) by name.
        path: The PNG file, which is also returned.
        metric: Label of the vertical axis.
        title: Title of the figure.
        dense: The metric of the dense model, if known.
    """
    figure = drawing.new_figure(8.0, 4.8)
    axes = figure.subplots()
    if dense is not None:
        axes.axhline(dense, color=drawing.GREY, linestyle="--", linewidth=1.2, label=f"dense ({dense:.1f})")
    for number, (name, points) in enumerate(curves.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=marker, markersize=5, label=name)
    axes.set_xlabel("sparsity of the pruned matrices (%)")
    axes.set_ylabel(metric)
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    drawing.tidy(axes)
    axes.legend(fontsize=9, framealpha=0.9)
    return drawing.save(figure, path)


def plot_sparsity_by_matrix(sparsity: Mapping[tuple[int, str], float], path: str | Path, *, title: str) -> Path:
    """Draws the sparsity of every matrix, from 0 to 1 by layer and role, as a table. Returns the path of the PNG."""
    layers = sorted({layer for layer, _ in sparsity})
    roles = list(dict.fromkeys(role for _, role in sparsity))
    values = [[sparsity.get((layer, role), float("nan")) for role in roles] for layer in layers]
    figure = drawing.new_figure(1.6 + 1.15 * len(roles), 1.6 + 0.42 * len(layers))
    axes = figure.subplots()
    image = axes.imshow(values, cmap="cividis_r", vmin=0.0, vmax=1.0, aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                colour = "white" if value > 0.55 else drawing.INK
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(roles)), [role.replace("_", "\n") for role in roles], fontsize=9)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=9)
    axes.set_ylabel("layer")
    axes.set_title(title, loc="left", fontweight="bold", fontsize=11)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="pruned share", fraction=0.05)
    return drawing.save(figure, path)
