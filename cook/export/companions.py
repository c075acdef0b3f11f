"""Copying of the files beside the weights: tokenizer, templates, generation config, sentence-transformers' modules.

All files that are not excluded are copied, so that no file with an unknown name is lost.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePath
from typing import Any

from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

from cook.base.errors import UserError
from cook.base.files import read_json, write_json

REPLACED = (
    "config.json README.md model*.safetensors *.index.json modeling_cook_*.py cook_experts.py masks cpm_live.*".split()
)
"""Files that the new model writes itself."""
WEIGHTS = (
    "*.safetensors *.bin *.pt *.pth *.ckpt *.ckpt.* *.h5 *.msgpack *.gguf *.ggml *.onnx *.onnx_data *.npz *.npy "
    "*.tflite *.ot *.pkl *.pickle *.mlmodel *.zip *.tar *.tar.* *.tgz *.pdparams".split()
)
"""Weights in other files or formats, which belong to the original model."""
TRAINING = (
    "optimizer* scheduler* rng_state* scaler* trainer_state.json training_args* latest zero_to_fp32.py global_step* "
    "checkpoint* step-* runs events.out.* log.jsonl done.json *.lock".split()
)
"""States and logs of a training run."""
CACHES = ".* __pycache__ *.pyc blobs refs".split()
EXCLUDED = {"training state": TRAINING, "an adapter's file": ["adapter_*"], "weights of the original model": WEIGHTS}
"""Patterns of names, by the reason shown to the user."""
LARGEST = 256 << 20
"""Larger files, in bytes, are not copied: no tokenizer has such a file."""


@dataclass(frozen=True, kw_only=True)
class Companions:
    """The files of a model folder other than its weights: copied or not."""

    copied: tuple[str, ...]
    """Paths of the copied files, relative to the folder."""
    left: tuple[tuple[str, str], ...]
    """Paths that were not copied, each with the reason. Files that the new model writes itself are not listed."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether a file of a tokenizer is among those copied."""
        return any(name.startswith(("tokenizer", "vocab", "spiece", "sentencepiece", "merges")) for name in self.copied)


def copy_companions(source: Path, folder: Path) -> Companions:
    """Copies the files of the model at `source`, except its weights, into `folder`; existing files are not replaced."""
    copied, left = [], []
    for path, reason in _companions(source) if source.is_dir() else ():
        name = path.relative_to(source).as_posix()
        if reason:
            left.append((name, reason))
        elif not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
            copied.append(name)
    return Companions(copied=tuple(copied), left=tuple(left))


def _companions(source: Path) -> Iterator[tuple[Path, str]]:
    """Every file beside the weights, and the reason why it is not copied; "" if it is copied."""
    modules = _module_folders(source)
    for path in sorted(source.iterdir()):
        if _matches(path.name, (*REPLACED, *CACHES)):
            continue
        if path.name in modules and path.is_dir() and not path.is_symlink():
            yield from ((file, _obstacle(file, source)) for file in _files(path))
        elif reason := next((reason for reason, names in EXCLUDED.items() if _matches(path.name, names)), ""):
            yield path, reason
        elif path.is_dir() and not path.is_symlink():
            files = list(_files(path))
            if any(_matches(file.name, (*WEIGHTS, "config.json")) for file in files):
                yield path, "another model, or weights of the original model"
            else:
                yield from ((file, _obstacle(file, source)) for file in files)
        else:
            yield path, _obstacle(path, source)


def _files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if _matches(path.name, CACHES):
            continue
        if path.is_dir() and not path.is_symlink():
            yield from _files(path)
        else:
            yield path


def _module_folders(source: Path) -> set[str]:
    """The folders of sentence-transformers' modules after the model, whose weights are not part of it."""
    try:
        listed = read_json(source / "modules.json")
    except UserError:
        return set()
    paths = [module.get("path") for module in listed if isinstance(module, dict)] if isinstance(listed, list) else []
    return {PurePath(path).parts[0] for path in paths if isinstance(path, str) and PurePath(path).parts}


def _obstacle(path: Path, source: Path) -> str:
    if path.is_symlink():
        # The cache of a hub stores files in `blobs` and links to them from the folder of a revision.
        homes = [source.resolve()]
        if source.resolve().parent.name == "snapshots":
            homes.append(source.resolve().parent.parent / "blobs")
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return "a broken link"
        if not any(target.is_relative_to(home) for home in homes):
            return "a link to a file outside the folder"
    if not path.is_file():
        return "not a regular file"
    return f"larger than {LARGEST >> 20} MiB" if path.stat().st_size > LARGEST else ""


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def name_tokenizer_class(folder: Path, stock_type: str) -> None:
    """Writes the tokenizer's class into its config if AutoTokenizer would have derived it from the model type.

    The model type of `folder` is one that transformers does not know; `stock_type` is the original one.
    """
    file = folder / "tokenizer_config.json"
    settings: Any = read_json(file) if file.is_file() else {}
    registered = TOKENIZER_MAPPING_NAMES.get(stock_type)
    files = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))
    if not files or registered is None or not isinstance(settings, dict) or "auto_map" in settings:
        return
    # transformers overrides the class in published folders of some types.
    if stock_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS or "tokenizer_class" not in settings:
        write_json(file, settings | {"tokenizer_class": registered})
