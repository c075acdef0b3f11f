"""Models of several families in memory, and what the masked model and the reshaped one must have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from cook.export.pruned_folder import mask_model, reshaped_source
from cook.families.source import load_model
from cook.families.stock_models import weight_shapes
from cook.pruning.counts import kept_shapes, parameters
from cook.pruning.family import ModelSource
from cook.pruning.mask_set import Masks, kept_counts
from cook.pruning.units import HeadUnit, PruningSpace

EXACT = 1e-5
"""Relative, fp32: rounding of sums taken in another order."""
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
Case = tuple[str, HeadUnit]


class TinyModels:
    """Models by name, and their spaces by name and kind of attention unit.

    Args:
        sources: The models by name.
        every_unit: True: a case for each kind of attention unit of a model; False: only for the finest one.
    """

    def __init__(self, sources: Mapping[str, ModelSource], *, every_unit: bool = True):
        self.sources = dict(sources)
        self.models = {name: load_model(source) for name, source in sources.items()}
        units = {name: source.adapter.head_units(source.config) for name, source in sources.items()}
        self.cases: list[Case] = [(n, unit) for n in units for unit in (units[n] if every_unit else units[n][-1:])]
        self.spaces = {case: sources[case[0]].adapter.space(sources[case[0]].config, case[1]) for case in self.cases}

    def case(self, name: str) -> Case:
        """The case of a model with its finest attention units."""
        return [case for case in self.cases if case[0] == name][-1]

    @torch.no_grad()
    def both(self, case: Case, masks: Masks, **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the masked and of the reshaped model; `inputs` are `input_ids=IDS` unless they are given."""
        model, space = self.models[case[0]], self.spaces[case]
        small = load_model(reshaped_source(self.sources[case[0]], space, masks))
        return logits_of(model, space, masks, **inputs), logits_of(small, **inputs)


@torch.no_grad()
def logits_of(
    model: torch.nn.Module, space: PruningSpace | None = None, masks: Masks | None = None, **inputs: torch.Tensor
) -> torch.Tensor:
    """Logits of a model, with the masks applied if there are any; the model is as before then."""
    attached = mask_model(model, space, masks) if space and masks else None
    try:
        return model(**{"input_ids": IDS, **inputs}).logits
    finally:
        if attached:
            attached.remove()


def difference(a: torch.Tensor, b: torch.Tensor, real: torch.Tensor | None = None) -> float:
    """max |a − b| / max |a|, over the positions `real` if they are given."""
    a, b = (a, b) if real is None else (a[real], b[real])
    assert a.isfinite().all() and a.shape == b.shape
    return float((a - b).abs().max() / a.abs().max())


def some(size: int, kept: int, seed: int = 0, sections: int = 1) -> torch.Tensor:
    """A mask that keeps `kept` units of each section, drawn at random."""
    random, mask = torch.Generator().manual_seed(seed), torch.zeros(sections, size // sections)
    for row in mask:
        row[torch.randperm(len(row), generator=random)[:kept]] = 1
    return mask.flatten()


def check_config(source: ModelSource, space: PruningSpace, masks: Masks, unit: HeadUnit) -> ModelSource:
    """Asserts that the reshaped model's config describes its weights, and that counts of the masks are exact.

    Returns:
        The reshaped model. It can be pruned again, and describes itself the same way.
    """
    small = reshaped_source(source, space, masks)
    with torch.device("meta"):
        fresh = source.adapter.build(small.config)
    shapes = {name: tuple(tensor.shape) for name, tensor in small.tensors.items()}
    assert weight_shapes(fresh) == shapes
    counts = kept_counts(masks)
    assert sorted(shapes.values()) == sorted(kept_shapes(space, counts).values())
    assert parameters(space, counts) == sum(map(math.prod, shapes.values()))
    again = small.adapter.space(small.config, unit)
    assert dict(again.shapes) == shapes
    assert reshaped_source(small, again, {}).config == small.config
    return small


def compute_norms_in_fp64(model: torch.nn.Module) -> None:
    """transformers' RMSNorms compute in fp32 in every model."""
    for norm in model.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            eps, added = getattr(norm, "variance_epsilon", None) or norm.eps, "Gemma" in type(norm).__name__

            def forward(x, norm=norm, eps=eps, added=added):
                return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (norm.weight + added)

            norm.forward = forward
