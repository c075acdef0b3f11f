"""Models that do not fit into memory: every layer's weights are read from the files when the layer computes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from cook.base.device import free_memory
from cook.base.errors import UserError
from cook.base.tensor_files import shapes_of
from cook.families.source import load_model, placed
from cook.pruning.family import ModelSource

SPARE = 0.7
"""The largest share of the free memory that a model's weights may need to be loaded whole; the rest is for outputs."""


def fits_into_memory(source: ModelSource, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> bool:
    """Whether the whole model can be loaded; one for an accelerator is also in the host's memory for a moment."""
    devices = {torch.device("cpu"), torch.device(device)}
    return all(model_bytes(source, dtype) <= SPARE * free_memory(place) for place in devices)


def model_bytes(source: ModelSource, dtype: torch.dtype | None) -> int:
    """The bytes of all weights in the type `dtype`; None: in that of the first one in the files."""
    shapes = shapes_of(source.tensors)
    kind = dtype or source.tensors[next(iter(shapes))].dtype
    return sum(map(math.prod, shapes.values())) * kind.itemsize


def streamed_model(
    source: ModelSource, dtype: torch.dtype | None, device: torch.device | str = "cpu"
) -> torch.nn.Module:
    """A model in eval mode of which one layer is in memory at a time, besides embeddings, last norm and output weights.

    A forward pass reads all layers once, so larger batches are faster. It has no gradients.

    Args:
        source: The model's files.
        dtype: Type of the weights; None keeps the stored types.
        device: Where it computes.

    Raises:
        UserError: the weights do not fit the config.
    """
    layers: dict[str, list[str]] = {}

    def empty(model: torch.nn.Module) -> set[str]:
        for path, layer in _layers(model):
            layers[path] = [f"{path}.{name}" for name, _ in layer.named_parameters()]
        return {name for names in layers.values() for name in names}

    model = load_model(source, dtype, leave=empty)
    absent = next((name for names in layers.values() for name in names if name not in source.tensors), None)
    if absent:
        raise UserError(f"{source.path}: the weights do not fit the model's config: {absent!r} is missing")
    for path, names in layers.items():
        _stream(model, model.get_submodule(path), names, source, dtype, device)
    return placed(model, device, None)


def _layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The modules of the outermost lists of modules."""
    lists = [path for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    outer = [path for path in lists if not any(path.startswith(f"{other}.") for other in lists)]
    for path in outer:
        yield from ((f"{path}.{name}", layer) for name, layer in model.get_submodule(path).named_children())


def _stream(
    model: torch.nn.Module,
    layer: torch.nn.Module,
    names: list[str],
    source: ModelSource,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> None:
    """Gives a layer hooks that read its weights before it computes, and replace them afterwards."""
    owners: dict[str, tuple[dict[str, Any], str, torch.nn.Parameter]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        owned: Any = model.get_submodule(path)._parameters
        kind = dtype or source.tensors[name].dtype
        # One number of memory in the shape of the weight, so that the model shows its size, type and device.
        number = torch.zeros((), dtype=kind, device=device).expand(owned[leaf].shape)
        owners[name] = (owned, leaf, torch.nn.Parameter(number, requires_grad=False))

    def read(*_: Any) -> None:
        for name, (owned, leaf, placeholder) in owners.items():
            tensor = source.tensors[name]
            if tensor.shape != placeholder.shape:
                got = f"shape {tuple(tensor.shape)}, not {tuple(placeholder.shape)}"
                raise UserError(f"{source.path}: the weights do not fit the model's config", wanted=repr(name), got=got)
            owned[leaf] = torch.nn.Parameter(tensor.to(device, placeholder.dtype), requires_grad=False)

    def drop(*_: Any) -> None:
        for owned, leaf, placeholder in owners.values():
            owned[leaf] = placeholder

    drop()
    layer.register_forward_pre_hook(read)
    layer.register_forward_hook(drop, always_call=True)
