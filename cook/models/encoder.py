"""Encoders with a task's head, from wherever they lie: a Hugging Face folder or name, or Google's original folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizer,
)

from cook.base.errors import UserError, library_errors
from cook.base.files import write_json
from cook.base.tensor_files import ShardWriter, read_model_config
from cook.config.stock import check_counts, stock_config
from cook.models.google_bert import is_google_folder, open_google_weights, read_google_config
from cook.vocab.hf import open_backend

Head = Literal["classes", "score", "span"]
"""What a model predicts: a row's class, a row's score, or the first and last token of an answer."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder with a head, on disk or half new: its config, and its weights in fp32."""

    config: Any
    """Hugging Face's config object."""
    head: Head
    """Which head it has."""
    weights: dict[str, torch.Tensor]
    """Every parameter by name; those of a new head freshly drawn."""
    fresh: tuple[str, ...]
    """Names of the parameters that the source did not hold."""
    tokenizer: Any
    """A fast tokenizer."""
    max_length: int | None
    """Tokens of the longest row that the model has positions for; None where nothing limits them."""

    def build(self) -> torch.nn.Module:
        """A model of this config; its weights are still to be loaded."""
        return _auto_class(self.head).from_config(self.config)


def open_encoder(source: str, head: Head, labels: Sequence[str], seed: int) -> Encoder:
    """Opens an encoder and gives it a head for a task, a fresh one where it has none that fits.

    Args:
        source: A Hugging Face folder or Hub name, or a folder as Google distributed BERT.
        head: The kind of head.
        labels: Names of the classes, in the order of their ids; one name for a score; unused for spans.
        seed: Of a fresh head's weights.

    Raises:
        UserError: nothing there that can be read as an encoder.
    """
    folder = Path(source)
    google = is_google_folder(folder)
    if google:
        config = stock_config(BertConfig, read_google_config(folder))
    else:
        if (folder / "config.json").is_file():
            check_counts(read_model_config(folder))
        config = _hub(AutoConfig, source)
        config._attn_implementation = None  # it may be the name of a kernel to download
        if getattr(config, "quantization_config", None):
            raise UserError(f"{source}: the model is quantized", remedy="dequantize it first, or take the one before")
    if head != "span":
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: number for number, label in enumerate(labels)}
    wrong = f"{source}: not an encoder that can carry this task's head"
    with library_errors(wrong), torch.device("meta"):
        _check_size(source, _auto_class(head).from_config(config))
    with library_errors(wrong), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _auto_class(head).from_config(config)
    found = open_google_weights(folder) if google else _hub_weights(source, head, config)
    weights, fresh = {}, []
    for name, parameter in model.named_parameters():
        tensor = found[name] if name in found else None
        if tensor is None or (tensor.shape != parameter.shape and not name.startswith(model.base_model_prefix)):
            fresh.append(name)
            tensor = parameter.detach()
        weights[name] = tensor.detach().float().clone()
    body = [name for name in fresh if name.startswith(model.base_model_prefix) and "pooler" not in name]
    if body:
        raise UserError(f"{source}: the weights lack {body[0]}", remedy="give a folder with the whole encoder")
    config.architectures = [type(model).__name__]
    return Encoder(
        config=config, head=head, weights=weights, fresh=tuple(fresh), tokenizer=_open_tokenizer(source, google),
        max_length=_longest_row(model, config),
    )  # fmt: skip


def load_encoder(folder: Path, head: Head) -> torch.nn.Module:
    """A whole model in fp32 and eval mode, from a folder that this project wrote: its own modeling file may run."""
    return _hub(_auto_class(head), str(folder), dtype=torch.float32, trust_remote_code=True).eval()


def write_encoder(
    folder: Path, config: Any, weights: Iterable[tuple[str, torch.Tensor]], tokenizer: Any | None
) -> None:
    """Writes a Hugging Face folder: weights as they come, config, tokenizer.

    Args:
        folder: Made when missing.
        config: Hugging Face's config object.
        weights: Names and tensors.
        tokenizer: Saved too, if given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ShardWriter(folder, 2 << 30) as writer:
        for name, tensor in weights:
            writer.add(name, tensor)
    write_json(folder / "config.json", {**config.to_dict(), "dtype": "float32"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _auto_class(head: Head) -> Any:
    return AutoModelForQuestionAnswering if head == "span" else AutoModelForSequenceClassification


def _hub(kind: Any, source: str, **options: Any) -> Any:
    with library_errors(
        f"{source}: no model to open",
        wanted="a Hugging Face folder or Hub name, or a folder with bert_config.json, vocab.txt, bert_model.ckpt.*",
        remedy="check the path; without a network, name a folder",
    ):
        return kind.from_pretrained(source, **{"trust_remote_code": False, **options})


def _check_size(source: str, model: torch.nn.Module) -> None:
    """Refuses a config whose model is larger than the files of its folder before memory is taken for it."""
    files = [path for path in Path(source).iterdir() if path.is_file()] if Path(source).is_dir() else []
    held, described = sum(path.stat().st_size for path in files), sum(p.numel() for p in model.parameters())
    if files and described > held:
        raise UserError(
            f"{source}: the weights do not fit the model's config",
            wanted=f"{described:,} parameters, by the config", got=f"files of {held:,} bytes in all",
        )  # fmt: skip


def _longest_row(model: torch.nn.Module, config: Any) -> int | None:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # Positions of RoBERTa begin behind the padding's id.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _hub_weights(source: str, head: Head, config: Any) -> Mapping[str, torch.Tensor]:
    # transformers itself knows where a Hub name's files lie and how old checkpoints call their tensors.
    model, notes = _hub(
        _auto_class(head), source, config=config, dtype=torch.float32, output_loading_info=True,
        ignore_mismatched_sizes=True,
    )  # fmt: skip
    missing = set(notes["missing_keys"]) | {entry[0] for entry in notes.get("mismatched_keys", ())}
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name not in missing}


def _open_tokenizer(source: str, google: bool) -> Any:
    vocabulary = Path(source) / "vocab.txt"
    has_settings = any((Path(source) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not google and (has_settings or not vocabulary.is_file()):
        return open_backend(source, use_fast=True)
    if not vocabulary.is_file():
        raise UserError(f"{vocabulary}: there is no such file", wanted="the vocabulary beside the weights")
    # Google's folders do not say whether they are cased; their vocabularies do.
    with library_errors(f"{source}: its tokenizer cannot be read"):
        words = vocabulary.read_text(encoding="utf-8").split("\n")
        cased = any(word != word.lower() for word in words if not word.startswith("["))
        return BertTokenizer(vocab=str(vocabulary), do_lower_case=not cased)
