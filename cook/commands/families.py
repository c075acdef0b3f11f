"""`cook families`: the known ones, and a first table for another, with its check on a tiny random model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from cook.base.errors import EXIT_FAILED, UserError
from cook.commands.options import AsJson

EXACT = 1e-5
"""Relative, fp32: rounding of sums taken in another order."""
app = typer.Typer(invoke_without_command=True)


@app.callback()
def families(context: typer.Context, as_json: AsJson = False) -> None:
    """Print the table of model families and what works with them."""
    if context.invoked_subcommand is not None:
        return
    from cook.families.registry import families_table, family_facts

    print(json.dumps(family_facts()) if as_json else families_table())


@app.command()
def guess(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A model folder, a config.json, or a `model_type` of transformers.")
    ],
    as_json: AsJson = False,
) -> None:
    """Guess the table of a family that cook does not know, and check it on a tiny random model.

    Prints Python for `cook.families.registry.register`. The exit code is 1 if a kind of unit is not exact.
    """
    from cook.export.check import quiet
    from cook.families.guess import draft
    from cook.families.guess import guess as guess_tables
    from cook.families.registry import by_config, knows
    from cook.report.tables import markdown_table

    config = _config(model)
    if knows(config):
        facts = {"model_type": config["model_type"], "known_as": by_config(config).family}
        print(json.dumps(facts) if as_json else f"{facts['model_type']}: known as {facts['known_as']}")
        return
    with quiet():
        guessed = guess_tables(config)
        checked = [(table, check(table, guessed.config)) for table in guessed.tables]
    table, found = min(checked, key=lambda pair: sum(not row["exact"] for row in pair[1]))
    exact = all(row["exact"] for row in found)
    facts = {
        "model_type": config["model_type"],
        "known_as": None,
        "table": draft(table),
        "check": found,
        "exact": exact,
    }
    if as_json:
        print(json.dumps(facts))
    else:
        print(f"A table for {table.family}, guessed from a tiny random model:\n\n{draft(table)}\n")
        rows = [[row["removed"], row["problem"] or f"{row['difference']:.1e}", row["result"]] for row in found]
        print(markdown_table(["removed", "difference", "result"], rows))
        print("\n" + ("Every kind is exact. " if exact else "Correct the table; cook/families/layout.py explains it. "))
        print("Pass stock_adapter(table) to cook.families.registry.register; documentation: Add a family.")
    if not exact:
        raise typer.Exit(EXIT_FAILED)


def _config(model: str) -> dict[str, Any]:
    from transformers import CONFIG_MAPPING

    from cook.base.files import read_json
    from cook.base.tensor_files import read_model_config

    path = Path(model)
    if path.exists():
        found = read_model_config(path) if path.is_dir() else read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
            raise UserError(f"{model}: not a model's config", wanted="a JSON object with model_type")
        return found
    if model not in CONFIG_MAPPING:
        raise UserError(
            f"{model}: there is no such model",
            wanted="a folder with config.json, or a model_type of transformers",
            remedy="check the path",
        )
    return dict(CONFIG_MAPPING[model]().to_dict())


KINDS = {
    "blocks": ("layer",),
    "heads": ("heads",),
    "query heads": ("heads",),
    "FFN dimensions": ("dimff",),
    "head dimensions": ("head_dims",),
    "hidden dimensions": ("hidden",),
    "everything": ("layer", "heads", "dimff", "head_dims", "hidden"),
}


def check(table: Any, config: dict[str, Any]) -> list[dict[str, Any]]:
    """Compares masked and reshaped models, for each kind of unit alone and for all together.

    Args:
        table: The family's table, `cook.families.layout.Family`.
        config: The config of a tiny model.

    Returns:
        For each kind: `difference`, relative to the largest logit; `problem`, a reason if it cannot be computed;
        `exact`; `result`: `stock` or `remote code`, by what loads the reshaped model.
    """
    found = []
    for removed in KINDS:
        row: dict[str, Any] = {"removed": removed, "difference": None, "problem": "", "exact": False, "result": ""}
        try:
            row |= _difference(table, config, removed)
        except Exception as error:  # a wrong table fails in any way
            row |= {"problem": f"{type(error).__name__}: {error}".splitlines()[0][:100], "result": "WRONG"}
        if row["difference"] is not None or row["problem"]:
            found.append(row)
    return found


@torch.no_grad()
def _difference(table: Any, config: dict[str, Any], removed: str) -> dict[str, Any]:
    from cook.export.pruned_folder import mask_model, reshaped_source
    from cook.families.guess import IDS, drawn
    from cook.families.source import load_model
    from cook.families.stock import stock_adapter
    from cook.pruning.family import ModelSource
    from cook.pruning.mask_set import consistent

    adapter = stock_adapter(table)
    config, _ = adapter.read(config, {})
    units = adapter.head_units(config)
    space = adapter.space(config, units[-1] if removed in ("query heads", "everything") else units[0])
    groups = [group for group in space.every if group.kind in KINDS[removed]]
    if not groups or (removed == "query heads" and len(units) == 1):
        return {}
    # Half of the units, other ones in every layer; of the blocks, attention in one layer and FFN in the next.
    masks = {g.name: ((torch.arange(g.size) + g.layer + (g.site == "ffn")) % 2).float() for g in groups}
    masks = consistent(space, masks)
    model = drawn(table, config)
    config, tensors = adapter.read(config, dict(model.state_dict()))
    source = ModelSource(adapter=adapter, config=config, tensors=tensors, path=Path())
    small = reshaped_source(source, space, masks)
    whole, reshaped = model(input_ids=IDS).logits, load_model(small)(input_ids=IDS).logits
    mask_model(model, space, masks)
    masked = model(input_ids=IDS).logits
    difference = float((masked - reshaped).abs().max() / masked.abs().max())
    problem = "the masks have no effect" if torch.equal(masked, whole) else ""
    result = "stock" if adapter.modeling(small.config) is None else "remote code"
    exact = difference <= EXACT and not problem
    return {"difference": difference, "problem": problem, "exact": exact, "result": result if exact else "WRONG"}
