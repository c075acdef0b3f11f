"""The files that go along with a model: tokenizer, templates, generation config, sentence-transformers' modules.

Everything goes that is not on a list of exclusions, so that no file is lost for having a name that nobody foresaw.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
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
    "config.json",
    "README.md",
    "model*.safetensors",
    "*.index.json",
    "modeling_cook_*.py",
    "masks",
    "cpm_live.*",
)
"""Files that the new model has of its own."""
WEIGHTS = (
    "*.safetensors",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.ckpt.*",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.ggml",
    "*.onnx",
    "*.onnx_data",
    "*.npz",
    "*.npy",
    "*.tflite",
    "*.ot",
    "*.pkl",
    "*.pickle",
    "*.mlmodel",
    "*.zip",
    "*.tar",
    "*.tar.*",
    "*.tgz",
    "*.pdparams",
)
"""Weights in other files or formats: they are those of the model before."""
TRAINING = (
    "optimizer*",
    "scheduler*",
    "rng_state*",
    "scaler*",
    "trainer_state.json",
    "training_args*",
    "latest",
    "zero_to_fp32.py",
    "global_step*",
    "checkpoint*",
    "step-*",
    "runs",
    "events.out.*",
    "log.jsonl",
    "done.json",
    "*.lock",
)
"""States and logs of a training run."""
ADAPTERS = ("adapter_*",)
CACHES = (".*", "__pycache__", "*.pyc", "blobs", "refs")
EXCLUDED = {
    "training state": TRAINING,
    "an adapter's file": ADAPTERS,
    "weights of the model before": WEIGHTS,
}
"""Patterns of names by the reason to tell."""
LARGEST = 256 << 20
"""Bytes of a file above which it is left: no tokenizer has such a file."""


@dataclass(frozen=True, kw_only=True)
class Companions:
    """What was done with the files of a model folder that are not its weights."""

    copied: tuple[str, ...]
    """Paths in the folder."""
    left: tuple[tuple[str, str], ...]
    """Paths that did not go along, and the reason of each. What the new model has of its own is not listed."""

    @property
    def has_tokenizer(self) -> bool:
        """Whether a file of a tokenizer is among those copied."""
        begins = ("tokenizer", "vocab", "spiece", "sentencepiece", "merges")
        return any(name.startswith(begins) for name in self.copied)


def copy_companions(source: Path, folder: Path) -> Companions:
    """Copies into `folder` what belongs to the model at `source` and is not its weights; nothing there is replaced."""
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
    """Every file beside the weights, and why it stays behind; "" if it goes along."""
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
                yield path, "another model, or weights of the model before"
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
    """The folders of sentence-transformers' modules behind the model, whose weights are no part of it."""
    try:
        listed = read_json(source / "modules.json")
    except UserError:
        return set()
    paths = [module.get("path") for module in listed if isinstance(module, dict)] if isinstance(listed, list) else []
    return {PurePath(path).parts[0] for path in paths if isinstance(path, str) and PurePath(path).parts}


def _obstacle(path: Path, source: Path) -> str:
    if path.is_symlink():
        # A hub's cache keeps its files in `blobs`, and links to them from the folder of a revision.
        homes = [source.resolve()]
        if source.resolve().parent.name == "snapshots":
            homes.append(source.resolve().parent.parent / "blobs")
        try:
            target = path.resolve(strict=True)
        except (OSError, RuntimeError):
            return "a link that leads nowhere"
        if not any(target.is_relative_to(home) for home in homes):
            return "a link that leads out of the folder"
    if not path.is_file():
        return "no plain file"
    return f"larger than {LARGEST >> 20} MiB" if path.stat().st_size > LARGEST else ""


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def name_tokenizer_class(folder: Path, stock_type: str) -> None:
    """Writes down the tokenizer's class where AutoTokenizer would have found it by the type of the model.

    Args:
        folder: A model folder whose type of model transformers does not know.
        stock_type: The type of the model before.
    """
    file = folder / "tokenizer_config.json"
    settings: Any = read_json(file) if file.is_file() else {}
    registered = TOKENIZER_MAPPING_NAMES.get(stock_type)
    files = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt"))
    if not files or registered is None or not isinstance(settings, dict) or "auto_map" in settings:
        return
    # transformers overrides what published folders of some types say.
    if stock_type in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS or "tokenizer_class" not in settings:
        write_json(file, settings | {"tokenizer_class": registered})
