from __future__ import annotations

import pytest
from matplotlib.image import imread

from cook.report import comparison, drawing
from cook.report.comparison import comparison_table, plot_comparison


def record(name, perplexity, parameters, prefill=None, decode=None, memory=None):
    return {
        "name": name,
        "loss": 3.0,
        "perplexity": perplexity,
        "bits_per_byte": 1.25,
        "parameters": parameters,
        "prefill_tokens_per_second": prefill,
        "decode_tokens_per_second": decode,
        "peak_memory_bytes": memory,
    }


RECORDS = [
    record("dense", 24.96, 134_515_008, 400.0, 12.0, 6.5e8),
    record("30% of dims, random", 804.7, 110_600_000, 480.0, 14.4, 5.9e8),
    record("30% of dims, learned", 28.4, 110_600_000, 481.0, None, 5.9e8),
]


@pytest.fixture
def drawn(monkeypatch):
    figures = []
    save = drawing.save
    monkeypatch.setattr(comparison.drawing, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def test_the_table_says_how_many_times_the_first():
    lines = comparison_table(RECORDS, same_tokens=True).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert cells[0][:4] == ["model", "loss", "perplexity", "parameters"]
    assert cells[0][4:] == ["prefill tokens/s", "decode tokens/s", "peak memory"]
    assert cells[2] == ["dense", "3.0000", "24.96", "135M", "400", "12", "650MB"]
    assert cells[3][2:] == ["804.70", "111M (0.82×)", "480 (1.20×)", "14.4 (1.20×)", "590MB (0.91×)"]
    assert cells[4][5] == "–"


def test_other_tokens_leave_perplexity_and_loss_out():
    head = comparison_table(RECORDS, same_tokens=False).splitlines()[0]
    assert "bits per byte" in head and "perplexity" not in head and "loss" not in head


def test_what_nobody_measured_has_no_column_and_a_broken_model_a_dash():
    records = [record("a", 5.0, 10), record("b", None, 10) | {"loss": None}]
    lines = comparison_table(records, same_tokens=True).splitlines()
    assert "prefill" not in lines[0] and "memory" not in lines[0]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["b", "–", "–", "10 (1.00×)"]


def test_bars_are_the_values_and_nothing_leaves_the_figure(tmp_path, drawn):
    path = plot_comparison(RECORDS, tmp_path / "c.png", same_tokens=True, title="test.txt: windowed, 512 tokens")
    (figure,) = drawn
    perplexity, parameters, _, decode, _ = figure.axes
    assert [bar.get_width() for bar in parameters.patches] == [r["parameters"] for r in RECORDS]
    assert [bar.get_width() for bar in decode.patches] == [12.0, 14.4]
    assert perplexity.get_xscale() == "log" and parameters.get_xscale() == "linear"
    assert [label.get_text() for label in perplexity.get_yticklabels()] == [r["name"] for r in RECORDS]
    low, high = perplexity.get_ylim()
    assert low > high, "the first model is on top"
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        frame = axes.get_window_extent(renderer)
        for text in axes.texts:
            box = text.get_window_extent(renderer)
            assert box.x0 >= frame.x0 and box.x1 <= frame.x1 + 4, f"{text.get_text()} runs out of its column"
    assert imread(path).shape[1] > 800


def test_one_broken_model_alone(tmp_path):
    plot_comparison([record("a", None, 10)], tmp_path / "c.png", same_tokens=True, title="t")
