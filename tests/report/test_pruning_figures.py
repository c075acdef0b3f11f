"""The figures of pattern pruning: files that open, with what they were asked to show."""

from __future__ import annotations

import struct

from cook.report.pruning_figures import plot_metric_curves, plot_sparsity_by_matrix


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
