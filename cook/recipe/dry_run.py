"""`--dry-run`: checks everything and prints the plan, without building or writing anything and without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cook.config.corpus import DataConfig, SourceConfig
from cook.config.types import RunConfig
from cook.pruning.counts import parameters
from cook.pruning.mask_set import kept_counts
from cook.recipe.distillation import open_distillation
from cook.recipe.inputs import Inputs, final_masks, make_gates, open_inputs
from cook.recipe.plan import Stage
from cook.report.console import print_plan as print_table_of_stages
from cook.report.tables import human_count
from cook.training.settings import check_settings

MASKS_OF = {"layer": "layers", "heads": "heads", "dimff": "dims"}


def _described(source: DataConfig | SourceConfig) -> str:
    where = ", ".join(source.paths) or source.name
    return f"{source.type}" + (f" ({where})" if where else "") + (", streamed" if source.streaming else "")


def plan_facts(config: RunConfig, stages: Sequence[Stage], *, world_size: int) -> dict[str, Any]:
    """What would run, as JSON: its inputs, and per stage what it learns, parameters before and after, tokens, memory.

    Raises:
        UserError: something does not fit that only the model, the masks or the batch sizes tell.
    """
    for stage in stages:
        check_settings(stage.config.training, stage.config.deepspeed, world_size=world_size)
    rows: list[dict[str, Any]] = []
    kept: list[dict[str, int]] = [{}]  # of every size
    for stage in stages:
        inputs = open_inputs(stage, must_exist=False)
        open_distillation(stage, inputs, must_exist=False)
        begins_anew = stage.name == "pretrain" or stage.writes.layer
        fixed = [kept_counts(masks) for masks in inputs.nested or (inputs.fixed,)]
        kept = [
            {} if begins_anew else kept[min(number, len(kept) - 1)] | fixed[min(number, len(fixed) - 1)]
            for number in range(len(stage.sizes) or 1)
        ]
        before = parameters(inputs.space, kept[0])
        kept = [each | _expected_kept(stage, inputs, number) for number, each in enumerate(kept)]
        after = [parameters(inputs.space, each) for each in kept]
        training = stage.config.training
        trained = before if training.remove_masked else parameters(inputs.space)
        rows.append(
            {
                "stage": stage.name,
                "weights_from": inputs.origin,
                "learns": [MASKS_OF[kind] for kind in stage.learns],
                "uneven": bool(stage.uneven & set(stage.learns)),
                **(
                    {"round_to": stage.config.joint.round_to}
                    if stage.name == "joint_mask" and stage.config.joint
                    else {}
                ),
                "steps": training.steps,
                "tokens_at_most": training.steps * training.train_batch_size * config.data.max_length,
                "parameters_before": before,
                "parameters_after": after[0],
                **({"parameters_of_sizes": after} if stage.sizes else {}),
                "state_bytes_per_rank": round(_state_bytes(stage, trained, world_size)),
            }
        )
    return {
        "config": config.source.bmcook,
        "output": config.output_dir,
        "data": "; ".join(_described(source) for source in config.data.sources or (config.data,)),
        "ranks": world_size,
        "stages": rows,
    }


def show_plan(facts: Mapping[str, Any]) -> None:
    """Prints what `plan_facts` returned."""
    rows = [
        {
            "stage": row["stage"],
            "weights from": row["weights_from"],
            "learns": (", ".join(row["learns"]) or "–")
            + (" (uneven)" if row["uneven"] else "")
            + (f", multiples of {row['round_to']}" if row.get("round_to", 1) > 1 else ""),
            "steps": row["steps"],
            "tokens": "≤ " + human_count(row["tokens_at_most"]),
            "parameters before": human_count(row["parameters_before"]),
            "after": ", ".join(map(human_count, row.get("parameters_of_sizes", [row["parameters_after"]]))),
            "memory per rank": f"{row['state_bytes_per_rank'] / 2**30:.2f} GiB",
        }
        for row in facts["stages"]
    ]
    print_table_of_stages({name: value for name, value in facts.items() if name != "stages"}, rows)
    print(
        "Tokens: all positions of all rows. Memory: weights, gradients and optimizer states; "
        "activations are not included. The result of a layer mask is estimated from its target, "
        "that of uneven blocks as if they were even."
    )


def _expected_kept(stage: Stage, inputs: Inputs, number: int) -> dict[str, int]:
    """Expected units after the stage: the first blocks, and the same share of heads and FFN dimensions in each."""
    gates = make_gates(stage, inputs)
    if gates is None:
        return {}
    blocks = len([group for group in inputs.learned if group.kind == "layer"])
    within = [torch.arange(group.size) / group.size for group in inputs.learned[blocks:]]
    gates.values = -torch.cat([torch.arange(float(blocks)), *within]).repeat(len(stage.sizes) or 1)
    return kept_counts(final_masks(stage, inputs, gates, number))


def _state_bytes(stage: Stage, count: int, world_size: int) -> float:
    """Bytes of model state per rank of `count` parameters with Adam (Rajbhandari et al. 2020, ZeRO, sec. 3.1).

    Half precision needs 2 bytes per parameter for weights, 2 for gradients and 12 for masters and moments; fp32 needs
    4, 4 and 8 (and 4 for ZeRO's master copy). ZeRO 1 partitions the last, 2 also the gradients, 3 also the weights.
    """
    settings = check_settings(stage.config.training, stage.config.deepspeed, world_size=world_size)
    zero = settings["zero_optimization"]["stage"]
    half = settings["bf16"]["enabled"] or settings["fp16"]["enabled"]
    weights, gradients, states = (2, 2, 12) if half else (4, 4, 8 + (4 if zero else 0))
    if not stage.config.training.train_weights:
        gradients = states = 0
    shared = [states if zero >= 1 else 0, gradients if zero >= 2 else 0, weights if zero >= 3 else 0]
    own = weights + gradients + states - sum(shared)
    return count * (own + sum(shared) / world_size)
