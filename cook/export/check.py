"""Checks, by names and shapes, that a reshaped model lost no weight of the original files."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from cook.base.errors import UserError
from cook.base.tensor_files import open_safetensors_folder, read_model_config, shapes_of
from cook.families.source import open_model
from cook.models import ragged
from cook.pruning.counts import kept_shapes
from cook.pruning.family import ModelConfig, ModelSource
from cook.pruning.units import PruningSpace

LAYER = re.compile(r"(.*?)\.?(?<![^.])\d+\.")
AUTO_CLASSES = {
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForMultipleChoice": "multiple-choice",
    "AutoModelForNextSentencePrediction": "text-classification",
    "AutoModelForPreTraining": "fill-mask",
    "AutoModel": "feature-extraction",
}
"""Classes that load a model, in the order in which they are tried, and the task name of their models on a hub."""


@dataclass(frozen=True, kw_only=True)
class Account:
    """How every tensor in a model's files is handled."""

    carried: tuple[str, ...]
    """Names of tensors that the model does not use, such as heads of other tasks; they are copied unchanged."""
    duplicates: tuple[str, ...]
    """Second copies of tied weights, which are left out."""
    recomputed: tuple[str, ...]
    """Tables that the model computes itself."""
    outgrown: tuple[str, ...] = ()
    """Heads of other tasks that are left out, since their inputs are the hidden dimensions before pruning."""


def account(source: ModelSource, space: PruningSpace) -> Account:
    """Assigns every tensor of the model's files to its place in the result.

    Raises:
        UserError: a tensor has no place.
    """
    files = _files(source)
    used = source.stored_for(space.shapes) if source.stored else set(space.shapes)
    rest = [name for name in files if name not in used]
    if not rest:
        return Account(carried=(), duplicates=(), recomputed=())
    with torch.device("meta"):
        model: Any = source.adapter.build(source.config)
    tied, tables = _tied(model), {name for name, _ in model.named_buffers()} - set(model.state_dict())
    patterns = (r"\.rotary_emb\.inv_freq$", r"\.masked_bias$", *(model._keys_to_ignore_on_load_unexpected or ()))
    layers = {found[1] for group in space.groups if (found := LAYER.match(group.gate.module))}
    prefix = f"{model.base_model_prefix}."
    names = {file: own for own, file in source.adapter.file_names(source.config).items()}
    carried, duplicates, recomputed = [], [], []
    for name in rest:
        spellings = (names.get(name, name), name, prefix + name, name.removeprefix(prefix))
        own = next((n for n in spellings if n in tied or n in tables), name)
        layer = LAYER.match(name)
        if own in tied:
            if not torch.equal(files[name], source.tensors[tied[own]]):
                raise UserError(
                    f"{source.path}: {name!r} differs from {tied[own]!r}, but the config ties the two",
                    remedy="set tie_word_embeddings to false in its config.json, or remove the tensor from the file",
                )
            duplicates.append(name)
        elif own in tables or any(re.search(pattern, name) for pattern in patterns):
            recomputed.append(name)
        elif layer and any(layer[1] in (known, known.removeprefix(prefix)) for known in layers):
            raise UserError(
                f"{source.path}: the weights do not fit the model's config: {name!r} has no place in the model"
            )
        else:
            carried.append(name)
    return Account(carried=tuple(carried), duplicates=tuple(duplicates), recomputed=tuple(recomputed))


def _files(source: ModelSource) -> Mapping[str, torch.Tensor]:
    return source.stored or source.tensors


def _tied(model: torch.nn.Module) -> dict[str, str]:
    """The names of tied weights, each with the first name of the same weight."""
    first: dict[torch.Tensor, str] = {}
    names = [(name, first.setdefault(weight, name)) for name, weight in model.named_parameters(remove_duplicate=False)]
    return {name: kept for name, kept in names if name != kept}


def check_folder(
    folder: Path,
    source: ModelSource,
    space: PruningSpace,
    kept: Mapping[str, int],
    renamed: Mapping[str, str],
    found: Account,
) -> None:
    """Checks that a written folder holds every weight that should remain, and that transformers loads each of them.

    Args:
        folder: The reshaped model.
        source: The model before.
        space: The model's space.
        kept: The number of units that each masked group keeps.
        renamed: New names of weights whose layer was renumbered.
        found: How the tensors outside the space are handled.

    Raises:
        UserError: a weight is missing, unexpected or has another shape.
    """
    config, files = read_model_config(folder), open_safetensors_folder(folder)
    problems = _loading_problems(config, files, source, found)
    try:
        problems = problems or _differences(open_model(folder), kept_shapes(space, kept), renamed, found)
    except UserError as error:
        problems = [error.what.removeprefix(f"{folder}: ")]
    if problems:
        raise UserError(
            f"{source.path}: {_class_name(config)} would not load the model pruned with these masks",
            wanted="every weight of the model kept, cut, or removed by the masks",
            got="; ".join(problems[:3]) + (f"; {len(problems) - 3} more" if len(problems) > 3 else ""),
            remedy="nothing was written; this model's head or family cannot be pruned in this way"
            + ("" if config.get("model_type") != ragged.MODEL_TYPE else ": try --uniform"),
        )


def _loading_problems(
    config: ModelConfig, files: Mapping[str, torch.Tensor], source: ModelSource, found: Account
) -> list[str]:
    """What transformers misses, or has no place for, beyond what it says of the model before."""
    after = loading_report(config, shapes_of(files))
    if after is None:
        return []
    before = loading_report(source.config, shapes_of(_files(source)))
    lacked = set() if before is None else before["missing_keys"]
    ignored = {*found.carried} if before is None else {*found.carried} & before["unexpected_keys"]
    problems = [f"{name!r} is missing" for name in sorted(after["missing_keys"] - lacked)]
    problems += [f"{name!r} has no place in it" for name in sorted(after["unexpected_keys"] - ignored)]
    return problems + [f"{entry[0]!r} has another shape" for entry in sorted(after["mismatched_keys"])]


def _differences(
    written: ModelSource, kept: Mapping[str, tuple[int, ...]], renamed: Mapping[str, str], found: Account
) -> list[str]:
    """How a written model differs from what should be left of the one before."""
    expected = {renamed.get(name, name): shape for name, shape in kept.items()}
    shapes = shapes_of(written.tensors)
    problems = [
        f"{name!r} has the shape {shapes.get(name)}, not {shape}"
        for name, shape in sorted(expected.items())
        if shapes.get(name) != shape
    ]
    problems += [f"{name!r} is missing" for name in found.carried if name not in written.stored]
    if len(written.stored) != len(expected) + len(found.carried):
        problems.append(f"{len(written.stored)} tensors, not {len(expected)} and {len(found.carried)} carried along")
    return problems


def transformers_class(config: ModelConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    """The transformers class that loads a model, and its config; None for a family that transformers does not have.

    Ragged models are loaded by their modeling file's class.
    """
    if config.get("model_type") == ragged.MODEL_TYPE:
        made = ragged.config_class(config["stock_type"]).from_dict(dict(config))
        return ragged.model_class(made), made
    name = str((config.get("architectures") or [""])[0])
    if config.get("model_type") not in CONFIG_MAPPING or not hasattr(transformers, name):
        return None
    return getattr(transformers, name), CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))


def loading_report(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """What transformers reports of weights of these names and shapes; None for a family that it lacks.

    The keys are `missing_keys`, `unexpected_keys` and `mismatched_keys`. No weights are read.
    """
    found = transformers_class(config)
    if found is None:
        return None
    made: Any = found[0]
    zero = torch.zeros((), dtype=torch.bfloat16)
    weights = {name: zero.expand(shape) for name, shape in shapes.items()}
    with quiet():
        _, report = made.from_pretrained(
            None,
            config=found[1],
            state_dict=weights,
            dtype=zero.dtype,  # any other would be a copy of every weight
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    return dict(report)


def auto_class(config: ModelConfig) -> str:
    """The name of the class that loads a model for its task."""
    named = [name for name in config.get("auto_map", ()) if name != "AutoConfig"]
    if named:
        return named[0]
    architecture = str((config.get("architectures") or [""])[0])
    for name in AUTO_CLASSES:
        held = getattr(transformers, name)._model_mapping._model_mapping.get(config.get("model_type"), ())
        if architecture in ((held,) if isinstance(held, str) else held):
            return name
    return "AutoModel"


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' reports and progress bars; cook prints its own."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _class_name(config: ModelConfig) -> str:
    return str((config.get("architectures") or [config.get("model_type")])[0])
