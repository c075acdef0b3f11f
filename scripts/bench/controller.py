"""What the gates' own optimizer costs beside an accelerator: the part of a step in which nothing else can go on.

    python scripts/bench/controller.py [--gates 50000] [--step 50] [--free 12]

The accelerator is played by sleep: of a step of `--step` milliseconds, the last `--free` need no gates, because the
weights are updated and the teacher computes then. Steps with gates, that move in the thread or in line, take turns with
steps without any; medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import publish

from cook.pruning.controller import Constraint
from cook.pruning.gates import Gates
from cook.pruning.relaxation import Deterministic, HardConcrete

BLOCKS = 32


def one_budget(total: int, relaxation: Deterministic | HardConcrete) -> Gates:
    """Gates of three kinds of units under one budget, as in a stage `joint_mask`."""
    size = total // BLOCKS
    costs = torch.rand(BLOCKS * size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kinds = tuple(number * 3 // len(costs) for number in range(len(costs)))
    budget = Constraint(name="all", start=0, costs=tuple((costs / costs.sum()).tolist()), target=0.3, kinds=kinds)
    return Gates({str(n): size for n in range(BLOCKS)}, [budget], steps=1000, seed=0, relaxation=relaxation)


def per_block(total: int, relaxation: Deterministic | HardConcrete) -> Gates:
    """Gates with a budget in every block, as in a stage `ffn_mask`."""
    size = total // BLOCKS
    budgets = [
        Constraint(name=str(n), start=n * size, costs=(1 / size,) * size, target=0.3, groups=(str(n),))
        for n in range(BLOCKS)
    ]
    return Gates({str(n): size for n in range(BLOCKS)}, budgets, steps=1000, seed=0, relaxation=relaxation)


def step_seconds(gates: Gates | None, step: int, gradient: torch.Tensor, options: argparse.Namespace) -> float:
    begin = time.perf_counter()
    if gates:
        gates.split(gates.draw(step))
    time.sleep((options.step - options.free) / 1e3)
    if gates:
        gates.update(gradient, step)
    time.sleep(options.free / 1e3)
    return time.perf_counter() - begin


def measured(name: str, gates: Gates, options: argparse.Namespace) -> dict[str, object]:
    """Median milliseconds per step that the gates add, and of their computation alone."""
    random = torch.Generator().manual_seed(1)
    worth = torch.rand(len(gates.openness()), generator=random)
    added: dict[str, list[float]] = {"in a thread": [], "in line": [], "without": []}
    alone = []
    for step in range(1, options.steps + 1):
        gradient = -worth + 0.3 * torch.randn(len(worth), generator=random)
        for way in added:
            gates._in_background = way == "in a thread"
            added[way].append(step_seconds(None if way == "without" else gates, step, gradient, options))
        begin = time.perf_counter()
        gates.draw(step)
        gates.update(gradient, step)
        alone.append(time.perf_counter() - begin)
    ms = {way: 1e3 * statistics.median(times) for way, times in added.items()}
    row = {"gates": len(worth), "budget": name, "relaxation": type(gates.relaxation).__name__}
    row |= {"ms of computation": 1e3 * statistics.median(alone)}
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
        measured(name, make(options.gates, relaxation), options)
        for name, make in (("one for all", one_budget), ("one per block", per_block))
        for relaxation in (Deterministic(), HardConcrete())
    ]
    settings = {name: value for name, value in vars(options).items() if name != "output"}
    publish("controller", settings, rows, options.output)


if __name__ == "__main__":
    main()
