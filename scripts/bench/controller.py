"""What the gates' own optimizer costs beside an accelerator: the part of a step in which nothing else can go on.

    python scripts/bench/controller.py [--gates 50000] [--step 50] [--free 12]

The accelerator is played by sleep: of a step of `--step` milliseconds, the last `--free` need no gates, because the
weights are updated and the teacher computes then. Steps without gates, with gates that move in the thread, and with
gates that move in line follow one another, a hundred of each: what a step leaves to do, the next one waits for.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import publish

from cook.pruning.controller import Constraint
from cook.pruning.gates import Gates
from cook.pruning.relaxation import Deterministic, HardConcrete, Relaxation

BLOCKS = 32


def one_budget(total: int, relaxation: Relaxation) -> Gates:
    """Gates of three kinds of units under one budget, as in a stage `joint_mask`."""
    size = total // BLOCKS
    costs = torch.rand(BLOCKS * size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kinds = tuple(number * 3 // len(costs) for number in range(len(costs)))
    budget = Constraint(name="all", start=0, costs=tuple((costs / costs.sum()).tolist()), target=0.3, kinds=kinds)
    return Gates({str(n): size for n in range(BLOCKS)}, [budget], steps=1000, seed=0, relaxation=relaxation)


def per_block(total: int, relaxation: Relaxation) -> Gates:
    """Gates with a budget in every block, as in a stage `ffn_mask`."""
    size = total // BLOCKS
    budgets = [
        Constraint(name=str(n), start=n * size, costs=(1 / size,) * size, target=0.3, groups=(str(n),))
        for n in range(BLOCKS)
    ]
    return Gates({str(n): size for n in range(BLOCKS)}, budgets, steps=1000, seed=0, relaxation=relaxation)


def run_step(gates: Gates | None, step: int, gradient: torch.Tensor, options: argparse.Namespace) -> None:
    if gates:
        gates.split(gates.draw(step))
    time.sleep((options.step - options.free) / 1e3)
    if gates:
        gates.update(gradient, step)
    time.sleep(options.free / 1e3)


def measured(
    name: str, make: Callable[[int, Relaxation], Gates], relaxation: Relaxation, options: argparse.Namespace
) -> dict[str, object]:
    """The share of a step that the gates add, and the milliseconds of their computation alone."""
    ms: dict[str, float] = {}
    for way in ("without", "in a thread", "in line", "alone"):
        gates, random = make(options.gates, relaxation), torch.Generator().manual_seed(1)
        gates._in_background, count = way == "in a thread", len(gates.openness())
        worth, times = torch.rand(count, generator=random), list[float]()
        for step in range(1, options.steps + 1):
            gradient = -worth + 0.3 * torch.randn(count, generator=random)
            begin = time.perf_counter()
            if way == "alone":
                gates.draw(step)
                gates.update(gradient, step)
            else:
                run_step(None if way == "without" else gates, step, gradient, options)
            times.append(time.perf_counter() - begin)
        gates.draw(options.steps + 1)  # waits for the thread
        ms[way] = 1e3 * statistics.median(times)
    row = {"gates": count, "budget": name, "relaxation": type(relaxation).__name__, "ms of computation": ms["alone"]}
    row |= {f"overhead {way}": ms[way] / ms["without"] - 1 for way in ("in a thread", "in line")}
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gates", type=int, default=50_000)
    parser.add_argument("--step", type=float, default=50.0, help="milliseconds of a step")
    parser.add_argument("--free", type=float, default=12.0, help="milliseconds of them that need no gates")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--output", help="the JSON; default: results/bench/controller.json")
    options = parser.parse_args()
    rows = [
        measured(name, make, relaxation, options)
        for name, make in (("one for all", one_budget), ("one per block", per_block))
        for relaxation in (Deterministic(), HardConcrete())
    ]
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    publish("controller", settings, rows, options.output)


if __name__ == "__main__":
    main()
