"""Loading of causal language models for evaluation: cook's folders, stock folders, dense models with masks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cook.base.device import cpu_has_fast_bf16
from cook.base.errors import UserError, library_errors
from cook.base.tensor_files import read_model_config
from cook.config.kinds import FINE
from cook.export.pruned_folder import mask_model, open_masks
from cook.families.registry import knows, stock_type
from cook.families.source import load_model, open_model, placed
from cook.families.streamed import fits_into_memory, streamed_model
from cook.pruning.family import ModelSource
from cook.text.hf import check_tokenizer_file, open_backend

MASKS = ("coarse", *FINE)
"""The mask files of a model: of blocks, and of each kind inside them."""
FORM = "[NAME=]DIR" + "".join(f"[,{kind}=FILE]" for kind in MASKS)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A model to evaluate, as named by the user."""

    name: str
    folder: str
    masks: Mapping[str, str] = field(default_factory=dict)
    """The mask files to apply to it, by their names in `MASKS`."""


def parse_entry(text: str) -> Entry:
    """`[NAME=]DIR`, and for each mask `,KIND=FILE`, with KIND one of `MASKS`; the default name is the folder's.

    Raises:
        UserError: the folder is missing, or a kind of mask is given twice.
    """
    first, *others = re.split(rf",(?=(?:{'|'.join(MASKS)})=)", text)
    name, equals, folder = first.partition("=")
    if not equals or "/" in name:  # the folder's path may contain "=" too
        name, folder = "", first
    if (strange := re.search(r",(\w+)=", folder)) and not Path(folder).exists():
        raise UserError(f"{text}: there is no mask {strange[1]!r}", wanted=", ".join(MASKS))
    masks = [other.split("=", 1) for other in others]
    if not folder or not all(path for _, path in masks) or len({kind for kind, _ in masks}) < len(masks):
        raise UserError(f"not a model: {text!r}", wanted=FORM)
    return Entry(name=name or Path(folder).name or folder, folder=folder, masks=dict(masks))


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A loaded model."""

    entry: Entry
    model: torch.nn.Module
    tokenizer: Any
    streamed: bool = False
    """Whether each layer's weights are read from the files when it computes."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load(
    entry: Entry, *, trust_remote_code: bool, dtype: str = "auto", device: str = "cpu", weights: str = "auto"
) -> Loaded:
    """Loads a model and its tokenizer; families that cook knows need no remote code.

    `dtype` is `auto` (see `automatic_dtype`) or the name of a floating type. `weights` is `memory`, `disk`, for
    layers that are read when they compute, or `auto`: `disk` for a model that does not fit into memory.

    Raises:
        UserError: the model or the tokenizer cannot be loaded, or the masks belong to another model.
    """
    chosen = automatic_dtype(device) if dtype == "auto" else getattr(torch, dtype)
    streamed = False
    folder = Path(entry.folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: not a model folder", wanted="config.json, safetensors and tokenizer files")
    try:
        tokenizer = load_tokenizer(folder, trust_remote_code)
        source = known_source(folder)
        if source is not None:
            fits = weights == "memory" or (weights == "auto" and fits_into_memory(source, chosen, device))
            streamed = not fits
            model = streamed_model(source, chosen, device) if streamed else load_model(source, dtype=None)
        elif weights == "disk":
            wanted = "a family that cook knows, with weights of a floating-point type"
            raise UserError(f"{folder}: --weights disk does not work with this model", wanted=wanted)
        else:
            from transformers import AutoConfig, AutoModelForCausalLM

            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            config._attn_implementation = None  # the value may name a kernel to download
            model = AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=trust_remote_code)
    except (
        OSError,
        ValueError,
        RuntimeError,
        ImportError,
    ) as error:  # RuntimeError: weights that do not fit the config
        reason = (str(error) or type(error).__name__).splitlines()[0]
        # transformers imports the package of a quantized model when it loads it.
        missing = isinstance(error, ImportError) and bool(read_model_config(folder).get("quantization_config"))
        remedy = "pip install 'cook[quantization]'" if missing else None
        if "trust_remote_code" in str(error):
            remedy = "read the modeling file in the folder, and let it run with --trust-remote-code"
        raise UserError(f"{folder}: cannot be loaded", got=reason, remedy=remedy) from None
    if entry.masks and source is None:
        raise UserError(f"{folder}: masks can be applied only to a family that cook knows")
    model = model if streamed else placed(model.eval(), device, chosen)
    if entry.masks and source is not None:
        space, masks = open_masks(source, **entry.masks)
        mask_model(model, space, {name: mask.to(device) for name, mask in masks.items()})
    return Loaded(entry=entry, model=model, tokenizer=tokenizer, streamed=streamed)


def automatic_dtype(device: str) -> torch.dtype | None:
    """bfloat16 on a GPU; on a CPU as stored (None), or float32 if the CPU would emulate bf16 many times more slowly."""
    if device != "cpu":
        return torch.bfloat16
    return None if cpu_has_fast_bf16() else torch.float32


def load_tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    if not (folder / "tokenizer.json").is_file():
        return open_backend(str(folder), trust_remote_code=trust_remote_code)
    check_tokenizer_file(folder)
    with library_errors(f"{folder}: its tokenizer cannot be read"):
        # AutoTokenizer would ask for trust in the modeling file, which a tokenizer.json does not need.
        return PreTrainedTokenizerFast.from_pretrained(folder)


def known_source(folder: Path) -> ModelSource | None:
    """The model of a folder, if cook knows its family; a quantized one is loaded by transformers."""
    config = read_model_config(folder)
    known = stock_type(config) is not None and knows(config) and not config.get("quantization_config")
    return open_model(folder) if known else None
