"""FFN blocks carved into experts, from samples of their activations, without training.

The energy of an FFN dimension at a token is h²·‖w‖², with its activation h and its column w of the output projection:
the square of what the dimension adds to the residual stream. The carving keeps as much of it as it can:

1. The dims with the most energy form the shared expert, the others are clustered by the tokens at which they are active
   (Zhang et al. 2022, MoEfication; Pei et al. 2025, CMoE, for the shared expert and the balanced assignment).
2. A router is fitted to the experts' energies by ridge regression from the block's input.
3. Each dim moves to the expert with which the router would keep most of its energy, all experts keeping their sizes,
   and the router is fitted again. The best of some such rounds is the result.

T tokens, H hidden size, F FFN dims, E routed experts, K routed experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors
from cook.pruning.counts import parameters, unit_parameters
from cook.pruning.family import Experts
from cook.pruning.restrict import ends_with
from cook.pruning.units import PruningSpace, UnitGroup

ROUNDS = 6
"""Rounds of moving dims and fitting the router. Little changes after the third."""
RIDGE = 0.01
"""The ridge penalty, as a share of the mean variance of the input's features."""
ROUTER = "router"
"""Name of the router, beside the output projection."""


@dataclass(frozen=True, kw_only=True)
class ExpertSizes:
    """The experts of one block."""

    dims: int
    """FFN dims of the block."""
    shared: int
    """Dims of the shared expert: its own experts' and those that do not divide evenly."""
    size: int
    """Dims per routed expert."""
    routed: int
    """Routed experts."""
    active: int
    """Routed experts per token."""

    @property
    def active_dims(self) -> int:
        """Dims that a token uses."""
        return self.shared + self.active * self.size


def active_experts(experts: int, shared: int, active: float) -> int:
    """Routed experts per token, such that a share `active` of all experts is active; at least 1."""
    return max(1, min(experts - shared, round(active * experts) - shared))


def expert_sizes(dims: int, *, experts: int, shared: int, active: float) -> ExpertSizes:
    """The experts of a block of `dims` dims, as equal as possible.

    Raises:
        UserError: fewer dims than experts.
    """
    if dims < experts:
        raise UserError("MoEfication.experts: more experts than an FFN block has dims", wanted=f"at most {dims}")
    size, routed = dims // experts, experts - shared
    return ExpertSizes(
        dims=dims,
        shared=dims - routed * size,
        size=size,
        routed=routed,
        active=active_experts(experts, shared, active),
    )


@dataclass(frozen=True, kw_only=True)
class Carving:
    """A block's experts and its router."""

    sizes: ExpertSizes
    order: torch.Tensor
    """`[F]`, the block's dims by their numbers: those of the shared expert, then those of each routed one."""
    weight: torch.Tensor
    """`[E, H]`, the router's weight."""
    bias: torch.Tensor
    """`[E]`, what is added to its scores."""
    kept: float
    """The share of the samples' energy that the chosen experts have."""


def carve(inputs_TH: torch.Tensor, energy_TF: torch.Tensor, sizes: ExpertSizes) -> Carving:
    """Carves a block into experts.

    Args:
        inputs_TH: The block's input at the sampled tokens.
        energy_TF: The energy of its dims at these tokens; only the ratios within a token matter.
        sizes: The experts.

    Raises:
        UserError: a number is not finite.
    """
    if not (inputs_TH.isfinite().all() and energy_TF.isfinite().all()):
        raise UserError("an FFN block has activations that are not finite", remedy="check the model and the data")
    energy_TF = energy_TF.float()
    energy_TF = energy_TF / energy_TF.sum(1, keepdim=True).clamp(min=1e-30)
    fit = _Ridge(inputs_TH.float())
    place_F = _clusters(energy_TF, sizes)
    best: Carving | None = None
    for _ in range(ROUNDS):
        owned_FE = torch.nn.functional.one_hot(place_F + 1, sizes.routed + 1)[:, 1:].float()
        own_TE = energy_TF @ owned_FE
        weight_EH, offset_E = fit(own_TE)
        chosen_TE = _chosen(fit.inputs_TH @ weight_EH.T + offset_E, sizes.active)
        kept = float(1 - (own_TE * (1 - chosen_TE)).sum(1).mean())
        if best is None or kept > best.kept:
            weight, bias = _as_scores(fit.inputs_TH, weight_EH, offset_E)
            order = torch.cat([(place_F == expert).nonzero().flatten() for expert in range(-1, sizes.routed)])
            best = Carving(sizes=sizes, order=order, weight=weight, bias=bias, kept=kept)
        gain_FE = energy_TF.T @ chosen_TE
        moved_F = _assigned(torch.cat([energy_TF.sum(0)[:, None], gain_FE], 1), sizes) - 1
        if torch.equal(moved_F, place_F):
            break
        place_F = moved_F
    assert best is not None
    return best


class _Ridge:
    """Ridge regression on the inputs, with an offset that is not penalised."""

    def __init__(self, inputs_TH: torch.Tensor):
        self.inputs_TH = inputs_TH
        self._mean_H = inputs_TH.mean(0)
        centered = (inputs_TH - self._mean_H).double()
        gram_HH = centered.T @ centered
        penalty = RIDGE * gram_HH.diagonal().mean().clamp(min=1e-12)
        self._factor = torch.linalg.cholesky(gram_HH + penalty * torch.eye(len(gram_HH), dtype=torch.float64))
        self._centered = centered

    def __call__(self, wanted_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight `[E, H]` and offset `[E]` of the prediction."""
        mean_E = wanted_TE.mean(0)
        solved_HE = torch.cholesky_solve(self._centered.T @ (wanted_TE - mean_E).double(), self._factor)
        weight_EH = solved_HE.T.float()
        return weight_EH, mean_E - weight_EH @ self._mean_H


def _chosen(score_TE: torch.Tensor, active: int) -> torch.Tensor:
    return torch.zeros_like(score_TE).scatter_(1, score_TE.topk(active, 1).indices, 1.0)


def _as_scores(
    inputs_TH: torch.Tensor, weight_EH: torch.Tensor, offset_E: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The linear prediction in the router's form, sigmoid(W x) + bias, with the same order of the experts.

    The sigmoid is nearly linear for small arguments, with a slope of 1/4; the weight is scaled to make them small.
    """
    scale = 0.5 / (inputs_TH @ weight_EH.T).abs().amax(1).quantile(0.99).clamp(min=1e-30)
    return scale * weight_EH, scale / 4 * offset_E


def _clusters(energy_TF: torch.Tensor, sizes: ExpertSizes) -> torch.Tensor:
    """The expert of each dim, -1 for the shared one: the dims with the most energy, and clusters of the others.

    Two rounds of k-means on the sphere with balanced clusters. The centres start with the dims of most energy, as in
    CMoE. A dim's features are the roots of its energies, so that its few strongest tokens do not decide alone.
    """
    order_F = energy_TF.sum(0).argsort(descending=True)
    place_F = torch.full((sizes.dims,), -1)
    rest = order_F[sizes.shared :]
    profile_FT = torch.nn.functional.normalize(energy_TF[:, rest].sqrt().T, dim=1)
    centres_ET = profile_FT[: sizes.routed]
    only_routed = ExpertSizes(dims=len(rest), shared=0, size=sizes.size, routed=sizes.routed, active=sizes.active)
    for _ in range(2):
        found = _assigned(profile_FT @ centres_ET.T, only_routed)
        owned_EF = torch.nn.functional.one_hot(found, sizes.routed).T.float()
        centres_ET = torch.nn.functional.normalize(owned_EF @ profile_FT, dim=1)
    place_F[rest] = found
    return place_F


def _assigned(gain_FP: torch.Tensor, sizes: ExpertSizes) -> torch.Tensor:
    """The place of each dim such that the sum of gains is largest and every place is full.

    The places are the shared expert, if there is a column for it, and the routed ones. Every dim begins at its best
    place. Then one dim after the other leaves the full places along the cheapest path of moves to one that is not full,
    which keeps the assignment the best one for the number of dims moved (successive shortest paths). It takes seconds
    for 10,000 dims, where a general assignment of dims to seats needs minutes and the square of the memory.
    """
    gain, places = gain_FP.double().numpy(), gain_FP.shape[1]
    capacity = np.array(([sizes.shared] if places > sizes.routed else []) + [sizes.size] * sizes.routed)
    assert np.isfinite(gain).all() and len(gain) == capacity.sum()
    place, least = gain.argmax(1), 1e-9 * float(np.abs(gain).max())
    loss, dim = np.full((places, places), np.inf), np.zeros((places, places), dtype=np.int64)

    def update(start: int) -> None:
        """The cheapest move from a place to each of the others: what it loses, and its dim."""
        members = np.flatnonzero(place == start)
        if len(members):
            losses = gain[members, start, None] - gain[members]
            best = losses.argmin(0)
            loss[start], dim[start] = losses[best, np.arange(places)], members[best]
        else:
            loss[start] = np.inf
        loss[start, start] = np.inf

    for start in range(places):
        update(start)
    while (surplus := np.bincount(place, minlength=places) - capacity).any():
        total = np.where(surplus > 0, 0.0, np.inf)
        before = np.full(places, -1)
        for _ in range(places):  # Bellman-Ford, from all places with too many dims
            through = total[:, None] + loss
            via = through.argmin(0)
            better = through[via, np.arange(places)] < total - least  # more than rounding, so paths have no cycles
            if not better.any():
                break
            total[better], before[better] = through[via[better], better.nonzero()[0]], via[better]
        end = int(np.where(surplus < 0, total, np.inf).argmin())
        moved = [end]
        while before[end] >= 0:
            start = int(before[end])
            place[dim[start, end]] = end
            moved.append(end := start)
        for start in moved:
            update(start)
    return torch.from_numpy(place)


def ffn_groups(
    space: PruningSpace, first_modules: Sequence[str], aliases: Mapping[str, tuple[str, ...]]
) -> tuple[UnitGroup, ...]:
    """The FFN dims of the blocks whose products into the block have these names; of all blocks if none are given.

    Args:
        space: The model's space.
        first_modules: Suffixes of module paths, whole components: the first product of a block.
        aliases: The adapter's aliases of weights.

    Raises:
        UserError: a name matches no block, or the model has no FFN blocks.
    """
    # The dims of experts are tensors without modules of their own.
    groups = tuple(group for group in space.of("dimff") if _ins(group))
    if not groups:
        raise UserError(
            "MoEfication: the model has no dense FFN blocks",
            wanted="FFN blocks made of linear modules",
            remedy="a model with experts has them already: cook prune --keep experts=0.5 removes some",
        )
    if not first_modules:
        return groups
    chosen = []
    for name in first_modules:
        spellings = [text.removesuffix(".weight") for text in (name, *aliases.get(f"{name}.weight", ()))]
        found = [group for group in groups if any(ends_with(p, s) for p in _ins(group) for s in spellings)]
        if not found:
            known = {path.split(f".{groups[0].layer}.", 1)[-1] for path in _ins(groups[0])}
            raise UserError(
                f"MoEfication.first_FFN_module: {name!r} is not the first product of an FFN block",
                wanted=f"the end of a module's name, such as {', '.join(sorted(known))}",
            )
        chosen += found
    return tuple(group for group in groups if group in chosen)


def _ins(group: UnitGroup) -> dict[str, list[int]]:
    """The paths of the products into a block, each with the offsets of its parts."""
    found: dict[str, list[int]] = {}
    for piece in group.slices[:-1]:
        if piece.path.endswith(".weight"):
            found.setdefault(piece.path.removesuffix(".weight"), []).append(piece.offset)
    return found


def entry_points(group: UnitGroup) -> tuple[str, str]:
    """The modules whose inputs are those of the block and its activations: its first and its last product."""
    return next(iter(_ins(group))), group.gate.module


def described(group: UnitGroup, carving: Carving) -> tuple[str, dict[str, Any]]:
    """The router's path, and the block's entry for `cook.models.cook_experts.add_experts`."""
    sizes, out = carving.sizes, group.gate.module
    entry: dict[str, Any] = {"hidden": carving.weight.shape[1], "shared": sizes.shared, "size": sizes.size}
    entry |= {"routed": sizes.routed, "active": sizes.active, "ins": _ins(group), "out": out}
    return f"{out.rpartition('.')[0]}.{ROUTER}", entry


def carved_weights(tensors: Mapping[str, torch.Tensor], carvings: Iterable[tuple[UnitGroup, Carving]]) -> LazyTensors:
    """The weights of a model with experts, each computed on access: the dims in their new order, and the routers."""
    orders: dict[str, list[tuple[int, int, torch.Tensor]]] = {}
    routers: dict[str, torch.Tensor] = {}
    for group, carving in carvings:
        path, _ = described(group, carving)
        routers |= {f"{path}.weight": carving.weight, f"{path}.bias": carving.bias}
        for piece in group.slices:
            orders.setdefault(piece.path, []).append((piece.dim, piece.offset, carving.order))

    def reordered(path: str) -> torch.Tensor:
        tensor = tensors[path]
        for dim, offset, order in orders[path]:
            index = torch.arange(tensor.shape[dim])
            index[offset : offset + len(order)] = offset + order
            tensor = tensor.index_select(dim, index)
        return tensor

    readers = {path: partial(reordered if path in orders else tensors.__getitem__, path) for path in tensors}
    return LazyTensors(readers | {path: partial(routers.__getitem__, path) for path in routers})


def active_when_carved(space: PruningSpace, experts: Experts) -> int:
    """Parameters that one token uses, embeddings included, of a model with these experts."""
    groups = {group.gate.module: group for group in space.of("dimff")}
    unused = 0
    for entry in experts.values():
        dims: int = (entry["routed"] - entry["active"]) * entry["size"]
        unused += dims * unit_parameters(space, groups[entry["out"]])
    return parameters(space) - unused
