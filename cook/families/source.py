"""Opening of models: a Hugging Face folder, a `.pt` state dict with its JSON, or a training checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers.initialization import no_init_weights

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.base.tensor_files import (
    INDEX,
    LazyTensors,
    open_pt,
    open_safetensors,
    open_safetensors_folder,
    read_model_config,
)
from cook.families.registry import by_config
from cook.pruning.family import Adapter, ModelSource, Stored
from cook.pruning.mask_set import Masks
from cook.pruning.reshape import filled_up
from cook.pruning.units import HeadUnit

CONVERT = "load the folder with transformers' from_pretrained, and save it with save_pretrained"
REMOVED = "cook_removed_units"
"""Key in the config.json of a checkpoint: the units of the whole model that the checkpoint's weights lack."""
ReadCheckpoint = Callable[[Path], Mapping[str, torch.Tensor]]


def open_model(
    path: str | Path, *, config: Mapping[str, Any] | None = None, read_checkpoint: ReadCheckpoint | None = None
) -> ModelSource:
    """Opens a model without reading its weights.

    Args:
        path: A Hugging Face folder, a `.pt` file, or a checkpoint's folder.
        config: The model's config, if there is none beside the weights.
        read_checkpoint: Reads the weights of a training checkpoint; provided by `cook.training`.

    Raises:
        UserError: the path cannot be read as a model, or the family is unknown.
    """
    path = Path(path)
    if path.is_file():
        tensors = open_safetensors([path]) if path.suffix == ".safetensors" else open_pt(path)
        found = config or _config_beside(path)
    elif any((path / name).is_file() for name in ("model.safetensors", INDEX)):
        tensors, found = open_safetensors_folder(path), read_model_config(path)
        _refuse_what_else_is_loaded(path, found)
    elif (path / "latest").is_file():
        checkpoint = _inner_checkpoint(path)
        if read_checkpoint is None:
            raise UserError(f"{path}: a training checkpoint cannot be used here", wanted="a model folder or a .pt file")
        found = dict(config or _config_beside(checkpoint / "latest"))
        found.pop(REMOVED, None)
        tensors = _whole(checkpoint, read_checkpoint(checkpoint))
    elif path.is_dir():
        raise _no_model_in(path)
    else:
        raise UserError(f"{path}: there is no such model", remedy="check the path")
    adapter = by_config(found)
    try:
        stored = Stored(tensors)
        native, own = adapter.read(found, stored)
    except UserError as error:
        raise UserError(f"{path}: {error.what}", wanted=error.wanted, got=error.got, remedy=error.remedy) from None
    return ModelSource(adapter=adapter, config=native, tensors=own, path=path, stored=stored)


def without_units(config: Mapping[str, Any], head_unit: HeadUnit, masks: Masks) -> dict[str, Any]:
    """The config.json of a checkpoint that contains the model without some units; `open_model` fills them up with 0.

    Args:
        config: The whole model's config.
        head_unit: The kind of attention unit that the masks count.
        masks: 0/1 per unit, by group name.
    """
    return {**config, REMOVED: {"head_unit": head_unit, "masks": {name: mask.tolist() for name, mask in masks.items()}}}


def with_biases(source: ModelSource) -> ModelSource:
    """The same model with biases of 0 in its output projections, where its class has a setting for them."""
    config = source.adapter.with_biases(source.config)
    if config == source.config:
        return source
    shapes = source.adapter.space(config).shapes
    tensors = source.tensors

    def zeros(path: str) -> torch.Tensor:
        return tensors[path.removesuffix("bias") + "weight"].new_zeros(shapes[path])

    readers = {path: partial(tensors.__getitem__, path) if path in tensors else partial(zeros, path) for path in shapes}
    return replace(source, config=config, tensors=LazyTensors(readers, shapes, getattr(tensors, "parts", None)))


def _whole(checkpoint: Path, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """A checkpoint's weights in the shapes of the whole model, before an adapter compares them with a config."""
    config = read_json(checkpoint / "config.json") if (checkpoint / "config.json").is_file() else {}
    removed = config.pop(REMOVED, None)
    if removed is None:
        return tensors
    adapter = by_config(config)
    native, _ = adapter.read(config, {})
    masks = {name: torch.tensor(mask) for name, mask in removed["masks"].items()}
    return filled_up(tensors, adapter.space(native, removed["head_unit"]), masks)


def _refuse_what_else_is_loaded(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuses folders with files that change what transformers loads and that would be ignored here."""
    names = sorted(path.name for path in folder.iterdir())
    adapter = next((name for name in names if name.startswith(("adapter_config.json", "adapter_model."))), None)
    if adapter:
        raise UserError(
            f"{folder}: contains an adapter, which would not be part of the result",
            got=adapter,
            remedy="merge it into the weights first (peft: model.merge_and_unload(), then save_pretrained), or remove "
            "its files from the folder to prune the weights without it",
        )
    part = next((name for name in names if re.match(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$", name)), None)
    if part:
        raise UserError(
            f"{folder}: contains model.safetensors and a distributed checkpoint, which transformers would load",
            got=part,
            remedy="move one of them to another folder",
        )
    if config.get("transformers_weights"):
        raise UserError(
            f"{folder}: config.json names its own file of weights",
            got=config["transformers_weights"],
            remedy="rename it to model.safetensors, and remove transformers_weights from config.json",
        )


def _no_model_in(folder: Path) -> UserError:
    names = sorted(path.name for path in folder.iterdir())
    remedy = None
    if "pytorch_model.bin" in names:
        remedy = f"save the model as safetensors: {CONVERT} (`cook reshape` also reads pytorch_model.bin, if named)"
    elif any(name.endswith((".bin", ".bin.index.json")) for name in names):
        remedy = f"save the model as safetensors: {CONVERT}"
    elif any(name.startswith("adapter_") for name in names):
        remedy = "an adapter is not a model: merge it into the weights that it was trained on, and use the result"
    elif any(name.endswith(".safetensors") for name in names):
        remedy = f"transformers reads model.safetensors, or the shards that {INDEX} lists; rename the files"
    return UserError(
        f"{folder}: there is no model in this folder",
        wanted="model.safetensors (or its shards) with config.json, or a training checkpoint with `latest`",
        got=", ".join(names[:8]) or "an empty folder",
        remedy=remedy,
    )


def unfilled_model(adapter: Adapter, config: Mapping[str, Any]) -> torch.nn.Module:
    """A model with uninitialised weights, which take no memory until they are written, and correct buffers."""
    with no_init_weights():
        model = adapter.build(config)
    model.tie_weights()  # type: ignore[operator]  # part of the initialisation
    return model


def load_model(
    source: ModelSource,
    dtype: torch.dtype | None = torch.float32,
    *,
    leave: Callable[[torch.nn.Module], Container[str]] = lambda model: (),
) -> torch.nn.Module:
    """Loads the whole model into memory, in eval mode, with weights of type `dtype`; None keeps the stored types.

    `leave` returns the names of weights that are not read and stay uninitialised.
    """
    model = unfilled_model(source.adapter, source.config)
    left = leave(model)
    read = ((name, source.tensors[name]) for name in source.tensors if name not in left)
    weights = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in read}
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    tied = {name: first[id(parameter)] for name, parameter in every.items() if first[id(parameter)] != name}
    # All names of a tied weight: which of them is kept, the model decides.
    weights |= {name: weights[own] for name, own in tied.items() if own in weights}
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:  # other shapes
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"{source.path}: the weights do not fit the model's config", got=reason) from None
    lacking = [name for name in missing if name not in tied and name not in left]
    if lacking or unexpected:
        problem = f"{lacking[0]!r} is missing" if lacking else f"{unexpected[0]!r} has no place in the model"
        raise UserError(f"{source.path}: the weights do not fit the model's config: {problem}")
    if tied:  # the embeddings are new tensors
        model.tie_weights()  # type: ignore[operator]
    return model.eval()


def placed(model: torch.nn.Module, device: torch.device | str, dtype: torch.dtype | None) -> torch.nn.Module:
    """Moves the model to a device and its weights to `dtype`; its buffers keep their types.

    `Module.to` would also round the frequencies of rotary positions, which gives wrong angles for distant tokens.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype or parameter.dtype)
    return model.to(device)


def _inner_checkpoint(path: Path) -> Path:
    # `latest` in a stage's checkpoint folder names the newest one, whose `latest` names the engine's folder.
    name = (path / "latest").read_text(errors="replace").strip()
    return path / name if re.fullmatch(r"step-\d+", name) and (path / name / "latest").is_file() else path


def _config_beside(file: Path) -> Mapping[str, Any]:
    for candidate in (file.with_suffix(".json"), file.parent / "config.json"):
        if candidate.is_file():
            config = read_json(candidate)
            if not isinstance(config, dict):
                raise UserError(f"{candidate}: not a model's config", wanted="a JSON object")
            return config
    raise UserError(
        f"{file}: no model config beside it",
        wanted=f"{file.with_suffix('.json').name} or config.json",
        remedy="set it with --model-config FILE.json (do_prune.py) or model.config (bmcook.json)",
    )
