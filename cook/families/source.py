"""A model wherever it lies: a Hugging Face folder, a `.pt` state dict with its JSON, or a training checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.initialization import no_init_weights

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.base.tensor_files import INDEX, open_pt, open_safetensors, open_safetensors_folder, read_model_config
from cook.families.registry import by_config
from cook.pruning.family import Adapter, ModelSource, Stored

CONVERT = "load the folder with transformers' from_pretrained, and save it with save_pretrained"
ReadCheckpoint = Callable[[Path], Mapping[str, torch.Tensor]]


def open_model(
    path: str | Path, *, config: Mapping[str, Any] | None = None, read_checkpoint: ReadCheckpoint | None = None
) -> ModelSource:
    """Opens a model without reading its weights yet.

    Args:
        path: A Hugging Face folder, a `.pt` file, or a checkpoint's folder.
        config: The model's config where none lies beside the weights.
        read_checkpoint: Reads the weights of a training checkpoint, which only the training room can.

    Raises:
        UserError: nothing there that can be read as a model, or an unknown family.
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
        found = config or _config_beside(checkpoint / "latest")
        tensors = read_checkpoint(checkpoint)
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


def _refuse_what_else_is_loaded(folder: Path, config: Mapping[str, Any]) -> None:
    """Files beside the weights that change what transformers loads, and that would be lost here."""
    names = sorted(path.name for path in folder.iterdir())
    adapter = next((name for name in names if name.startswith(("adapter_config.json", "adapter_model."))), None)
    if adapter:
        raise UserError(
            f"{folder}: an adapter lies beside the weights, and would not be part of the result",
            got=adapter,
            remedy="merge it into the weights first (peft: model.merge_and_unload(), then save_pretrained), or take "
            "its files out of the folder to prune the weights without it",
        )
    part = next((name for name in names if re.match(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors$", name)), None)
    if part:
        raise UserError(
            f"{folder}: a distributed checkpoint lies beside model.safetensors, and transformers loads that one",
            got=part,
            remedy="move one of them to a folder of its own",
        )
    if config.get("transformers_weights"):
        raise UserError(
            f"{folder}: config.json names a file of weights of its own",
            got=config["transformers_weights"],
            remedy="name it model.safetensors, and take transformers_weights out of config.json",
        )


def _no_model_in(folder: Path) -> UserError:
    names = sorted(path.name for path in folder.iterdir())
    remedy = None
    if "pytorch_model.bin" in names:
        remedy = f"name the file, {folder / 'pytorch_model.bin'}, or save the model as safetensors: {CONVERT}"
    elif any(name.endswith((".bin", ".bin.index.json")) for name in names):
        remedy = f"save the model as safetensors: {CONVERT}"
    elif any(name.startswith("adapter_") for name in names):
        remedy = "an adapter is not a model: merge it into the weights that it was trained on, and name the result"
    elif any(name.endswith(".safetensors") for name in names):
        remedy = f"transformers reads model.safetensors, or the shards that {INDEX} lists: name the files so"
    return UserError(
        f"{folder}: no model in this folder",
        wanted="model.safetensors (or its shards) with config.json, or a training checkpoint with `latest`",
        got=", ".join(names[:8]) or "an empty folder",
        remedy=remedy,
    )


def unfilled_model(adapter: Adapter, config: Mapping[str, Any]) -> torch.nn.Module:
    """A model whose weights are anything: they take no memory until they are written. Its buffers are right."""
    with no_init_weights():
        model = adapter.build(config)
    model.tie_weights()  # type: ignore[operator]  # a part of the initialisation
    return model


def load_model(source: ModelSource, dtype: torch.dtype | None = torch.float32) -> torch.nn.Module:
    """The whole model in memory, in eval mode.

    Args:
        source: The model.
        dtype: Of its weights; None leaves each as it is stored.

    Raises:
        UserError: the weights do not fit the config.
    """
    model = unfilled_model(source.adapter, source.config)
    weights = {
        name: tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        for name, tensor in source.tensors.items()
    }
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied -= {name for name, _ in model.named_parameters()}
    try:
        missing, strange = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:  # other shapes
        raise UserError(f"{source.path}: the weights do not fit the model's config", got=_last_line(error)) from None
    lacking = [name for name in missing if name not in tied]
    if lacking or strange:
        problem = f"{lacking[0]!r} is missing" if lacking else f"{strange[0]!r} has no place in the model"
        raise UserError(f"{source.path}: the weights do not fit the model's config: {problem}")
    if tied:  # the tables are other tensors now
        model.tie_weights()  # type: ignore[operator]
    return model.eval()


def placed(model: torch.nn.Module, device: torch.device | str, dtype: torch.dtype | None) -> torch.nn.Module:
    """The model on a device with its weights in `dtype`; its buffers keep theirs.

    `Module.to` would round the frequencies of rotary positions with the weights, by which distant tokens end up at
    wrong angles.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype or parameter.dtype)
    return model.to(device)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1].strip()


def _inner_checkpoint(path: Path) -> Path:
    # The folder of all checkpoints of a stage points to its newest one, which points to its engine's files.
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
        remedy="name it: --model-config FILE.json (do_prune.py) or model.config (bmcook.json)",
    )
