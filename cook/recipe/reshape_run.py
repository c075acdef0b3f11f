"""Reshaping: writes the small dense model that computes the same as the masked model (`cook reshape`)."""

from __future__ import annotations

import gc
import importlib.metadata
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from cook.base.batches import Batch
from cook.base.device import default_device
from cook.base.environment import check_versions
from cook.base.errors import RunFailed, UserError
from cook.base.files import read_json, sha256, write_atomically
from cook.config.load import load_config
from cook.config.types import RunConfig
from cook.data.commands.vocabulary import count_tokens
from cook.data.prepare import open_split
from cook.data.training_data import one_source_each
from cook.evaluation.equality import answers, answers_for, difference, masked_model, together, unrounded, written_model
from cook.evaluation.speed import LARGEST_TIMED, pass_seconds
from cook.export.check import AUTO_CLASSES
from cook.export.companions import Companions, copy_companions, name_tokenizer_class
from cook.export.experts_folder import write_experts
from cook.export.model_folder import published
from cook.export.pruned_folder import Pruned, open_masks, write_pruned
from cook.export.vocabulary import least_count, read_vocabulary, tokenizer_in, with_vocabulary
from cook.families.consumers import misread_by
from cook.families.registry import stock_type
from cook.families.source import load_model, open_model
from cook.families.streamed import fits_into_memory
from cook.pruning.carving import active_when_carved
from cook.pruning.counts import active_parameters, forward_flops, parameters
from cook.pruning.family import ModelSource, refuse_experts, vocabulary_size
from cook.pruning.mask_set import Masks, kept_counts
from cook.pruning.pad import padded
from cook.pruning.units import PruningSpace
from cook.recipe.plan import MaskPaths, Stage
from cook.recipe.sources import check_masks
from cook.recipe.summary import finished_stages, ladder_row, masks_after, sample_batches
from cook.report.documents import MaskFile, ModelCard, model_card
from cook.report.tables import LadderRow, human_count, markdown_table
from cook.text.smaller import completed, shrink_tokenizer
from cook.training.checkpoint import stored_weights

TOLERANCE = 1e-5
"""Largest allowed relative difference of the logits, for rounding errors of sums in another order."""
COMPARED_LOGITS = 1 << 27
"""Largest number of logits to compare, for rows of 512 tokens."""


@dataclass(frozen=True, kw_only=True)
class ReshapeOptions:
    """The options of the command line; missing ones are taken from the run's config."""

    config: str | None = None
    """Path of the run's `bmcook.json`; None: `config/bmcook.json`, unless `model` is given."""
    overrides: Sequence[str] = ()
    """Changes to the config, `KEY=VALUE`."""
    model: str | None = None
    """A model folder, a CPM-Live `.pt` file, or a training checkpoint of any ZeRO stage."""
    model_config: str | None = None
    """The model's JSON config, if it is not in the folder of the weights."""
    masks: MaskPaths = field(default_factory=MaskPaths)
    """Mask files."""
    vocabulary: str | None = None
    """A file that `cook data vocabulary` wrote, or `min_count=N`: the tokens that occur as often in the run's texts."""
    size: float | None = None
    """Which of the run's several sizes; None: all of them, each in a folder of its own."""
    output: str | None = None
    """The folder to write."""
    uniform: bool = False
    """Pad all blocks with zero units to the size of the largest, so that a stock class can load the result."""
    verify: bool = False
    """Compare the outputs of the masked and the reshaped model before the result is published."""
    time: bool = False
    """Measure the speed of both models."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The model and masks to reshape, and the output folder."""

    model: str
    masks: MaskPaths
    output: str
    config: RunConfig | None
    """The run that these were taken from, if any."""
    stages: list[Stage]
    """The finished stages of that run."""
    number: int = 0
    """The number of the size."""


def find_jobs(options: ReshapeOptions) -> list[Job]:
    """Completes the command line's options from the run's config: one job per size.

    Raises:
        UserError: no stage has finished yet, there is no output folder, or the run has no such size.
    """
    given = options.masks
    config = None
    if options.config or not options.model:
        config = load_config(options.config or "config/bmcook.json", list(options.overrides))
    output = options.output or (f"{config.output_dir}/pruned" if config else None)
    if output is None:
        raise UserError("there is no output folder for the small model", remedy="give --output DIR")
    if options.model:
        if options.size is not None:
            raise UserError("--size chooses one of a run's sizes", remedy="name its mask files instead")
        return [Job(model=options.model, masks=given, output=output, config=config, stages=[])]
    assert config is not None
    stages = finished_stages(config)
    if not stages:
        raise UserError(
            f"no stage has finished under {config.output_dir}",
            remedy="train first (cook train --stage all), or give --model and masks",
        )
    last = stages[-1]
    check_masks(last)
    names, asked = [f"{size:g}" for size in last.sizes], None if options.size is None else f"{options.size:g}"
    if asked and asked not in names:
        wanted = ", ".join(names) or "no --size, since it has made one model"
        raise UserError(f"--size {asked}: {last.name} has made no such size", wanted=wanted)
    jobs = []
    for number, name in enumerate(names or [""]):
        if asked in (None, name):
            own = masks_after(last, number)
            masks = MaskPaths(**{kind: getattr(given, kind) or path for kind, path in vars(own).items()})
            folder = f"{output}/{name}" if name and not (asked and options.output) else output
            model = str(last.folder / "model")
            jobs.append(Job(model=model, masks=masks, output=folder, config=config, stages=stages, number=number))
    return jobs


def reshape_run(options: ReshapeOptions) -> None:
    """Finds model and masks, then reshapes, verifies and publishes the result.

    Raises:
        UserError: model or masks are missing or do not fit.
        RunFailed: the result differs from the masked model, or cannot be written.
    """
    check_versions()
    for job in find_jobs(options):
        _reshape(job, options)


def _reshape(job: Job, options: ReshapeOptions) -> None:
    model_config = read_json(options.model_config) if options.model_config else None
    source = open_model(job.model, config=model_config, read_checkpoint=stored_weights)
    tokens = kept_tokens(options.vocabulary, job.config, source) if options.vocabulary else ()
    whole = source
    if tokens:
        source = with_vocabulary(whole, tokens)
        print(f"vocabulary  {whole.config['vocab_size']:,} → {len(tokens):,} tokens")
    given = job.masks
    space, masks = open_masks(source, **given.by_option)
    experts = source.adapter.experts(source.config)
    if masks or options.uniform:
        refuse_experts(experts)
    if not masks and not tokens and not experts:
        if job.stages and job.stages[-1].pattern_mask:
            print(f"{job.model}: pruned with a sparsity pattern, at its full size; there is nothing to reshape")
            return
        raise UserError(
            "there are no masks to apply",
            remedy="give a mask, such as --coarse-mask, --heads-mask, --dimff-mask or --hidden-mask",
        )
    files = [path for path in vars(given).values() if path]
    print(f"model  {source.path}\nmasks  {', '.join(files) or 'none'}")
    even = padded(source, space, masks) if options.uniform else (source, masks)
    # The run's rows have the ids of the whole vocabulary.
    batches, what = sample_batches(None if tokens else job.config, source, rows=compared_rows(source))
    output = Path(job.output)
    with published(output, source=source.path) as folder:
        if experts:
            pruned = write_experts(source, space, folder)
        else:
            pruned = write_pruned(even[0], space, even[1], folder, record=masks)
        companions = copy_companions(source.folder, folder)
        if tokens:
            shrink_tokenizer(folder, tokens)
        if pruned.needs_remote_code:
            name_tokenizer_class(folder, str(stock_type(source.config)))
        checked = Checked(pruned=pruned, companions=companions)
        if options.verify:
            checked = verify(checked, whole, space, masks, batches, what, tokens)
        speeds = measured_speeds(whole, folder, space, batches[0]) if options.time else {}
        print(comparison(whole.adapter.space(whole.config), space, even[1], batches, speeds))
        if experts:
            print(f"{human_count(active_when_carved(space, experts))} parameters are active per token\n")
        card = ModelCard(
            name=output.resolve().name,
            rows=_rows(job, parameters(space, kept_counts(masks)) if tokens else None),
            base_model=(job.config.model.path if job.config else None) or str(source.path),
            license="other",
            license_note="The licence of the weights is that of the model and the text they were trained on.",
            commands=[*training_commands(job), " ".join(["python", *sys.argv])],
            masks=[MaskFile(name=Path(path).name, sha256=sha256(path)) for path in files],
            auto_class=pruned.auto_class,
            pipeline=AUTO_CLASSES.get(pruned.auto_class, "text-generation"),
            active_parameters=active_when_carved(space, experts) if experts else None,
            trust_remote_code=pruned.needs_remote_code,
            misread_by=misread_by(pruned.config),
            max_difference=checked.difference,
            difference_note=checked.note,
            versions=[(name, importlib.metadata.version(name)) for name in ("torch", "transformers")],
        )
        write_atomically(folder / "README.md", model_card(card))
    announce(checked, output)


def kept_tokens(vocabulary: str, config: RunConfig | None, source: ModelSource) -> tuple[int, ...]:
    """The ids that stay by the option `vocabulary`, ascending.

    Raises:
        UserError: the file or the number cannot be used, or there is no run whose texts could be counted.
    """
    least = least_count(vocabulary)
    if least is None:
        return read_vocabulary(vocabulary, source.folder)
    if config is None:
        remedy = "give --config, or count with `cook data vocabulary` and give its file"
        raise UserError(f"--vocabulary {vocabulary}: there is no run whose texts could be counted", remedy=remedy)
    texts = chain.from_iterable(open_split(data).training_texts() for data in one_source_each(config.data))
    counts = count_tokens(texts, tokenizer_in(source.folder))
    return completed(source.folder, np.flatnonzero(counts >= least).tolist())


def _rows(job: Job, with_tokens: int | None) -> list[LadderRow]:
    """The first model of the run, and the one that is reshaped, with its parameters if it has fewer tokens."""
    rows = [ladder_row(stage) for stage in job.stages[:1] if len(job.stages) > 1]
    for stage in job.stages[-1:]:
        row = ladder_row(stage, number=job.number)
        rows.append(row if with_tokens is None else replace(row, parameters=with_tokens))
    return rows


def training_commands(job: Job) -> list[str]:
    """The commands that trained the model's stages, one per stage."""
    if job.config is None:
        return []
    return [f"deepspeed cook/train.py --config {job.config.source.bmcook} --stage {stage.name}" for stage in job.stages]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A reshaped model and the result of its verification."""

    pruned: Pruned
    companions: Companions
    difference: float | None = None
    """Largest relative difference of the outputs; None: not compared."""
    note: str = ""
    """What was compared, and on which data."""


def compared_rows(source: ModelSource) -> int:
    """Number of rows to compare on, such that their logits are small compared to a model."""
    return max(1, min(16, COMPARED_LOGITS // (512 * vocabulary_size(source.config))))


def verify(
    checked: Checked,
    source: ModelSource,
    space: PruningSpace,
    masks: Masks,
    batches: list[Batch],
    what: str,
    tokens: Sequence[int] = (),
) -> Checked:
    """Compares the outputs of the masked and of the reshaped model; only one of them is in memory at a time.

    Of models that do not fit into memory, only one layer is.

    If the reshaped model has only `tokens`, these are the columns of the logits that are compared.

    Compares in fp32. In deep models rounding errors accumulate: if the difference in fp32 is above the tolerance,
    fp64 decides, in which rounding errors nearly vanish and a mistake does not.

    Weights in 16 bits that reshaping has multiplied are compared before they were rounded again.

    Raises:
        RunFailed: the outputs differ.
    """
    exact = unrounded(source, space, masks, tokens)
    for dtype, name in ((torch.float32, "fp32"), (torch.float64, "fp64")):
        streamed = not fits_into_memory(source, dtype)
        batches = together(batches) if streamed else batches
        model, witness = masked_model(source, space, masks, dtype, streamed=streamed)
        size = vocabulary_size(source.config)
        wanted = answers_for(model, batches, tokens, size) if tokens else answers(model, batches)
        del model
        gc.collect()  # modules have circular references
        small = written_model(checked.pruned.folder, dtype, streamed=streamed, exact=exact)
        apart = difference(wanted, answers(small, batches))
        del small
        gc.collect()
        if apart <= TOLERANCE:
            break
        print(f"in {name} the largest relative difference is {apart:.1e}, above {TOLERANCE:.0e}")
    note = f"{name}, {what}, {witness}"
    if exact:
        note += f", {len(exact)} weights before they were rounded to 16 bits again"
    if apart > TOLERANCE:
        raise RunFailed(
            f"masked against reshaped model, {note}: largest relative difference {apart:.1e}, NOT EQUAL\n"
            "  Nothing was written."
        )
    return replace(checked, difference=apart, note=note)


def measured_speeds(source: ModelSource, folder: Path, space: PruningSpace, batch: Batch) -> dict[str, float]:
    """Forward tokens/s before and after, measured for some seconds each; one model is in memory at a time."""
    if parameters(space) > LARGEST_TIMED:
        return {}
    device = default_device()
    tokens, speeds = batch["targets"].numel(), {}
    for name, build in (("before", partial(load_model, source)), ("after", partial(written_model, folder))):
        speeds[name] = tokens / pass_seconds(build(dtype=torch.float32).to(device), batch, device)
        gc.collect()
    return speeds


def comparison(
    whole: PruningSpace, space: PruningSpace, masks: Masks, batches: list[Batch], speeds: dict[str, float]
) -> str:
    """Parameters and FLOPs per token before and after, as a table; measured tokens/s where there are any."""
    length = batches[0]["targets"].shape[1]
    rows = []
    mixed = bool(space.of("experts"))
    for name, of, kept in (("before", whole, {}), ("after", space, kept_counts(masks))):
        flops = forward_flops(of, kept, context=length)
        active = [human_count(active_parameters(of, kept))] if mixed else []
        rows.append([name, human_count(parameters(of, kept)), *active, human_count(flops)])
        rows[-1] += [human_count(speeds[name])] if speeds else []
    columns = [
        "",
        "parameters",
        *(["active"] if mixed else []),
        "FLOPs per token",
        *(["tokens/s forward"] if speeds else []),
    ]
    return "\n" + markdown_table(columns, rows) + "\n"


def announce(checked: Checked, output: Path) -> None:
    """Prints what was written and whether it was verified."""
    pruned, companions = checked.pruned, checked.companions
    if checked.difference is not None:
        print(
            f"masked against reshaped model, {checked.note}: largest relative difference {checked.difference:.1e}, "
            "equal to rounding"
        )
    if pruned.live_obstacle:
        print(f"no CPM-Live .pt was written: {pruned.live_obstacle}")
    elif pruned.live_obstacle is None:
        print(f"CPM-Live format: {output}/cpm_live.pt and cpm_live.json")
    if pruned.account.carried:
        print(
            f"copied unchanged, since {pruned.config['architectures'][0]} does not use them: "
            + listed(pruned.account.carried)
        )
    if pruned.account.outgrown:
        print(f"left out, since they are made for the hidden size before: {listed(pruned.account.outgrown)}")
    if companions.copied:
        print(f"copied: {listed(companions.copied)}")
    if companions.left:
        print(f"not copied: {listed([f'{name} ({reason})' for name, reason in companions.left])}")
    if not companions.has_tokenizer:
        print("the model has no tokenizer files; add yours to the folder")
    for sentence in misread_by(pruned.config):
        print(f"warning: {sentence}")
    option = ", trust_remote_code=True" if pruned.needs_remote_code else ""
    print(f"written: {output}  ({pruned.auto_class}.from_pretrained(…{option}))")


def listed(names: Sequence[str], most: int = 12) -> str:
    """The first `most` names, and the number of further ones."""
    more = f", and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
