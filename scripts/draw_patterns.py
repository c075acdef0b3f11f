"""Draws what every sparsity pattern keeps, from real masks on a real model's weights.

    python scripts/draw_patterns.py --model FOLDER          # an encoder's folder, such as MiniLM's

The scores are the weights' magnitudes, so that nothing need be trained; the masks are made as in pruning.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import transformers  # noqa: E402

from cook.base.errors import UserError, run_entry  # noqa: E402
from cook.families.encoder import open_encoder  # noqa: E402
from cook.report import drawing  # noqa: E402
from cook.sparsity.matrices import encoder_matrices  # noqa: E402
from cook.sparsity.pattern_masks import make_masks  # noqa: E402
from cook.sparsity.scores import ScoreAccumulator  # noqa: E402
from cook.sparsity.spec import NAMES, NUMBERED, PatternSpec  # noqa: E402

ROLES = ("query", "intermediate")
COLUMNS = 3


def main() -> None:
    """Parses, makes the masks, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="an encoder's folder")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--sparsity", type=float, default=75.0)
    parser.add_argument("--granularity", type=int, default=64)
    parser.add_argument("--output", default="results/bench/patterns_drawn.png")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    encoder = open_encoder(arguments.model, "classes", ("0", "1"), seed=0)
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.weights.items()}
    heads = encoder.config.num_attention_heads
    matrices = encoder_matrices(shapes, head_size=encoder.config.hidden_size // heads)
    shown = [m for role in ROLES for m in matrices if m.role == role and m.layer == arguments.layer]
    if len(shown) != len(ROLES):
        raise UserError(f"--layer: the model has no layer {arguments.layer}")
    scores = ScoreAccumulator(matrices, encoder.weights, score="magnitude").scores()
    size = min(min(m.shape) for m in shown)
    rows = -(-len(NAMES) // COLUMNS)
    figure = drawing.new_figure(4.6 * COLUMNS, 2.75 * rows)
    grid = figure.subplots(rows, COLUMNS * len(ROLES))
    for number, name in enumerate(NAMES):
        spec = PatternSpec(type=name, granularity=arguments.granularity, score="magnitude")
        masks = make_masks(scores, matrices, spec, sparsity=arguments.sparsity)
        place = divmod(number, COLUMNS)
        for column, matrix in enumerate(shown):
            axes = grid[place[0]][place[1] * len(ROLES) + column]
            kept_KN = masks[matrix.path].T[:size, :size]
            axes.imshow(kept_KN.numpy(), cmap="Blues", vmin=0, vmax=1.25, interpolation="none")
            axes.set_xticks([])
            axes.set_yticks([])
            title = f"{NUMBERED.index(name)}: {name}" if name in NUMBERED else name
            axes.set_title(
                title if column == 0 else matrix.role,
                loc="left",
                fontsize=10,
                fontweight="bold" if column == 0 else "normal",
            )
            share = 100 * (1 - float(masks[matrix.path].float().mean()))
            axes.set_xlabel(f"{matrix.role if column == 0 else ''} {share:.0f}% pruned".strip(), fontsize=8)
    asked = f"{arguments.sparsity:g}% asked for (2:4 is always 50%), G = {arguments.granularity}, blocks of 32"
    figure.suptitle(
        f"Kept weights (blue), inputs down and outputs across, {size} × {size} of a layer; {asked}",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    drawing.save(figure, arguments.output)
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    run_entry(main)
