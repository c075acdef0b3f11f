from __future__ import annotations

import random
import struct

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from cook.report import drawing
from cook.report.pruning_figures import plot_metric_curves, plot_sparsity_by_matrix, plot_structure


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    save = drawing.save
    monkeypatch.setattr(drawing, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def model(layers, heads, dims, seed=0):
    source = random.Random(seed)

    def block(size):
        return None if source.random() < 0.4 else [source.randint(0, 1) for _ in range(size)]

    return {"layers": [{"att": block(heads), "ffn": block(dims)} for _ in range(layers)]}


def patches(axes, colour):
    return [patch for patch in axes.patches if to_hex(patch.get_facecolor()) == colour.lower()]


@pytest.mark.parametrize(("layers", "heads", "dims"), [(8, 16, 700), (48, 32, 10240)])
def test_cells_and_bars_are_the_masks(tmp_path, drawn, layers, heads, dims):
    masks = model(layers, heads, dims)
    path = plot_structure(masks, tmp_path / "structure.png")
    left, right = drawn[0].axes
    attention = [layer["att"] for layer in masks["layers"]]
    shown = {(round(p.get_x() + 0.4), round(p.get_y() + 0.36)) for p in patches(left, drawing.BLUE)}
    assert shown == {(h, n) for n, row in enumerate(attention) if row for h, keep in enumerate(row) if keep}
    assert len(patches(left, "#ffffff")) == sum(row.count(0) for row in attention if row)
    assert len([p for p in left.patches if p.get_hatch()]) == attention.count(None)
    assert sum(text.get_text() == "attention removed" for text in left.texts) == attention.count(None)
    bars = {round(p.get_y() + 0.36): p.get_width() for p in patches(right, drawing.BLUE)}
    assert bars == {n: sum(layer["ffn"]) for n, layer in enumerate(masks["layers"]) if layer["ffn"]}
    image = imread(path)
    assert image.shape[0] / layers >= 19  # pixels a layer: its number stays readable
    assert len(np.unique(image[:, :, 0])) > 10
    renderer = drawn[0].canvas.get_renderer()
    for axes in (left, right):
        for text in (*axes.texts, axes.title, axes._left_title):
            box = text.get_window_extent(renderer)
            assert box.x0 >= 0 and box.x1 <= image.shape[1], text.get_text()
        ticks = [label.get_window_extent(renderer) for label in axes.get_xticklabels()]
        assert all(a.x1 < b.x0 for a, b in zip(ticks, ticks[1:], strict=False))


@pytest.mark.parametrize(
    "layers",
    [
        [],
        [{"att": None, "ffn": []}],
        [{"att": [1, 0], "ffn": [1]}],
        [{"att": [1, 1, 1], "ffn": [1, 0]}, {"att": [1], "ffn": [True, 0.0, 1.0]}],
    ],
)
def test_small_and_uneven_models(tmp_path, layers):
    assert len(np.unique(imread(plot_structure({"layers": layers}, tmp_path / "s.png"))[:, :, 0])) > 5


def test_soft_masks_are_refused(tmp_path):
    with pytest.raises(AssertionError, match="binary"):
        plot_structure({"layers": [{"att": [0.5], "ffn": None}]}, tmp_path / "s.png")


def size_of(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    return struct.unpack(">II", content[16:24])


def test_curves(tmp_path):
    curves = {f"pattern {n}": [(90.0, 60.0 + n), (50.0, 80.0), (75.0, 70.0)] for n in range(8)}
    path = plot_metric_curves(curves, tmp_path / "curve.png", metric="acc (%)", title="SST-2", dense=82.5)
    assert size_of(path) == (800, 480)
    single = plot_metric_curves({"one": [(50.0, 80.0)]}, tmp_path / "one.png", metric="acc", title="t")
    assert size_of(single) == (800, 480)


def test_the_heat_map_grows_with_the_model(tmp_path):
    roles = ("query", "key", "value", "attention_output", "intermediate", "output")
    sizes = []
    for layers in (2, 12):
        shares = {(layer, role): (layer + 1) / layers for layer in range(layers) for role in roles[: 6 - layer % 2]}
        sizes.append(size_of(plot_sparsity_by_matrix(shares, tmp_path / f"{layers}.png", title="t")))
    assert sizes[1][1] > sizes[0][1] and sizes[1][0] == sizes[0][0]
