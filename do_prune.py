"""Carries masks out: writes the small dense model that computes exactly what the masked one did.

`python do_prune.py` takes model, masks and output folder from config/bmcook.json; with --model they are given by hand.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from cook.adapters.source import ModelSource, load_model, open_model
from cook.base.batches import Batch
from cook.base.errors import UserError, run_entry
from cook.base.files import read_json, sha256, write_atomically
from cook.base.versions import check_versions
from cook.config.load import load_config
from cook.config.types import RunConfig
from cook.evaluation.equality import largest_difference
from cook.evaluation.speed import LARGEST_TIMED, forward_seconds
from cook.masks.mask_set import Masks, kept_counts
from cook.report.human import human_count
from cook.report.model_card import MaskFile, ModelCard, model_card
from cook.report.tables import markdown_table
from cook.space.counts import forward_flops, parameters
from cook.space.units import PruningSpace
from cook.stages.plan import MaskPaths, Stage
from cook.stages.summary import check_masks, finished_stages, ladder_row, masks_after, sample_batches
from cook.surgery.export import copy_tokenizer
from cook.surgery.pad import padded
from cook.surgery.prune import Pruned, mask_model, open_masks, prune_to_folder
from cook.training.checkpoint import stored_weights

TOLERANCE = 1e-5
"""Largest allowed relative difference of the logits: rounding of products whose sums are in another order."""


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="the run's config (default: config/bmcook.json, unless --model is given)")
    parser.add_argument("--set", dest="overrides", metavar="KEY=VALUE", action="append", default=[],
                        help="change a config value; may be repeated")  # fmt: skip
    parser.add_argument("--model", help="model folder, CPM-Live .pt file, or training checkpoint of any ZeRO stage")
    parser.add_argument("--model-config", help="the model's JSON, where it does not lie beside the weights")
    parser.add_argument("--coarse-mask", help="layer mask (.pt)")
    parser.add_argument("--heads-mask", help="head mask (.pt)")
    parser.add_argument("--dimff-mask", help="dim_ff mask (.pt)")
    parser.add_argument("--output", help="folder to write (default: OUTPUT_DIR/pruned of the config)")
    parser.add_argument("--uniform", action="store_true",
                        help="pad every block with zero units to the size of the largest, so that a stock class holds "
                             "the result without remote code")  # fmt: skip
    parser.add_argument("--verify", action="store_true", help="compare the logits of masked and reshaped model")
    return parser.parse_args()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be pruned, and to where."""

    model: str
    masks: MaskPaths
    output: str
    config: RunConfig | None
    """The run that all this was taken from, if it was."""
    stages: list[Stage]
    """The finished stages of that run."""


def find_job(arguments: argparse.Namespace) -> Job:
    """What the command line names, filled up from the run's config.

    Raises:
        UserError: no stage has finished yet, or no output folder is known.
    """
    given = MaskPaths(layer=arguments.coarse_mask, heads=arguments.heads_mask, dimff=arguments.dimff_mask)
    config = None
    if arguments.config or not arguments.model:
        config = load_config(arguments.config or "config/bmcook.json", arguments.overrides)
    output = arguments.output or (f"{config.output_dir}/pruned" if config else None)
    if output is None:
        raise UserError("where to write the small model?", remedy="give --output DIR")
    if arguments.model:
        return Job(model=arguments.model, masks=given, output=output, config=config, stages=[])
    assert config is not None
    stages = finished_stages(config)
    if not stages:
        raise UserError(
            f"no stage has finished under {config.output_dir}",
            remedy="train first (bash scripts/prune_cpm_ant.sh), or give --model and masks",
        )
    check_masks(stages[-1])
    own = masks_after(stages[-1])
    masks = MaskPaths(layer=given.layer or own.layer, heads=given.heads or own.heads, dimff=given.dimff or own.dimff)
    return Job(model=str(stages[-1].folder / "model"), masks=masks, output=output, config=config, stages=stages)


def main() -> int | None:
    """Finds model and masks, reshapes, verifies, reports."""
    arguments = parse_arguments()
    check_versions()
    job = find_job(arguments)
    model_config = read_json(arguments.model_config) if arguments.model_config else None
    source = open_model(job.model, config=model_config, read_checkpoint=stored_weights)
    space, masks = open_masks(source, coarse=job.masks.layer, heads=job.masks.heads, dimff=job.masks.dimff)
    if not masks:
        if job.stages and job.stages[-1].pattern_mask:
            print(f"{job.model}: pruned in a pattern, at its full size; there is nothing to cut off")
            return None
        raise UserError("there is no mask to carry out", remedy="give --coarse-mask, --heads-mask or --dimff-mask")
    files = [path for path in (job.masks.layer, job.masks.heads, job.masks.dimff) if path]
    print(f"model  {source.path}\nmasks  {', '.join(files)}")
    even = padded(source, space, masks) if arguments.uniform else (source, masks)
    pruned = prune_to_folder(even[0], space, even[1], Path(job.output), record=masks)
    has_tokenizer = copy_tokenizer(source.folder, pruned.folder)

    small = open_model(pruned.folder)
    batches, what = sample_batches(job.config, source)
    difference, note = verify(source, small, space, masks, batches, what) if arguments.verify else (None, "")
    print(comparison(source, small, space, even[1], batches))
    card = ModelCard(
        name=pruned.folder.resolve().name,
        rows=[ladder_row(stage) for stage in job.stages[:1] + job.stages[-1:]],
        base_model=(job.config.model.path if job.config else None) or str(source.path),
        license="other",
        license_note="The weights carry the licence of the model and the text they were trained on.",
        commands=[*training_commands(job), " ".join(["python", *sys.argv])],
        masks=[MaskFile(name=Path(path).name, sha256=sha256(path)) for path in files],
        trust_remote_code=pruned.needs_remote_code,
        max_difference=difference,
        difference_note=note,
        versions=[(name, importlib.metadata.version(name)) for name in ("torch", "transformers")],
    )
    write_atomically(pruned.folder / "README.md", model_card(card))
    announce(pruned, difference, note, has_tokenizer)
    return 1 if difference is not None and difference > TOLERANCE else None


def training_commands(job: Job) -> list[str]:
    """The commands that trained the model's stages, one each."""
    if job.config is None:
        return []
    return [f"deepspeed cook/train.py --config {job.config.source.bmcook} --stage {stage.name}" for stage in job.stages]


def verify(
    source: ModelSource, small: ModelSource, space: PruningSpace, masks: Masks, batches: list[Batch], what: str
) -> tuple[float, str]:
    """The largest relative difference between the logits of the masked and of the reshaped model, and how it was got.

    In fp32. Deep models make more of rounding than one product does: where fp32 does not suffice to call them equal,
    fp64 decides, in which rounding is all but gone and a mistake is not.
    """
    for dtype, name in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        masked = load_model(source, dtype)
        mask_model(masked, space, masks)
        difference = largest_difference(masked, load_model(small, dtype), batches)
        if difference <= TOLERANCE or parameters(space) > LARGEST_TIMED:
            break
        print(f"in {name} the largest relative difference is {difference:.1e}, above {TOLERANCE:.0e}")
    return difference, f"{name}, {what}"


def comparison(
    source: ModelSource, small: ModelSource, space: PruningSpace, masks: Masks, batches: list[Batch]
) -> str:
    """Parameters, FLOPs a token and measured tokens/s before and after, as a table."""
    length, tokens = batches[0]["targets"].shape[1], sum(batch["targets"].numel() for batch in batches)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds = {}
    if parameters(space) <= LARGEST_TIMED:
        models = {name: load_model(s).to(device) for name, s in (("before", source), ("after", small))}
        seconds = forward_seconds(models, batches, device)
    rows = []
    for name, kept in (("before", {}), ("after", kept_counts(masks))):
        flops = forward_flops(space, kept, context=length)
        speed = human_count(tokens / seconds[name]) if seconds else "not timed"
        rows.append([name, human_count(parameters(space, kept)), human_count(flops), speed])
    return "\n" + markdown_table(["", "parameters", "FLOPs a token", "tokens/s forward"], rows) + "\n"


def announce(pruned: Pruned, difference: float | None, note: str, has_tokenizer: bool) -> None:
    """Says what was written and whether it was verified."""
    if difference is not None:
        verdict = "equal to rounding" if difference <= TOLERANCE else "NOT EQUAL"
        print(f"masked against reshaped logits, {note}: largest relative difference {difference:.1e}, {verdict}")
    if pruned.live_obstacle:
        print(f"no CPM-Live .pt was written: {pruned.live_obstacle}")
    elif pruned.live_obstacle is None:
        print(f"CPM-Live format: {pruned.folder}/cpm_live.pt and cpm_live.json")
    if not has_tokenizer:
        print("the model has no tokenizer files beside it; add yours to the folder")
    option = ", trust_remote_code=True" if pruned.needs_remote_code else ""
    print(f"written: {pruned.folder}  (AutoModelForCausalLM.from_pretrained(…{option}))")


if __name__ == "__main__":
    run_entry(main)
