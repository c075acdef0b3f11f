import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from cook.report import drawing
from cook.report.figures import plot_losses, plot_sparsity


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, whose artists can be asked what they show."""
    figures = []
    save = drawing.save
    monkeypatch.setattr(drawing, "save", lambda figure, path: figures.append(figure) or save(figure, path))
    return figures


def stage(steps, start=5.0, end=4.0, tokens=100, held_out=None):
    falling = [end + (start - end) * math.exp(-8 * s / steps) for s in range(steps)]
    records = [{"step": s + 1, "loss": loss, "tokens": (s + 1) * tokens} for s, loss in enumerate(falling)]
    return records + ([{"step": steps, "held_out_loss": held_out}] if held_out else [])


def mask_stage(steps, constraints):
    names = [f"heads.{c}" for c in range(constraints)]
    return [
        {
            "step": s,
            "loss": 4.0,
            "tokens": 100 * s,
            "expected_sparsity": {name: 0.5 + 0.1 * (i % 2) for i, name in enumerate(names)},
            "target_sparsity": dict.fromkeys(names, 0.75),
            "lambda": {name: {"lambda1": -1.0, "lambda2": float(i)} for i, name in enumerate(names)},
        }
        for s in range(1, steps + 1)
    ]


def colours(path):
    pixels = imread(path)[:, :, :3].reshape(-1, 3)
    return len(np.unique((pixels * 255).astype(np.uint8), axis=0))


def lines(axes, colour, style):
    return [line for line in axes.get_lines() if to_hex(line.get_color()) == colour.lower() and line.get_ls() == style]


def texts_inside(figure):
    renderer = figure.canvas.get_renderer()
    width, height = figure.bbox.width, figure.bbox.height
    found = [text for axes in figure.axes for text in axes.texts] + figure.texts
    boxes = [text.get_window_extent(renderer) for text in found if text.get_text()]
    return all(b.x0 >= -1 and b.y0 >= -1 and b.x1 <= width + 1 and b.y1 <= height + 1 for b in boxes)


def test_stages_follow_each_other_and_held_out_points_stand_at_their_ends(tmp_path, drawn):
    logs = [("pretrain", stage(60, held_out=4.1)), ("layer_mask", stage(30, held_out=4.5)), ("finetune", stage(30))]
    path = plot_losses(logs, tmp_path / "loss.png")
    assert colours(path) > 50
    (axes,) = drawn[0].axes
    points = [line for line in axes.get_lines() if line.get_marker() == "D"]
    assert [(p.get_xdata()[0], p.get_ydata()[0]) for p in points] == [(6000, 4.1), (9000, 4.5)]
    smoothed = [line for line in lines(axes, drawing.BLUE, "-") if line.get_linewidth() > 1]
    assert [(line.get_xdata()[0], line.get_xdata()[-1]) for line in smoothed] == [
        (100, 6000),
        (6100, 9000),
        (9100, 12000),
    ]
    assert axes.get_xlim() == (0, 12000)
    assert {"pretrain  4.100", "layer_mask  4.500", "finetune"} <= {text.get_text() for text in axes.texts}


def test_the_random_baseline_starts_with_its_stage_and_else_after_the_one_before(tmp_path, drawn):
    logs = [("pretrain", stage(60)), ("mask", stage(30)), ("finetune", stage(30))]
    baseline = [("finetune", stage(20, held_out=6.0)), ("more", stage(40))]
    plot_losses(logs, tmp_path / "a.png", baseline)
    plot_losses(logs, tmp_path / "b.png", [("random", stage(20))])
    starts = [[line.get_xdata()[0] for line in lines(figure.axes[0], drawing.VERMILION, "--")] for figure in drawn]
    assert starts == [[9100, 11100], [6100]]
    assert drawn[0].axes[0].get_xlim() == (0, 15000)  # the baseline that runs longer is not cut


def test_a_first_fall_does_not_squeeze_the_rest(tmp_path, drawn):
    plot_losses([("pretrain", stage(500, start=11.0, end=4.0)), ("mask", stage(200, 4.5, 4.2))], tmp_path / "loss.png")
    axes = drawn[0].axes[0]
    assert axes.get_ylim()[1] < 7
    assert any(text.get_text() == "↑ from 11.00" for text in axes.texts)
    # Nothing after the fall is cut off.
    plot_losses([("pretrain", stage(500, 11.0, 4.0)), ("mask", stage(200, 12.0, 4.2))], tmp_path / "loss.png")
    assert drawn[1].axes[0].get_ylim()[1] > 12


@pytest.mark.parametrize("first", [40, 4000])
def test_names_of_many_short_stages_do_not_overlap_or_leave_the_figure(tmp_path, drawn, first):
    logs = [("pretrain", stage(first, held_out=4.0))]
    logs += [(f"att_finetune_{i}", stage(4, held_out=4.0)) for i in range(8)]
    plot_losses(logs, tmp_path / "loss.png")
    (axes,) = drawn[0].axes
    names = sorted(text.get_position()[0] for text in axes.texts if "finetune" in text.get_text())
    assert len(names) == 8 and min(np.diff(names)) > 0.0339
    assert texts_inside(drawn[0])
    # Every stage is wide enough to be seen, though it has a thousandth of the first one's tokens.
    scaled = axes.xaxis.get_transform().transform(np.array([first * 100.0, first * 100.0 + 400]))
    edges = [axes.transLimits.transform((x, 0))[0] for x in scaled]
    assert edges[1] - edges[0] > 0.03


@pytest.mark.parametrize(
    "logs",
    [
        [],
        [("a", [])],
        [("a", [{"step": 1, "loss": None, "tokens": 5}])],
        [("a", stage(1))],
        [("a", []), ("b", stage(2)), ("c", [])],
        [("a", [{"step": 3, "held_out_loss": 4.0}])],
        [("a", stage(3)), ("b", stage(1))],
        [("a", [{"step": 1, "loss": 4.0, "tokens": 0}])],
    ],
)
def test_short_and_empty_logs_are_drawn_too(tmp_path, logs):
    assert colours(plot_losses(logs, tmp_path / "loss.png", logs)) > 3
    assert colours(plot_sparsity(logs, tmp_path / "sparsity.png")) > 3


def test_sparsity_has_a_column_a_mask_stage(tmp_path, drawn):
    logs = [("pretrain", stage(10)), ("layer_mask", mask_stage(20, 1)), ("att_mask", mask_stage(20, 48))]
    assert colours(plot_sparsity(logs, tmp_path / "sparsity.png")) > 50
    above_one, above_many, below_one, below_many = drawn[0].axes
    assert [above_one.get_title(), above_many.get_title()] == ["layer_mask: 1 constraint", "att_mask: 48 constraints"]
    assert len(lines(above_one, drawing.BLUE, "-")) == 1
    assert len(lines(above_many, drawing.BLUE, "-")) == 48 + 1
    mean = lines(above_many, drawing.BLUE, "-")[-1]
    assert mean.get_linewidth() == 2 and list(mean.get_ydata()) == pytest.approx([0.55] * 20)
    (target,) = lines(above_many, drawing.VERMILION, "--")
    assert list(target.get_ydata()) == [0.75] * 20
    assert [text.get_text() for text in below_one.get_legend().get_texts()] == ["λ1", "λ2"]
    assert lines(below_many, drawing.PURPLE, "-")[-1].get_ydata()[0] == pytest.approx(23.5)


def test_sparsity_with_plain_lambdas_nulls_and_one_record(tmp_path, drawn):
    record = {"step": 1, "expected_sparsity": {"a": None, "b": 0.2}, "target_sparsity": {}, "lambda": {"a": 2.0}}
    plot_sparsity([("s", [record])], tmp_path / "sparsity.svg")
    assert [text.get_text() for text in drawn[0].axes[1].get_legend().get_texts()] == ["λ"]
    assert (tmp_path / "sparsity.svg").read_text().startswith("<?xml")


def test_long_logs_are_thinned_to_their_end(tmp_path, drawn):
    plot_sparsity([("s", mask_stage(12345, 2))], tmp_path / "sparsity.png")
    steps = lines(drawn[0].axes[0], drawing.BLUE, "-")[-1].get_xdata()
    assert 1000 <= len(steps) <= 2000 and steps[-1] == 12345 and steps[0] < 20
