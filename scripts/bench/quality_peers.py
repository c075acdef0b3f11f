"""What `quality.py` compares with: one-shot scores of units, and gates as others set them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.nn.functional as F

from cook.pruning.controller import Constraint
from cook.pruning.gates import Gates
from cook.pruning.relaxation import HardConcrete, probability_open, sample, uniform_noise
from cook.pruning.units import UnitGroup

ONE_SHOT = (
    "random",
    "magnitude",
    "taylor",
    "fisher",
    "activation",
    "activation × weight",
    "fluctuation",
    "block influence",
)
OF_AUTHORS = ("layer influence", "standardised", "mean", "weight gradients")
"""What the methods of `quality_authors.py` need besides."""
Scores = dict[str, dict[str, torch.Tensor]]
"""A method's scores by group, `[units]`; the least go."""


def gather_scores(rig: Any) -> Scores:
    """Every one-shot score from one pass over the calibration batches, gradients and all.

    Args:
        rig: The `Rig` of `quality.py`, its gates open.
    """
    groups, options = [group for group in rig.space.groups if group.kind != "keys"], rig.options
    scores: Scores = {name: {} for name in (*ONE_SHOT, *OF_AUTHORS)}
    rig.model.requires_grad_(True)
    noise = torch.Generator().manual_seed(options.seed)
    sums: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(float))
    streams: dict[str, torch.Tensor] = {}
    taps = [handle for group in groups for handle in _taps(rig.model, group, sums[group.name], streams)]
    for step in range(options.steps):
        z = {group.name: torch.ones(group.size, requires_grad=True) for group in groups}
        rig.attached.set(z)
        rig.loss(rig.batch(step, options.seed)).backward()
        for name, leaf in z.items():
            sums[name]["gradient"] = sums[name]["gradient"] + leaf.grad
            sums[name]["square"] = sums[name]["square"] + leaf.grad**2
        rig.say(f"scores: {step + 1} of {options.steps}")
    for tap in taps:
        tap.remove()
    rig.attached.set({})
    gradients = {name: parameter.grad for name, parameter in rig.model.named_parameters()}
    rig.model.requires_grad_(False)
    rig.model.zero_grad()
    for group in groups:
        found = sums[group.name]
        scores["weight gradients"][group.name] = sum(
            _by_unit(rig.model.get_parameter(p.path).float() * gradients[p.path].float(), p, group.size).abs().sum(1)
            for p in group.slices
        )
        weights = [_by_unit(rig.model.get_parameter(piece.path), piece, group.size) for piece in group.slices]
        scores["random"][group.name] = torch.rand(group.size, generator=noise)
        scores["magnitude"][group.name] = sum(w.float().pow(2).sum(1) for w in weights).sqrt()
        scores["taylor"][group.name] = found["gradient"].abs()
        scores["fisher"][group.name] = found["square"]
        if group.kind == "layer":
            scores["block influence"][group.name] = (found["influence"] / found["batches"]).view(1)
            other = next(g for g in groups if (g.kind, g.site, g.layer) == ("layer", "ffn", group.layer))
            whole = sums[other.name]
            scores["layer influence"][group.name] = (whole["of layer"] / whole["batches"]).view(1)
            continue
        column = rig.model.get_parameter(group.slices[-1].path).float()
        if group.slices[-1].dim == 0:
            column = column.T
        mean = found["sum"] / found["count"]
        variance = found["squares"] / found["count"] - mean**2
        per_feature = {
            "activation × weight": column.abs().sum(0) * found["squares"].sqrt(),
            "fluctuation": column.pow(2).sum(0) * variance,
        }
        for name, values in per_feature.items():
            scores[name][group.name] = values.view(group.size, -1).sum(1)
        scores["activation"][group.name] = found["squares"].view(group.size, -1).sum(1).sqrt()
        scores["mean"][group.name] = mean
        scores["standardised"][group.name] = standardised(
            per_feature["fluctuation"], group.size, squared=group.kind == "heads"
        )
    return scores


def standardised(values: torch.Tensor, size: int, squared: bool) -> torch.Tensor:
    """FLAP's score of the `size` units of a layer from its features' fluctuation times their squared weights."""
    values = values.square() if squared else values
    return ((values - values.mean()) / values.std()).view(size, -1).mean(1)


def _by_unit(weight: torch.Tensor, piece: Any, size: int) -> torch.Tensor:
    """`[units, …]` of a weight's slice."""
    return weight.movedim(piece.dim, 0)[piece.offset : piece.offset + size * piece.block].reshape(size, -1)


def _taps(
    model: torch.nn.Module, group: UnitGroup, sums: dict[str, Any], streams: dict[str, torch.Tensor]
) -> list[Any]:
    """Hooks that gather what the activation scores need: features' sums, or a block's effect on the residual stream.

    The residual stream is read as in a model of pre-norm layers: a layer's input, and what its blocks add to it.
    """
    module = model.get_submodule(group.gate.module)
    if group.kind != "layer":

        def features(_module: Any, inputs: tuple) -> None:
            x = inputs[0].detach().float().flatten(0, -2)
            sums["sum"], sums["squares"] = sums["sum"] + x.sum(0), sums["squares"] + x.pow(2).sum(0)
            sums["count"] += len(x)

        return [module.register_forward_pre_hook(features)]
    parts = group.gate.module.split(".")
    name = ".".join(parts[: 1 + next(place for place, part in enumerate(parts) if part.isdecimal())])

    def before(_layer: Any, inputs: tuple, named: dict) -> None:
        streams[name] = streams[f"{name}, start"] = (inputs[0] if inputs else named["hidden_states"]).detach().float()

    def after(_module: Any, _inputs: tuple, output: Any) -> None:
        added = (output[0] if isinstance(output, tuple) else output).detach().float()
        x, streams[name] = streams[name], streams[name] + added
        sums["influence"] = sums["influence"] + 1 - F.cosine_similarity(x, streams[name], dim=-1).mean()
        sums["of layer"] = (
            sums["of layer"] + 1 - F.cosine_similarity(streams[f"{name}, start"], streams[name], dim=-1).mean()
        )
        sums["batches"] += 1

    handles = [module.register_forward_hook(after)]
    if group.site == "att":
        handles.append(model.get_submodule(name).register_forward_pre_hook(before, with_kwargs=True))
    return handles


class ShearedGates(Gates):
    """Gates as LLM-Shearing sets them: λ₁(s − t) + λ₂(s − t)² with λ by ascent, rates of 1, the target up in 20%."""

    def __init__(self, sizes: dict[str, int], made: list[Constraint], *, steps: int, seed: int):
        super().__init__(sizes, made, steps=steps, seed=seed, relaxation=HardConcrete(), ramp_fraction=0.2)
        self.log_alpha = self.values.clone().requires_grad_()
        self.prices = torch.zeros(2, len(made), requires_grad=True)
        self.owner = torch.repeat_interleave(torch.arange(len(made)), torch.tensor([len(c.costs) for c in made]))
        self.costs = torch.tensor([cost for c in made for cost in c.costs])
        self.descent = torch.optim.Adam([self.log_alpha], lr=1.0)
        self.ascent = torch.optim.Adam([self.prices], lr=1.0, maximize=True)

    def draw(self, step: int) -> torch.Tensor:
        noise = uniform_noise(len(self.values), torch.Generator().manual_seed(step))
        self._sampled = sample(self.log_alpha, noise)
        return self._sampled.detach()

    def update(self, z_gradient: torch.Tensor, step: int) -> None:
        gone = self.costs * (1 - probability_open(self.log_alpha))
        short = torch.zeros(len(self.prices[0])).index_add(0, self.owner, gone) - self.targets(step).float()
        held = (self.prices[0] * short + self.prices[1] * short**2).sum()
        self.descent.zero_grad()
        self.ascent.zero_grad()
        (held + (self._sampled * z_gradient).sum()).backward()
        self.descent.step()
        self.ascent.step()
        with torch.no_grad():
            self.log_alpha.clamp_(-4.6, 4.6)
        self.values = self.log_alpha.detach()
