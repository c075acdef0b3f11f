"""Encoders with a task head, from a Hugging Face folder or name, or from Google's original folder."""

from __future__ import annotations

import copy
import re
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
from cook.config.facts import check_counts, stock_config
from cook.families.google_bert import is_google_folder, open_google_weights, read_google_config
from cook.text.hf import open_backend

Head = Literal["classes", "score", "span"]  # a row's class, a row's score, or an answer's first and last token


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """An encoder with a head that is read or new: its config, and its weights in fp32."""

    config: Any  # Hugging Face's config object
    head: Head
    weights: dict[str, torch.Tensor]  # every parameter by name; those of a new head are randomly initialised
    fresh: tuple[str, ...]  # names of the parameters that the source does not contain
    notes: tuple[str, ...]  # messages about the classes of the source's head, if they differ from the task's
    tokenizer: Any  # a fast tokenizer
    max_length: int | None  # the maximum number of tokens per row; None if it is not limited

    def build(self) -> torch.nn.Module:
        """A model of this config; its weights are not loaded yet."""
        model: torch.nn.Module = _fresh(self.head, self.config)
        return model


def open_encoder(
    source: str, head: Head, labels: Sequence[str], seed: int, *, words: Sequence[str] | None = None
) -> Encoder:
    """Opens an encoder with a head for a task; the head is new if the source has no matching one.

    The classes of a trained head are matched by name. A head with another order is reordered; a head with other classes
    is not used.

    Args:
        source: A Hugging Face folder or Hub name, or a folder as Google distributed BERT.
        head: The kind of head.
        labels: Names of the classes, in the order of their ids; one name for a score; unused for spans.
        seed: The seed of a new head's weights.
        words: Other names of the same classes, in the same order.

    Raises:
        UserError: the source cannot be read as an encoder.
    """
    folder, google = Path(source), is_google_folder(Path(source))
    config = stock_config(BertConfig, read_google_config(folder)) if google else _hub_config(source)
    matched = _Classes(names=tuple(labels), order=tuple(range(len(labels))))
    if head == "classes":
        matched = _matched_classes([str(config.id2label[key]) for key in sorted(config.id2label)], labels, words)
    if head != "span":
        config.id2label = dict(enumerate(matched.names))
        config.label2id = {label: number for number, label in enumerate(matched.names)}
    wrong = f"{source}: this model cannot be used with the head of this task"
    with library_errors(wrong), torch.device("meta"):
        _check_size(source, _fresh(head, config))
    with library_errors(wrong), torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _fresh(head, config)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    found = open_google_weights(folder, shapes) if google else _hub_weights(source, head, config)
    outputs = _output_weights(model, config) if head == "classes" else ()
    weights, fresh = {}, []
    for name, parameter in model.named_parameters():
        tensor = found[name] if name in found else None
        misfit = tensor is not None and tensor.shape != parameter.shape and not name.startswith(model.base_model_prefix)
        if tensor is None or misfit or (name in outputs and not matched.order):
            fresh.append(name)
            tensor = parameter.detach()
        elif name in outputs:
            tensor = tensor[list(matched.order)]
        weights[name] = tensor.detach().float().clone()
    had_head = any(name in found for name in outputs)
    body = [name for name in fresh if name.startswith(model.base_model_prefix) and "pooler" not in name]
    if body:
        raise UserError(
            f"{source}: the weights lack {body[0]}, or it has another size than in the config",
            remedy="use a folder with the whole encoder",
        )
    config.architectures = [type(model).__name__]
    return Encoder(
        config=config,
        head=head,
        weights=weights,
        fresh=tuple(fresh),
        notes=(f"{source}: {matched.note}",) if matched.note and (had_head or not matched.order) else (),
        tokenizer=_open_tokenizer(source, google),
        max_length=_longest_row(model, config),
    )


@dataclass(frozen=True, kw_only=True)
class _Classes:
    """The classes of a source's head, matched with a task's classes."""

    names: tuple[str, ...]  # in the order of the task's ids
    order: tuple[int, ...]  # the head's row for every id of the task; empty if the head has other classes
    note: str = ""  # a message about the match


def _matched_classes(own: Sequence[str], labels: Sequence[str], words: Sequence[str] | None) -> _Classes:
    """Matches the classes of a source, in the order of its rows, with a task's classes."""
    rows, listed = tuple(range(len(labels))), f"{', '.join(own[:8])}{', …' if len(own) > 8 else ''}"
    if all(name == f"LABEL_{number}" for number, name in enumerate(own)):  # transformers' default names
        note = f"the head's classes have no names ({listed}): they are assumed to be {', '.join(labels)}, in this order"
        return _Classes(names=tuple(labels), order=rows, note=note)
    row_of = {_plain(name): row for row, name in enumerate(own)}
    for wanted in (labels, words or ()):
        keys = [_plain(name) for name in wanted]
        if len(own) == len(labels) == len(row_of) and sorted(keys) == sorted(row_of):
            order = tuple(row_of[key] for key in keys)
            note = f"the head's classes are in another order ({listed}): its rows are reordered"
            return _Classes(names=tuple(own[row] for row in order), order=order, note=note if order != rows else "")
    wanted_names = ", ".join(labels) + (f" ({', '.join(words)})" if words else "")
    note = f"the head's classes are {listed}, not {wanted_names}; if they are the same, rename them in config.json"
    return _Classes(names=tuple(labels), order=(), note=note)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _output_weights(model: torch.nn.Module, config: Any) -> tuple[str, ...]:
    """Names of the parameters with one row per class, found by changing the number of classes."""
    larger = copy.deepcopy(config)
    larger.num_labels = config.num_labels + 1
    with torch.device("meta"):
        other = dict(AutoModelForSequenceClassification.from_config(larger).named_parameters())
    return tuple(name for name, parameter in model.named_parameters() if parameter.shape != other[name].shape)


def load_encoder(folder: Path, head: Head) -> torch.nn.Module:
    """Loads a model in fp32 and eval mode from a folder that cook wrote, whose modeling file may run."""
    model: torch.nn.Module = _hub(_auto_class(head), str(folder), dtype=torch.float32, trust_remote_code=True)
    return model.eval()


def write_encoder(
    folder: Path, config: Any, weights: Iterable[tuple[str, torch.Tensor]], tokenizer: Any | None
) -> None:
    """Writes a Hugging Face folder, created if missing: weights as they arrive, config, tokenizer if given."""
    with ShardWriter(folder) as writer:
        for name, tensor in weights:
            writer.add(name, tensor)
    write_json(folder / "config.json", {**config.to_dict(), "dtype": "float32"})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _auto_class(head: Head) -> Any:
    return AutoModelForQuestionAnswering if head == "span" else AutoModelForSequenceClassification


def _fresh(head: Head, config: Any) -> Any:
    return _auto_class(head).from_config(config)


def _hub_config(source: str) -> Any:
    if (Path(source) / "config.json").is_file():
        check_counts(read_model_config(Path(source)))
    config = _hub(AutoConfig, source)
    config._attn_implementation = None  # the value may name a kernel to download
    if getattr(config, "quantization_config", None):
        raise UserError(f"{source}: the model is quantized", remedy="dequantize it first, or use the original model")
    return config


def _hub(kind: Any, source: str, **options: Any) -> Any:
    with library_errors(
        f"{source}: there is no model",
        wanted="a Hugging Face folder or Hub name, or a folder with bert_config.json, vocab.txt, bert_model.ckpt.*",
        remedy="check the path; without a network, use a folder",
    ):
        return kind.from_pretrained(source, **{"trust_remote_code": False, **options})


def _check_size(source: str, model: torch.nn.Module) -> None:
    """Checks, before allocating memory, that the config's model is not larger than the files of its folder."""
    files = [path for path in Path(source).iterdir() if path.is_file()] if Path(source).is_dir() else []
    held, described = sum(path.stat().st_size for path in files), sum(p.numel() for p in model.parameters())
    if files and described > held:
        raise UserError(
            f"{source}: the weights do not fit the model's config",
            wanted=f"{described:,} parameters, from the config",
            got=f"files of {held:,} bytes in all",
        )


def _longest_row(model: torch.nn.Module, config: Any) -> int | None:
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            # Positions of RoBERTa begin after the padding id.
            return module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1)
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def _hub_weights(source: str, head: Head, config: Any) -> Mapping[str, torch.Tensor]:
    # transformers finds the files of a Hub name and renames the tensors of old checkpoints.
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, notes = _hub(_auto_class(head), source, config=config, **options)
    missing = set(notes["missing_keys"]) | {entry[0] for entry in notes.get("mismatched_keys", ())}
    return {name: parameter.detach() for name, parameter in model.named_parameters() if name not in missing}


def _open_tokenizer(source: str, google: bool) -> Any:
    vocabulary = Path(source) / "vocab.txt"
    has_settings = any((Path(source) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    if not google and (has_settings or not vocabulary.is_file()):
        return open_backend(source, use_fast=True)
    if not vocabulary.is_file():
        raise UserError(f"{vocabulary}: there is no such file", wanted="the vocabulary beside the weights")
    # Google's folders do not state whether they are cased; their vocabularies show it.
    with library_errors(f"{source}: its tokenizer cannot be read"):
        words = vocabulary.read_text(encoding="utf-8").split("\n")
        cased = any(word != word.lower() for word in words if not word.startswith("["))
        return BertTokenizer(vocab=str(vocabulary), do_lower_case=not cased)
