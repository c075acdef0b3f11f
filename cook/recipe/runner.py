"""Runs one stage from its plan to its `done.json`."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from cook.base import distributed
from cook.base.distributed import say
from cook.base.errors import UserError
from cook.base.files import read_json, sha256, write_json
from cook.base.seeds import derived_seed, seed_everything
from cook.base.together import on_all_ranks, on_first_rank
from cook.base.watchdog import At
from cook.data.loader import held_out_batches
from cook.data.training_data import TrainingData, load_rows
from cook.evaluation.perplexity import held_out_loss
from cook.export.model_folder import copy_generation_config, write_model_folder, write_tokenizer
from cook.families.source import unfilled_model
from cook.pruning.attach import AttachedGates
from cook.pruning.counts import parameters
from cook.pruning.gates import Gates
from cook.pruning.mask_file import write_mask_file
from cook.pruning.mask_set import FINE_KEYS, coarse_to_tensors, fine_to_tensors, kept_counts
from cook.recipe.distillation import check_teacher_tokenizer, make_distiller, open_lesson
from cook.recipe.inputs import Inputs, final_masks, make_gates, open_inputs
from cook.recipe.kept_structure import describe_structure
from cook.recipe.pattern import masked_weights, pattern_identity, pattern_masks, pattern_spec
from cook.recipe.plan import Stage
from cook.recipe.sources import changed, changed_sources, check_sources, note_sources
from cook.recipe.stage_data import Feeding, check_corpus, open_loader, rows_before
from cook.report.events import EventLog
from cook.training.checkpoint import find_checkpoint, load_checkpoint
from cook.training.engine import Engine, write_gathered
from cook.training.loop import Run, train
from cook.training.saver import Position
from cook.training.settings import check_settings


def run_stage(stage: Stage, *, resume: str, at: At) -> None:
    """Trains a stage, or goes on with it, or finds it finished.

    Args:
        stage: The plan.
        resume: `auto`, `never`, or a checkpoint's folder.
        at: Told of the step and the phase that begins, for a watchdog.

    Raises:
        UserError: inputs are missing or do not fit, or the folder holds a run with other settings.
        Interrupted: stopped by a signal, after saving.
    """
    if on_first_rank(lambda: is_finished(stage, resume)):
        say_finished(stage)
        return
    at(0, "preparing")
    check_settings(stage.config.training, stage.config.deepspeed, world_size=distributed.world_size())
    inputs = on_all_ranks(lambda: open_inputs(stage))
    lesson = on_all_ranks(lambda: open_lesson(stage, inputs))
    if resume == "never" and distributed.rank() == 0:
        shutil.rmtree(stage.folder, ignore_errors=True)
    distributed.barrier()
    on_first_rank(lambda: check_sources(stage, resume))
    data = _data(stage, inputs)
    if lesson and lesson.source and not stage.config.tokenizer.path:  # one of the run's own making
        check_teacher_tokenizer(lesson.source.path, data.tokenizer)
    on_first_rank(lambda: note_sources(stage))
    build = _builder(inputs, stage)
    at(0, "starting")
    seed_everything(derived_seed(stage.config.seed, stage.name, distributed.rank()))
    if zeros := pattern_masks(stage, inputs, data, build, at, anew=resume == "never"):
        # Scoring has drawn random numbers, which a run that finds its masks made has not.
        seed_everything(derived_seed(stage.config.seed, stage.name, distributed.rank()))
        assert inputs.weights is not None
        inputs = replace(inputs, weights=masked_weights(inputs.weights, zeros))
    identity = _identity(stage, inputs, data)
    training = stage.config.training
    engine = Engine(build, inputs.weights, training, stage.config.deepspeed, call_form=inputs.adapter.inputs)
    if zeros:
        engine.hold_zeros(zeros, gradients_only=pattern_spec(stage).quirks.drifting_weights)
    gates, attached = make_gates(stage, inputs), _attach(engine, inputs)
    distiller = make_distiller(lesson, stage, engine, attached)
    projections = distiller.projections if distiller else None
    say(_opening(stage, inputs, engine))

    loader = open_loader(stage, data)
    found = find_checkpoint(stage.folder / "checkpoints", resume)
    on_first_rank(lambda: check_corpus(stage, resumed=found is not None))
    position = Position(step=0, tokens=0)
    if found:
        position = load_checkpoint(*found, engine, gates, fingerprint=identity, projections=projections)
        saved_by = found[1]["world_size"]
        others = f", saved by {saved_by} rank(s)" if saved_by != distributed.world_size() else ""
        say(f"{stage.name}: going on from step {position.step}{others}")
    started = time.perf_counter()
    with EventLog(stage.folder, stage.config.logging.tensorboard, enabled=distributed.rank() == 0) as log:
        on_first_rank(lambda: log.rewind(position.step if found else -1, position.log))
        run = Run(
            name=stage.name,
            engine=engine,
            batches=loader,
            training=training,
            attached=attached,
            gates=gates,
            extra_loss=distiller,
            projections=projections,
            checkpoints=stage.folder / "checkpoints",
            fingerprint=identity,
            on_save=lambda: _write_masks(stage, inputs, gates),
            at=at,
            after_step=Feeding(stage, loader, data, engine, log, at).after_step,
        )
        if not found and data.notes:
            log.write({"step": 0, "data": list(data.notes)})
        try:
            position = train(run, position, log)
        finally:
            loader.close()
        at(position.step, "finishing")
        if distiller:
            distiller.remove()
        loss = _evaluate(stage, engine, attached, gates, data, log, position)
        _write_model(stage, inputs, engine, data)
        state, seconds = loader.state_dict(), time.perf_counter() - started  # the state is a collective of some loaders
        on_first_rank(lambda: _write_masks(stage, inputs, gates))
        on_first_rank(log.settle)
        on_first_rank(lambda: _write_done(stage, inputs, gates, identity, position, state, loss, seconds))
    attached.remove()
    engine.close()
    distributed.barrier()


def say_finished(stage: Stage) -> None:
    """Tells the user that there is nothing to do."""
    say(f"{stage.name}: already finished, see {stage.done}")


def is_finished(stage: Stage, resume: str) -> bool:
    """Whether the stage's outcome is there and stays.

    Raises:
        UserError: it is there, but of other settings, or of an earlier stage that has been redone since.
    """
    path = stage.done
    if resume != "auto" or not path.exists():
        return False
    done, redo = read_json(path), f"redo it: --stage {stage.name} --resume never"
    if done["fingerprint"] != stage.fingerprint():
        raise UserError(
            f"{path}: {stage.name} finished with other settings",
            remedy=f"choose another output_dir, restore the settings, or {redo}",
        )
    if changes := changed_sources(stage):
        raise changed(f"{path}: {stage.name} finished with other files", changes)
    if done["follows"] != _earlier(stage):
        raise UserError(f"{path}: {stage.after} has been redone since {stage.name} finished", remedy=redo)
    return True


def _earlier(stage: Stage) -> str | None:
    """The identity of the finished stage that this one starts from."""
    before = stage.done_before
    return read_json(before)["identity"] if before and before.exists() else None


def _identity(stage: Stage, inputs: Inputs, data: TrainingData) -> str:
    """Hash of the settings, the data and what earlier stages made: a checkpoint of other ones is not gone on from."""
    masks = [[name, mask.tolist()] for name, mask in sorted(inputs.fixed.items())]
    described = [stage.fingerprint(), data.train.fingerprint, _earlier(stage) or inputs.origin, masks]
    described += pattern_identity(stage)
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _data(stage: Stage, inputs: Inputs) -> TrainingData:
    config = stage.config
    options: dict[str, Any] = {
        "prompt_length": inputs.model_config.get("prompt_length", 0),
        "output_dir": config.output_dir,
        "seed": config.seed,
        "limits": {key: inputs.model_config.get(key) for key in ("prompt_types", "segment_types")},
    }
    # The first rank prepares, the others read what it left.
    on_first_rank(lambda: load_rows(config.data, config.tokenizer, **options) and None)
    data = on_all_ranks(lambda: load_rows(config.data, config.tokenizer, build=False, **options))
    if data.tokenizer.vocab_size > inputs.model_config["vocab_size"]:
        raise UserError(
            "the tokenizer has more ids than the model",
            wanted=f"at most {inputs.model_config['vocab_size']}",
            got=data.tokenizer.vocab_size,
        )
    for note in data.notes:
        say(note)
    return data


def _builder(inputs: Inputs, stage: Stage):
    def build() -> torch.nn.Module:
        if inputs.weights is not None:
            return unfilled_model(inputs.adapter, inputs.model_config)
        # The same fresh weights on every rank and for every number of ranks.
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(stage.config.seed, "weights"))
            return inputs.adapter.build(inputs.model_config)

    return build


def _attach(engine: Engine, inputs: Inputs) -> AttachedGates:
    names = {group.name for group in inputs.learned} | set(inputs.fixed)
    groups = [group for group in inputs.space.groups if group.name in names]
    fixed = {name: mask.to(engine.device) for name, mask in inputs.fixed.items()}
    return AttachedGates(engine.module, groups, fixed)


def _opening(stage: Stage, inputs: Inputs, engine: Engine) -> str:
    training = stage.config.training
    held = [kind for kind in ("layer", "heads", "dimff") if getattr(stage.fixed, kind)]
    does = [f"learns {' and '.join(stage.learns)} masks"] if stage.learns else []
    does += ["holds a pattern"] if stage.pattern_mask else []
    does += [f"holds {' and '.join(held)} masks"] if held else ["random masks"] if stage.is_random_baseline else []
    return (
        f"\n{stage.name}: {training.steps} steps × {training.train_batch_size} rows, "
        f"{', '.join(does) or 'no masks'}, from {inputs.origin}; "
        f"{engine.precision}, ZeRO {engine.zero_stage}, {distributed.world_size()} rank(s) on {engine.device.type}"
    )


def _write_masks(stage: Stage, inputs: Inputs, gates: Gates | None) -> None:
    if gates is None or distributed.rank() != 0:
        return
    masks, writes = final_masks(stage, inputs, gates), stage.writes
    if writes.layer:
        write_mask_file(writes.layer, coarse_to_tensors(inputs.space, masks))
    files = {kind: path for kind, path in (("heads", writes.heads), ("dimff", writes.dimff)) if path}
    tensors = fine_to_tensors(inputs.space, masks) if files else {}
    for kind, path in files.items():
        elsewhere = {FINE_KEYS[other] for other in files if other != kind}
        write_mask_file(path, {key: tensor for key, tensor in tensors.items() if key not in elsewhere})


def _evaluate(
    stage: Stage,
    engine: Engine,
    attached: AttachedGates,
    gates: Gates | None,
    data: TrainingData,
    log: EventLog,
    position: Position,
) -> float | None:
    """The held-out loss with binary masks, which stay attached."""
    attached.set({name: mask.to(engine.device) for name, mask in (gates.binary() if gates else {}).items()})
    loss = None
    training = stage.config.training
    if training.eval_rows:
        engine.module.eval()
        batches = held_out_batches(
            data.held_out, training.micro_batch_size, training.eval_rows, distributed.rank(), distributed.world_size()
        )
        loss = held_out_loss(engine, batches, engine.device)
        log.write({"step": position.step, "held_out_loss": loss})
        say(f"{stage.name}: held-out loss {loss:.4f}")
    return loss


def _write_model(stage: Stage, inputs: Inputs, engine: Engine, data: TrainingData) -> None:
    folder = stage.folder / "model"

    def write(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        try:
            write_model_folder(folder, inputs.adapter, inputs.model_config, weights)
            write_tokenizer(folder, data.tokenizer)
            if inputs.folder is not None:
                copy_generation_config(inputs.folder, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)  # a part of a model would pass for one
            raise

    write_gathered(engine, write)


def _write_done(
    stage: Stage,
    inputs: Inputs,
    gates: Gates | None,
    identity: str,
    position: Position,
    data: dict[str, Any],
    loss: float | None,
    seconds: float,
) -> None:
    masks = final_masks(stage, inputs, gates)
    files = (*vars(stage.fixed).values(), *vars(stage.writes).values(), stage.pattern_mask)
    write_json(
        stage.done,
        {
            "stage": stage.name,
            "fingerprint": stage.fingerprint(),
            "identity": identity,
            "follows": _earlier(stage),
            "steps": position.step,
            "tokens": position.tokens,
            "rows": rows_before(stage) + position.step * stage.config.training.train_batch_size,
            "data": data,
            "seconds": round(seconds, 1),
            "held_out_loss": loss,
            "parameters": parameters(inputs.space, kept_counts(masks)),
            "structure": describe_structure(inputs.space, masks),
            "head_unit": inputs.head_unit,
            "masks": {path: sha256(path) for path in files if path},
        },
    )
