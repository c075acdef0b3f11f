"""The learned masks of one stage: gate values, the ramp of the targets, the final binary masks.

Masks of several sizes are nested: the units of each smaller model are a subset of those of the next larger one. Each
size has gate values of its own, with an exact multiplier for its own target. Every step draws the gates of one size and
moves those of all sizes by their gradient. The sizes move from the largest to the smallest, and a gate never ends above
the same gate of the next larger size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from cook.base import distributed
from cook.base.device import accelerator
from cook.base.seeds import generator
from cook.config.scheme import GatesStart
from cook.pruning.controller import Constraint, GateController, ramp
from cook.pruning.count_pricing import in_multiples, nearest_cut
from cook.pruning.relaxation import Deterministic, Relaxation

MEAN = "mean."
"""The first part of the keys of `Gates.means` in a state."""
_worker = ThreadPoolExecutor(1, thread_name_prefix="gates")


class Gates:
    """The gates of a list of groups, the same on every rank.

    They are not part of the engine: they are replicated, in fp32 on the CPU, with their own optimizer. A step draws z
    with `draw`, uses it in the forward pass (a plain tensor that requires grad), and passes ∂L/∂z to `update`.

    With an accelerator the gates move in a thread, while the accelerator updates the weights and computes the teacher's
    logits of the next step. Whatever reads the gates waits for it.

    Args:
        sizes: The number of units of every group by name, in the order of the flat vector.
        constraints: The constraints, which cover the flat vector.
        steps: The number of steps of the stage.
        seed: The seed of the noise, if there is any.
        relaxation: Defines a gate's value.
        learning_rate: The learning rate of the gates; None for the relaxation's default.
        ramp_fraction: The share of `steps` in which the targets rise; None for the relaxation's default.
        start: `taylor` and `fisher` keep all gates open for `start_steps` updates, and then spread them by the rank,
            within each constraint, of |Σ g| or Σ g² for a unit's gradient g = ∂L/∂z (Molchanov et al., "Importance
            estimation for neural network pruning", CVPR 2019). `search`: `settle` sets them before the first step, and
            steps do not move them.
        start_steps: At most a quarter of `steps`.
        smaller: The constraints of each further size, with targets that rise from size to size. Sizes are numbered from
            the largest, 0.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        constraints: Sequence[Constraint],
        *,
        steps: int,
        seed: int,
        relaxation: Relaxation | None = None,
        learning_rate: float | None = None,
        ramp_fraction: float | None = None,
        start: GatesStart = "open",
        start_steps: int = 8,
        smaller: Sequence[Sequence[Constraint]] = (),
    ):
        self.relaxation = relaxation = relaxation or Deterministic()
        self.sizes, self.steps, self.seed = dict(sizes), steps, seed
        self.ramp_fraction = relaxation.ramp if ramp_fraction is None else ramp_fraction
        self.start: GatesStart = start
        self.start_steps = min(start_steps, steps // 4) if start in ("taylor", "fisher") else 0
        self._moving: Future[None] | None = None  # a step in the thread
        self._in_background = accelerator() is not None
        self.values = relaxation.start(sum(self.sizes.values()), seed).repeat(1 + len(smaller))
        rate = relaxation.learning_rate(steps) if learning_rate is None else learning_rate
        rate = 0.0 if start == "search" else rate
        self.controller, *self.smaller = (
            GateController(each, relaxation, learning_rate=rate) for each in (constraints, *smaller)
        )
        self.score, self.gathered = torch.zeros(sum(self.sizes.values()), dtype=torch.float64), 0
        self.start_sparsity = self.expected_sparsity()
        self.means: dict[str, torch.Tensor] = {}
        """The mean input features that take the place of those of removed units, by group (`compensation`)."""
        self._last: tuple[torch.Tensor, torch.Tensor] | None = None  # values and z of the step last drawn
        self._ahead: tuple[int, torch.Tensor, torch.Tensor] | None = None  # the next step, its values and z
        self._step = 0

    @property
    def values(self) -> torch.Tensor:
        """The gate values of all sizes, float32 `[sizes · gates]`."""
        self._wait()
        return self._values

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        self._wait()
        self._values, self._ahead = values, None

    def _wait(self) -> None:
        """Waits until the gates have moved."""
        moving, self._moving = self._moving, None
        if moving is not None:
            moving.result()

    def settle(self, masks: Mapping[str, torch.Tensor]) -> None:
        """Sets the gates to masks of 0 and 1, by group name."""
        flat = torch.cat([masks[name] for name in self.sizes])
        self.values = self.relaxation.low + (self.relaxation.high - self.relaxation.low) * flat
        self.start_sparsity = self.expected_sparsity()

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """Of all sizes, as everything that is `[constraints]`."""
        return tuple(c for controller in self._controllers for c in controller.constraints)

    @property
    def multipliers(self) -> torch.Tensor:
        """λ of the last step, float64 `[constraints]`."""
        self._wait()
        return torch.cat([controller.multipliers for controller in self._controllers])

    @property
    def _controllers(self) -> tuple[GateController, ...]:
        return (self.controller, *self.smaller)

    def of_size(self, number: int) -> torch.Tensor:
        """The values of one size, a view `[gates]`."""
        return self.values.view(1 + len(self.smaller), -1)[number]

    def draw(self, step: int) -> torch.Tensor:
        """z of step `step`, float32 `[gates]`: the same on every rank, and the same after a resume."""
        self._wait()
        self._step, leaf, drawn = self._sampled(step) if self._ahead is None or self._ahead[0] != step else self._ahead
        self._last, self._ahead = (leaf, drawn), None
        return drawn.detach()

    def _sampled(self, step: int) -> tuple[int, torch.Tensor, torch.Tensor]:
        """The step, its gate values, and z, which depends on them."""
        sizes = self._values.view(1 + len(self.smaller), -1)
        leaf = sizes[size_of_step(step, len(sizes), self.seed)].clone().requires_grad_()
        return step, leaf, self._gated(leaf, step)

    def largest(self) -> torch.Tensor:
        """z of the largest size in the step last drawn, `[gates]`."""
        return self._gated(self.of_size(0), self._step)

    def _gated(self, values: torch.Tensor, step: int) -> torch.Tensor:
        is_scoring = self.gathered < self.start_steps
        return torch.ones_like(values) if is_scoring else self.relaxation.draw(values, self.seed, step)

    def split(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        """Splits a flat vector into one tensor per group, differentiably."""
        return dict(zip(self.sizes, z.split(list(self.sizes.values())), strict=True))

    def update(self, z_gradient: torch.Tensor, step: int) -> None:
        """Moves the gates by ∂L/∂z of the z last drawn, averaged over ranks and micro-batches; `step` counts from 1."""
        self._wait()
        assert self._last is not None, "update without draw"
        last, self._last = self._last, None
        if self._in_background:
            self._moving = _worker.submit(self._move_and_draw, *last, z_gradient, step)
        else:
            self._move(*last, z_gradient, step)

    # What runs in the thread reads nothing that waits for the thread.

    def _move_and_draw(self, leaf: torch.Tensor, drawn: torch.Tensor, z_gradient: torch.Tensor, step: int) -> None:
        self._move(leaf, drawn, z_gradient, step)
        self._ahead = self._sampled(self._step + 1)

    def _move(self, leaf: torch.Tensor, drawn: torch.Tensor, z_gradient: torch.Tensor, step: int) -> None:
        if self.gathered < self.start_steps:
            self._gather(z_gradient.double())
            return
        drawn.backward(z_gradient.to(drawn))
        assert leaf.grad is not None
        hold = max(0.0, self._progress(step) - self.ramp_fraction) / max(1e-9, 1 - self.ramp_fraction)
        sizes = self._values.view(1 + len(self.smaller), -1)
        targets, larger = self._targets(step).view(len(sizes), -1), None
        for number, controller in enumerate(self._controllers):
            controller.step(sizes[number], leaf.grad, targets[number], hold=hold, highest=larger)
            larger = sizes[number]

    def _progress(self, step: int) -> float:
        """Progress, 0 to 1, after `step`, of the part of the stage that follows the gathering of scores."""
        return max(0, step - self.start_steps) / (self.steps - self.start_steps)

    def _gather(self, gradient: torch.Tensor) -> None:
        """Adds to the scores; after the last of the first steps, sets the gates from them."""
        self.score += gradient if self.start == "taylor" else gradient**2
        self.gathered += 1
        if self.gathered == self.start_steps:
            rank = torch.empty_like(self.score)
            for c in self.controller.constraints:
                part, costs = slice(c.start, c.start + len(c.costs)), torch.tensor(c.costs, dtype=torch.float64)
                order = torch.argsort(torch.argsort(self.score[part].abs() / costs, stable=True))
                rank[part] = order / max(1, len(costs) - 1)
            self._values = self.relaxation.ranked(rank).repeat(1 + len(self.smaller))
            self.start_sparsity = self._expected_sparsity()

    def targets(self, step: int) -> torch.Tensor:
        """The sparsity targets after step `step`, float64 `[constraints]`."""
        self._wait()
        return self._targets(step)

    def _targets(self, step: int) -> torch.Tensor:
        pairs = zip(self.start_sparsity.tolist(), self.constraints, strict=True)
        values = [ramp(self._progress(step), self.ramp_fraction, start, c.target) for start, c in pairs]
        return torch.tensor(values, dtype=torch.float64)

    def expected_sparsity(self) -> torch.Tensor:
        """s of every constraint, float64 `[constraints]`."""
        self._wait()
        return self._expected_sparsity()

    def _expected_sparsity(self) -> torch.Tensor:
        sizes = self._values.view(1 + len(self.smaller), -1)
        return torch.cat(
            [controller.expected_sparsity(values) for controller, values in zip(self._controllers, sizes, strict=True)]
        )

    @torch.no_grad()
    def openness(self) -> torch.Tensor:
        """The probability that each unit is kept, float32 `[gates]`; the mean over the sizes."""
        return self.relaxation.openness(self.values).view(1 + len(self.smaller), -1).mean(0)

    def binary(self, number: int = 0) -> dict[str, torch.Tensor]:
        """The binary masks: each constraint removes its smallest gates, as many as bring it nearest its target.

        A per-block constraint on heads or FFN dimensions thus ends with exactly its number; a constraint on blocks ends
        within half a block's parameters of its target.

        Args:
            number: The size. What a larger size removes goes first.
        """
        if self.start == "search":
            return self.split((self.values > (self.relaxation.low + self.relaxation.high) / 2).float())
        kept = torch.ones(sum(self.sizes.values()))
        for size, controller in enumerate(self._controllers[: number + 1]):
            kept = self._removed(kept, self.of_size(size), controller.constraints)
        return self.split(kept)

    def _removed(self, inside: torch.Tensor, gates: torch.Tensor, constraints: Sequence[Constraint]) -> torch.Tensor:
        """The binary mask of one size, `[gates]`, among the units that `inside` keeps."""
        kept = inside.clone()
        for c in constraints:
            part = slice(c.start, c.start + len(c.costs))
            values, costs = gates[part], torch.tensor(c.costs, dtype=torch.float64)
            gone = inside[part] == 0
            order = torch.argsort(values.masked_fill(gone, -math.inf), stable=True)
            if c.owners:
                order, costs = self._with_owners(c, self.relaxation.openness(values.double()), costs, gone)
            if c.least:
                order = order[~c.protected(values.masked_fill(gone, -math.inf))[order]]
            allowed = torch.arange(len(order) + 1)
            if c.multiples:
                order, allowed = in_multiples(order, *zip(*c.multiples, strict=True))
            if c.pricing is not None:
                closed = nearest_cut(c.pricing, order, allowed, target=c.target, least=int(gone[order].sum()))
            else:
                removed_share = torch.cat([torch.zeros(1, dtype=torch.float64), costs[order].cumsum(0)])
                allowed = allowed[allowed >= gone[order].sum()]
                closed = order[: int(allowed[(removed_share[allowed] - c.target).abs().argmin()])]
            kept[c.start + closed] = 0.0
            # A key-value head goes before the block that owns it.
            for owner in sorted({*c.owners} - {-1}, key=lambda gate: c.owners[gate] < 0):
                kept[c.start + owner] = kept[part][torch.tensor(c.owners) == owner].amax()
        return kept

    @staticmethod
    def _with_owners(
        c: Constraint, values: torch.Tensor, costs: torch.Tensor, gone: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The order in which gates without gates of their own go, and their costs: the last one takes its owner along.

        Args:
            c: The constraint.
            values: The openness of its gates, `[gates]`.
            costs: Their costs.
            gone: Which of them a larger size has removed.
        """
        owners, costs = torch.tensor(c.owners), costs.clone()
        own = values
        for _ in range(2):  # query heads are multiplied by their keys, and these by their block
            values = torch.where(owners >= 0, own * values[owners.clamp(min=0)], own)
        values = values.masked_fill(gone, -1.0)
        order = torch.argsort(values, stable=True)
        place = torch.argsort(order)
        owning = sorted({*c.owners} - {-1})
        for owner in owning:
            own = (owners == owner).nonzero().flatten()
            costs[own[place[own].argmax()]] += costs[owner]
        return order[~torch.isin(order, torch.tensor(owning))], costs

    def state_dict(self) -> dict[str, torch.Tensor]:
        own = {"values": self.values, "score": self.score, "start_sparsity": self.start_sparsity}
        own["gathered"] = torch.tensor(self.gathered)
        state = {name: value.clone() for name, value in own.items()} | self.controller.state_dict()
        state |= {f"{MEAN}{name}": mean.clone() for name, mean in self.means.items()}
        for number, controller in enumerate(self.smaller, start=1):
            state |= {f"{name}.{number}": value for name, value in controller.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        assert state["values"].shape == self.values.shape, "the state is that of other gates"
        state = {name: value.cpu() for name, value in state.items()}
        self.values, self.score = state["values"].clone(), state["score"].clone()
        self.start_sparsity, self.gathered = state["start_sparsity"].clone(), int(state["gathered"])
        self.controller.load_state_dict(state)
        self.means = {name.removeprefix(MEAN): mean for name, mean in state.items() if name.startswith(MEAN)}
        for number, controller in enumerate(self.smaller, start=1):
            names = controller.state_dict()
            controller.load_state_dict({name: state[f"{name}.{number}"] for name in names})


def size_of_step(step: int, count: int, seed: int) -> int:
    """The number of the size, of `count`, that a step trains: each once in `count` steps, in random order."""
    turn, place = divmod(step - 1, count)
    return int(torch.randperm(count, generator=generator(seed, "sizes", turn))[place]) if count > 1 else 0


def own_share(z: torch.Tensor, loss_scale: float) -> torch.Tensor:
    """This rank's share of ∂L/∂z of the global batch, `[gates]`: its sum over the ranks is the gradient.

    Args:
        z: The gates of the step, after the backward pass.
        loss_scale: The factor by which the loss was multiplied before the backward pass, as with fp16.
    """
    assert z.grad is not None, "the loss does not depend on the gates"
    return z.grad.float() / (loss_scale * distributed.world_size())
