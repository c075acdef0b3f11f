"""Summary of the finished stages of a run: table rows, records, and batches to compare models on."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from cook.base.batches import Batch
from cook.base.errors import UserError
from cook.base.files import read_json
from cook.config.types import RunConfig
from cook.data.loader import held_out_batches
from cook.data.token_loss import LABELS, model_inputs
from cook.data.training_data import load_rows
from cook.families.source import open_model
from cook.pruning.family import ModelSource, vocabulary_size
from cook.pruning.mask_set import kept_counts
from cook.pruning.spending import Spent, spending
from cook.recipe.kept_structure import masks_of_structure, sizes
from cook.recipe.plan import MaskPaths, Stage, plan_stage, recipe
from cook.report.tables import LadderRow, range_text

ROWS_AT_ONCE = RANDOM_ROWS = 8
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len")
"""Config fields that limit the tokens per row."""
RESERVED = 2
"""Positions that some families reserve for padding."""
TITLES = {
    "pretrain": "dense",
    "layer_mask": "layers masked",
    "layer_finetune": "layers, finetuned",
    "att_mask": "heads masked",
    "att_finetune": "heads, finetuned",
    "ffn_mask": "dims masked",
    "ffn_finetune": "dims, finetuned",
    "headdim_mask": "head dims masked",
    "headdim_finetune": "head dims, finetuned",
    "experts_mask": "experts masked",
    "experts_finetune": "experts, finetuned",
    "hidden_mask": "hidden dims masked",
    "hidden_finetune": "hidden dims, finetuned",
    "joint_mask": "all masked at once",
    "joint_finetune": "all, finetuned",
    "pattern": "pattern, finetuned",
    "quantize": "quantized",
    "moefy": "mixture of experts",
    "random_baseline": "random masks",
}


def finished_stages(config: RunConfig, *, baseline: bool = False) -> list[Stage]:
    """The finished stages of the recipe, in order (without a recipe: the single described stage).

    Args:
        config: The run.
        baseline: Whether to include the random baseline, which is a side branch.
    """
    stages = recipe(config) or [plan_stage(config, config.stage)]
    return [s for s in stages if s.done.exists() and (baseline or not s.is_random_baseline)]


def masks_after(stage: Stage, number: int = 0) -> MaskPaths:
    """The mask files of a stage's model, or of its size of that number: fixed and learned ones."""
    if stage.name == "moefy":  # its model is the smaller one
        return MaskPaths()
    learned = {kind: path for kind, path in vars(stage.writes).items() if path}
    return stage.by_size(dataclasses.replace(stage.fixed, **learned))[number]


def done_record(stage: Stage) -> dict[str, Any]:
    """The stage's `done.json`."""
    return read_json(stage.done)


def models_of(stage: Stage) -> list[dict[str, Any]]:
    """Loss, parameters and structure of each model that a finished stage has made, from the largest."""
    done = done_record(stage)
    return list(done.get("sizes", [done]))


def ladder_row(stage: Stage, tokens_per_second: float | None = None, number: int = 0) -> LadderRow:
    """A finished stage, or its size of that number, as a row of the report's table."""
    model = models_of(stage)[number]
    heads, dims = sizes(model["structure"], "att"), sizes(model["structure"], "ffn")
    experts = [layer["experts"].count("1") for layer in model["structure"]["layers"] if layer.get("experts")]
    return LadderRow(
        model=TITLES[stage.name] + (f", {model['size']:g}" if "size" in model else ""),
        att_layers=len(heads),
        ffn_layers=len(dims),
        heads=range_text(heads),
        dim_ff=f"{range_text(experts)} experts" if experts and set(dims) == {1} else range_text(dims),
        head_dim=_wide(model["structure"], "head_dims"),
        hidden=_wide(model["structure"], "hidden"),
        parameters=model["parameters"],
        held_out_loss=model["held_out_loss"],
        tokens_per_second=tokens_per_second,
    )


def _wide(structure: dict[str, Any], kind: str) -> tuple[int, int] | None:
    """How many dimensions the whole model keeps of a kind, and has; None if all stay."""
    units = structure.get(kind)
    return (units.count("1"), len(units)) if units else None


def spent_by(stage: Stage) -> list[Spent]:
    """What each kind of units of a finished stage's smallest model lost."""
    source = open_model(stage.folder / "model")
    space = source.adapter.space(source.config, done_record(stage)["head_unit"])
    return spending(space, kept_counts(masks_of_structure(space, models_of(stage)[-1]["structure"])))


def sample_batches(config: RunConfig | None, source: ModelSource, *, rows: int = 16) -> tuple[list[Batch], str]:
    """Batches to compare models on, and their description: held-out text of the run, else random ids."""
    prompt = source.config.get("prompt_length", 0)
    if config is not None:
        try:
            data = load_rows(
                config.data, config.tokenizer, prompt_length=prompt, output_dir=config.output_dir, build=False
            )
        except UserError:
            pass  # no prepared data for this config: random ids are enough to compare two models
        else:
            batches = [called(source, batch) for batch in held_out_batches(data.held_out, ROWS_AT_ONCE, rows)]
            return batches, f"{sum(len(b['targets']) for b in batches)} rows of held-out text"
    random = torch.Generator().manual_seed(0)
    length = prompt + random_length(source)
    # One row per batch: some classifiers cannot detect where a shorter row ends.
    batches = []
    for _ in range(RANDOM_ROWS):
        ids = torch.randint(0, vocabulary_size(source.config), (1, length), generator=random)
        ids[:, :prompt] = torch.arange(prompt) + 2 * prompt
        text = torch.arange(length) >= prompt
        batch: Batch = {
            "input": ids,
            "length": torch.full((1,), length),
            "context": (~text)[None],
            "position": torch.arange(length)[None],
            "segment": (text * 2)[None],
            "span": torch.zeros(1, length, dtype=torch.long),
            "targets": ids,
        }
        batches.append(called(source, batch))
    return batches, f"{RANDOM_ROWS} rows of random ids"


def random_length(source: ModelSource) -> int:
    """Tokens per row of random ids, at most the model's number of positions."""
    given = [source.config[name] for name in POSITIONS if isinstance(source.config.get(name), int)]
    return max(1, min([128, *(positions - RESERVED for positions in given)]))


def called(source: ModelSource, batch: Batch) -> Batch:
    """Converts a batch to the model's arguments, with its labels."""
    form = source.adapter.call_form(source.config)
    return form(model_inputs(batch)) | {key: batch[key] for key in LABELS if key in batch}
