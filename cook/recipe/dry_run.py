"""`--dry-run`: checks everything and prints the plan, without building or writing anything and without a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from cook.base.errors import UserError
from cook.config.corpus import DataConfig, SourceConfig
from cook.config.kinds import NAMES
from cook.config.tasks import PlanOptions
from cook.config.types import RunConfig
from cook.pruning.counts import parameters
from cook.pruning.mask_set import kept_counts
from cook.recipe.cards import card_named, measured_cpu
from cook.recipe.distillation import DistillationPlan, open_distillation
from cook.recipe.estimate import (
    Card,
    Estimate,
    Setup,
    estimate,
    state_bytes,
    step_flops,
)
from cook.recipe.inputs import Inputs, final_masks, make_gates, open_inputs
from cook.recipe.model_shape import Shape, shape_of
from cook.recipe.moefy import check_blocks
from cook.recipe.plan import Stage
from cook.recipe.quantize import check_quantization
from cook.recipe.suggest import Planned, largest_rows, suggest
from cook.report.console import print_plan as print_table_of_stages
from cook.report.console import print_table
from cook.report.tables import human_count, human_duration
from cook.training.deepspeed_checks import offloads
from cook.training.settings import check_settings

ALONE = PlanOptions()
"""No card, one host."""


def _described(source: DataConfig | SourceConfig) -> str:
    where = ", ".join(source.paths) or source.name
    return f"{source.type}" + (f" ({where})" if where else "") + (", streamed" if source.streaming else "")


def plan_facts(
    config: RunConfig, stages: Sequence[Stage], *, world_size: int, options: PlanOptions = ALONE
) -> dict[str, Any]:
    """What would run, as JSON: its inputs, and per stage what it learns, parameters before and after, tokens, memory,
    communication, and the time on the card of `options`.

    Raises:
        UserError: something does not fit that only the model, the masks or the batch sizes tell; or an unknown card.
    """
    for stage in stages:
        check_settings(stage.config.training, stage.config.deepspeed, world_size=world_size)
    card = None if options.card in (None, "cpu") else card_named(str(options.card))
    rows: list[dict[str, Any]] = []
    planned: list[Planned] = []
    kept: list[dict[str, int]] = [{}]  # of every size
    for stage in stages:
        inputs = open_inputs(stage, must_exist=False)
        if stage.is_moefy:
            check_blocks(stage, inputs)
        begins_anew = stage.name == "pretrain" or stage.writes.layer
        fixed = [kept_counts(masks) for masks in inputs.nested or (inputs.fixed,)]
        kept = [
            {} if begins_anew else kept[min(number, len(kept) - 1)] | fixed[min(number, len(fixed) - 1)]
            for number in range(len(stage.sizes) or 1)
        ]
        before = parameters(inputs.space, kept[0])
        training = stage.config.training
        trained = kept[0] if training.remove_masked else {}
        shape, setup = _arithmetic(stage, inputs, trained, world_size, options)
        check_quantization(stage, inputs)
        kept = [each | _expected_kept(stage, inputs, number) for number, each in enumerate(kept)]
        after = [parameters(inputs.space, each) for each in kept]
        card = card or (measured_cpu(shape, setup) if options.card == "cpu" else None)
        if training.micro_batch_size == "auto" and card:
            fits = largest_rows(shape, setup, card, batch=training.train_batch_size) or 1
            setup = replace(setup, rows=fits, accumulation=setup.rows * setup.accumulation // fits)
        planned.append(Planned(shape=shape, setup=setup, batch=training.train_batch_size, steps=training.steps))
        found = estimate(shape, setup, card, network=_network(options))
        rows.append(
            {
                "stage": stage.name,
                "weights_from": inputs.origin,
                "learns": ["routers"] if stage.is_moefy else [NAMES[kind].short for kind in stage.learns],
                "uneven": bool(stage.uneven & set(stage.learns)),
                "steps": training.steps,
                "tokens_at_most": training.steps * training.train_batch_size * config.data.max_length,
                "parameters_before": before,
                "parameters_after": after[0],
                **({"parameters_of_sizes": after} if stage.sizes else {}),
                "state_bytes_per_rank": round(sum(state_bytes(shape.parameters, setup))),
                "estimate": _estimate_facts(found, planned[-1], card),
            }
        )
    facts = {
        "config": config.source.bmcook,
        "output": config.output_dir,
        "data": "; ".join(_described(source) for source in config.data.sources or (config.data,)),
        "ranks": world_size,
        "hosts": options.hosts,
        "card": card and card.name,
        "stages": rows,
    }
    return facts | ({"suggested": _suggested(config, planned, card, options)} if options.suggest else {})


def _network(options: PlanOptions) -> float | None:
    """Bytes per second of a host's network; None on one host."""
    return options.link * 1e9 / 8 if options.hosts > 1 else None


def _arithmetic(
    stage: Stage, inputs: Inputs, kept: Mapping[str, int], world_size: int, options: PlanOptions
) -> tuple[Shape, Setup]:
    """What the arithmetic of the plan needs to know of a stage."""
    training = stage.config.training
    distillation = open_distillation(stage, inputs, must_exist=False)
    gated = {group.kind for group in inputs.learned}
    if not training.remove_masked:
        gated |= {group.kind for group in inputs.space.groups if group.name in inputs.fixed}
    shape = shape_of(inputs.space, kept, score_bias=inputs.adapter.score_bias, gated=gated)
    return shape, taught(setup_of(stage, world_size, options), distillation)


def taught(setup: Setup, distillation: DistillationPlan | None) -> Setup:
    """The same with the teacher, if there is one."""
    teacher = distillation.source if distillation else None
    count = parameters(teacher.adapter.space(teacher.config)) if teacher else 0
    return replace(setup, teacher=count, teaches=distillation is not None)


def model_flops(stage: Stage, inputs: Inputs, distillation: DistillationPlan | None, world_size: int) -> float:
    """FLOPs per step of the model and its teacher on all ranks, without what checkpointing computes again.

    Args:
        stage: The plan.
        inputs: What the stage trains: the model without the removed units, if they are removed.
        distillation: The teacher.
        world_size: Number of ranks.
    """
    setup = replace(taught(setup_of(stage, world_size), distillation), checkpointing=False)
    shape = shape_of(inputs.space, {}, score_bias=inputs.adapter.score_bias)
    return world_size * sum(step_flops(shape, setup))


def setup_of(stage: Stage, world_size: int, options: PlanOptions = ALONE) -> Setup:
    """How a stage trains, from its settings. With `auto` as precision, an accelerator trains in bf16.

    Raises:
        UserError: the settings cannot be used.
    """
    training = stage.config.training
    settings = check_settings(training, stage.config.deepspeed, world_size=world_size)
    zero = settings["zero_optimization"]
    half = settings["bf16"]["enabled"] or settings["fp16"]["enabled"]
    half = half or (options.card not in (None, "cpu") and training.precision == "auto")
    rows = training.rows_at_once(world_size)
    keys = {"bucket": "reduce_bucket_size", "live": "stage3_max_live_parameters"}
    given: dict[str, Any] = {name: int(zero[key]) for name, key in keys.items() if key in zero}
    return Setup(
        zero=max(zero["stage"], int(half)),
        half=half,
        ranks=world_size,
        hosts=options.hosts,
        rows=rows,
        length=stage.config.data.max_length,
        accumulation=max(1, training.train_batch_size // (rows * world_size)),
        checkpointing=training.activation_checkpointing,
        trains=training.train_weights,
        offload_optimizer=offloads(zero),
        offload_param=(zero.get("offload_param") or {}).get("device", "none") != "none",
        **given,
    )


def _estimate_facts(found: Estimate, planned: Planned, card: Card | None) -> dict[str, Any]:
    memory, setup = found.memory, planned.setup
    facts: dict[str, Any] = {
        "zero_stage": setup.zero,
        "precision": "half" if setup.half else "fp32",
        "micro_batch_size": setup.rows,
        "accumulation_steps": setup.accumulation,
        "activation_bytes": round(memory.kept),
        "checkpointed_activation_bytes": round(memory.checkpointed),
        "checkpointing": setup.checkpointing,
        "buffer_bytes": round(memory.buffers),
        "host_bytes": round(memory.host),
        "peak_bytes": round(memory.peak),
        "sent_bytes_per_step": round(found.sent),
        "sent_bytes_per_step_by_zero_stage": {
            str(zero): round(estimate(planned.shape, replace(setup, zero=zero)).sent) for zero in range(4)
        },
    }
    if card is not None:
        assert found.seconds is not None and found.tokens_per_second is not None
        facts |= {
            "largest_micro_batch_size": largest_rows(planned.shape, setup, card, batch=planned.batch),
            "seconds_per_step": found.seconds,
            "tokens_per_second": found.tokens_per_second,
            "days": found.seconds * planned.steps / 86400,
        }
    return facts


def _suggested(config: RunConfig, planned: Sequence[Planned], card: Card | None, options: PlanOptions) -> list[str]:
    """The settings of the fastest setup that fits, as values of `--set`."""
    assert card is not None, "PlanOptions.check"
    setup = suggest(planned, card, network=_network(options))
    if setup is None:
        raise UserError(
            f"not even one row per micro-batch fits on {card.name}",
            got=f"{planned[0].setup.ranks} ranks",
            remedy="use more ranks, shorter rows, or a card with more memory",
        )
    training = {"micro_batch_size": setup.rows, "activation_checkpointing": str(setup.checkpointing).lower()}
    lines = [f"deepspeed.zero_optimization.stage={setup.zero}"]
    if setup.offload_optimizer:
        lines.append("deepspeed.zero_optimization.offload_optimizer.device=cpu")
    for key, value in training.items():
        lines.append(f"training.{key}={value}")
        # A stage's own value would win.
        lines += [f"stages.{entry.name}.training.{key}={value}" for entry in config.stages if key in entry.training]
    return lines


def show_plan(facts: Mapping[str, Any]) -> None:
    """Prints what `plan_facts` returned."""
    rows = [
        {
            "stage": row["stage"],
            "weights from": row["weights_from"],
            "learns": (", ".join(row["learns"]) or "–") + (" (uneven)" if row["uneven"] else ""),
            "steps": row["steps"],
            "tokens": "≤ " + human_count(row["tokens_at_most"]),
            "parameters before": human_count(row["parameters_before"]),
            "after": ", ".join(map(human_count, row.get("parameters_of_sizes", [row["parameters_after"]]))),
            "memory per rank": f"{row['state_bytes_per_rank'] / 2**30:.2f} GiB",
        }
        for row in facts["stages"]
    ]
    hidden = {"stages", "suggested", *(name for name in ("hosts", "card") if facts.get(name) in (1, None))}
    print_table_of_stages({name: value for name, value in facts.items() if name not in hidden}, rows)
    print(
        "Tokens: all positions of all rows. Memory: weights, gradients and optimizer states. "
        "The result of a layer mask is estimated from its target, that of uneven blocks as if they were even.\n"
    )
    if needs := [_needs(row) for row in facts["stages"] if "estimate" in row]:  # an older server sends none
        print_table(needs)
        print(
            "Activations: what the forward pass of a micro-batch keeps, without and with activation checkpointing. "
            "Peak: the highest memory per rank. Sent: bytes that a rank sends per step."
            + ("" if facts["card"] else " Name a card for times: cook plan --card H100.")
        )
    if "suggested" in facts:
        print("\nSuggested settings:\n" + "\n".join(f"  --set {line}" for line in facts["suggested"]))


def _needs(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a stage needs per rank, as a row of the second table."""
    needs, gib = row["estimate"], 2**30
    shown = {
        "needs": f"{row['stage']}:",
        "ZeRO": needs["zero_stage"],
        "rows × micro-batches": f"{needs['micro_batch_size']} × {needs['accumulation_steps']}",
        "activations": " / ".join(f"{needs[f'{k}activation_bytes'] / gib:.2f}" for k in ("", "checkpointed_")) + " GiB",
        "peak": f"{needs['peak_bytes'] / gib:.2f} GiB",
        "on the host": f"{needs['host_bytes'] / gib:.2f} GiB" if needs["host_bytes"] else None,
        "sent": f"{needs['sent_bytes_per_step'] / gib:.2f} GiB",
    }
    if "seconds_per_step" in needs:
        shown |= {
            "largest micro-batch": needs["largest_micro_batch_size"] or "none fits",
            "step": f"{needs['seconds_per_step']:.3g} s",
            "tokens/s": human_count(float(f"{needs['tokens_per_second']:.3g}")),
            "all steps": human_duration(needs["days"] * 86400),
        }
    return {name: value for name, value in shown.items() if value is not None}


def _expected_kept(stage: Stage, inputs: Inputs, number: int) -> dict[str, int]:
    """Expected units after the stage: the first blocks, and the same share of heads and FFN dimensions in each."""
    gates = make_gates(stage, inputs)
    if gates is None:
        return {}
    blocks = len([group for group in inputs.learned if group.kind == "layer"])
    # Where blocks share the budget of the units inside of them, none goes before the last of these.
    of_blocks = torch.ones(blocks) if stage.one_budget else -torch.arange(float(blocks))
    within = [1 - torch.arange(group.size) / group.size for group in inputs.learned[blocks:]]
    gates.values = torch.cat([of_blocks, *within]).repeat(len(stage.sizes) or 1)
    return kept_counts(final_masks(stage, inputs, gates, number))
