"""The run of a stage of a language model: it opens inputs, data and engine, trains, and ends the stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from cook.base import distributed
from cook.base.batches import Batch, on_device
from cook.base.device import card
from cook.base.distributed import on_all_ranks, on_first_rank, say
from cook.base.errors import UserError, out_of_memory
from cook.base.modes import evaluating
from cook.base.seeds import derived_seed, restore_rng_state, rng_state, seed_everything
from cook.base.watchdog import At
from cook.data.packing import NO_TARGET
from cook.data.token_loss import model_inputs
from cook.data.training_data import TrainingData, load_rows
from cook.distill.distiller import Distiller
from cook.evaluation.all_ranks import held_out_loss
from cook.families.source import unfilled_model, without_units
from cook.pruning.attach import AttachedGates
from cook.pruning.compensation import MeanInputs, compensable
from cook.pruning.family import vocabulary_size
from cook.pruning.gates import Gates
from cook.pruning.search import search_blocks
from cook.quantization.prepare import FakeQuantization
from cook.quantization.schemes import described
from cook.recipe.cards import card_of_device
from cook.recipe.carried import carry_optimizer
from cook.recipe.compact import without_masked_units
from cook.recipe.distillation import check_teacher_tokenizer, make_distiller, open_distillation
from cook.recipe.dry_run import model_flops
from cook.recipe.inputs import make_gates, open_inputs
from cook.recipe.moefy import experts_identity, open_dense, with_experts
from cook.recipe.pattern import masked_weights, pattern_identity, pattern_masks, pattern_spec
from cook.recipe.plan import Stage
from cook.recipe.quantize import quantization_record, quantized_modules, stage_scheme
from cook.recipe.runner import StageRun, follows
from cook.recipe.sizes import TrainedSizes, stage_loss
from cook.recipe.stage_data import SourceMixer, check_corpus, open_loader
from cook.recipe.stage_output import stage_record, write_masks, write_model
from cook.report.gate_log import GateGroup, GateLog
from cook.training.engine import Engine
from cook.training.loop import Run
from cook.training.micro_batch import MicroBatch
from cook.training.settings import check_settings, resolve_precision
from cook.training.step import try_step


class LanguageModelRun(StageRun):
    """Pretraining, mask training, finetuning with fixed masks, a pattern, or the random baseline."""

    def __init__(self, stage: Stage, *, resume: str, at: At):
        super().__init__(stage, resume=resume, at=at, tensorboard=stage.config.logging.tensorboard)
        self.stage = stage

    def open(self) -> None:
        stage = self.stage
        check_settings(stage.config.training, stage.config.deepspeed, world_size=distributed.world_size())
        self.inputs = self.trained = on_all_ranks(lambda: open_dense(stage) if stage.is_moefy else open_inputs(stage))
        self.distillation = on_all_ranks(lambda: open_distillation(stage, self.inputs))
        self.quantized = on_all_ranks(lambda: quantized_modules(stage, self.inputs, self.distillation))

    def load(self) -> None:
        config, model = self.stage.config, self.inputs.model_config
        options: dict[str, Any] = {
            "prompt_length": model.get("prompt_length", 0),
            "output_dir": config.output_dir,
            "seed": config.seed,
            "limits": {key: model.get(key) for key in ("prompt_types", "segment_types")},
        }
        # The first rank prepares the data, the others read its result.
        on_first_rank(lambda: load_rows(config.data, config.tokenizer, **options) and None)
        self.data: TrainingData = on_all_ranks(lambda: load_rows(config.data, config.tokenizer, build=False, **options))
        if self.data.tokenizer.vocab_size > vocabulary_size(model):
            raise UserError(
                "the tokenizer has more ids than the model",
                wanted=f"at most {vocabulary_size(model)}",
                got=self.data.tokenizer.vocab_size,
            )
        for note in self.data.notes:
            say(note)
        trains_tokenizer = not config.tokenizer.path
        if self.distillation and self.distillation.source and trains_tokenizer:
            check_teacher_tokenizer(self.distillation.source.path, self.data.tokenizer)

    def prepare(self) -> list[Any]:
        stage, inputs = self.stage, self.inputs
        self._seed()
        self.zeros = pattern_masks(
            stage, inputs, lambda: open_loader(stage, self.data, ledger=False), self._build, self.at, self.resume
        )
        if self.zeros:
            self._seed()  # Scoring draws random numbers; a run that reads existing masks does not.
            assert inputs.weights is not None
            self.inputs = replace(inputs, weights=masked_weights(inputs.weights, self.zeros))
        if stage.is_moefy:
            self.inputs = with_experts(
                stage,
                inputs,
                lambda: open_loader(stage, self.data, ledger=False),
                self._build,
                lambda engine: stage_loss(stage, engine, self.data.held_out),
                self.at,
                self.resume,
            )
            self._seed()
        self.trained = without_masked_units(stage, self.inputs, self.distillation)  # the same unless units are removed
        applied = inputs.nested or (inputs.fixed,)
        fixed = [[name, mask.tolist()] for masks in applied for name, mask in sorted(masks.items())]
        start = follows(stage) or inputs.origin
        form = ["without masked units"] if self.trained is not self.inputs else []
        made = [*pattern_identity(stage), *experts_identity(stage)]
        return [self.data.train.fingerprint, start, fixed, *made, *form]

    def train(self) -> Callable[[], dict[str, Any]]:
        search, opened = self._fitted()
        engine, gates, attached, sizes, distiller = opened
        stage, data = self.stage, self.data
        self.precision = engine.precision
        say(self._opening(engine))
        loader = open_loader(stage, data)
        mixer = SourceMixer(stage, loader, data, engine, self.log, self.at)

        def after_step(step: int) -> None:
            if search:
                search.works()
            mixer.after_step(step)

        world, peak = distributed.world_size(), card_of_device(card())
        run = Run(
            name=stage.name,
            engine=engine,
            batches=loader,
            training=stage.config.training,
            attached=attached,
            gates=gates,
            gate_log=self._gate_log(),
            extra_loss=distiller,
            projections=distiller.projections if distiller else None,
            checkpoints=stage.folder / "checkpoints",
            fingerprint=self.identity,
            on_save=lambda: write_masks(stage, self.inputs, gates),
            at=self.at,
            before_step=sizes.before_step,
            after_step=after_step,
            step_flops=model_flops(stage, self.trained, self.distillation, world),
            peak_flops=None if peak is None else world * (peak.single if engine.precision == "fp32" else peak.half),
        )
        try:
            position = self.fit(
                run,
                notes=data.notes,
                begin=lambda resumed: check_corpus(stage, resumed=resumed),
                ready=lambda resumed: self._ready(opened, resumed=resumed),
            )
        except Exception as error:
            if search and out_of_memory(error):
                raise search.failure() from error
            raise
        finally:
            loader.close()
        self.at(position.step, "finishing")
        if distiller:
            distiller.remove()
        losses = sizes.held_out_losses(engine, data.held_out)
        self._log_losses(position.step, losses)
        write_model(stage, self.inputs, self.trained, data.tokenizer, engine, gates)
        state = loader.state_dict()  # for some loaders a collective
        attached.remove()
        engine.close()

        def finish() -> dict[str, Any]:
            write_masks(stage, self.inputs, gates)
            record = stage_record(stage, self.inputs, gates, position=position, data=state, losses=losses)
            return record | quantization_record(stage, self.quantized, self.precision)

        return finish

    def _opened(self) -> Opened:
        stage, inputs = self.stage, self.trained
        training, adapter, form = stage.config.training, inputs.adapter, inputs.adapter.call_form(inputs.model_config)
        weights, settings = inputs.weights, stage.config.deepspeed
        engine = Engine(self._build, weights, training, settings, call_form=form, on_host=adapter.on_host)
        if self.zeros:
            engine.hold_zeros(self.zeros, gradients_only=pattern_spec(stage).quirks.drifting_weights)
        if inputs is not self.inputs:
            whole = self.inputs
            engine.stored_config = without_units(whole.model_config, whole.head_unit, whole.fixed)
        if scheme := stage_scheme(stage):
            FakeQuantization(engine.module, scheme, self.quantized)
        gates, attached = make_gates(stage, self.inputs), self._attach(engine)
        sizes = TrainedSizes(stage, inputs, attached, gates, engine.device)
        largest = sizes.largest if stage.sizes and training.train_weights else None
        distiller = make_distiller(self.distillation, stage, engine, attached, largest)
        return Opened(engine, gates, attached, sizes, distiller)

    def _fitted(self) -> tuple[MicroBatch | None, Opened]:
        """Opens the engine; with `micro_batch_size` "auto", with a micro-batch that fits in memory on all ranks."""
        config = self.stage.config
        if config.training.micro_batch_size != "auto":
            return None, self._opened()
        settings = check_settings(config.training, config.deepspeed, world_size=distributed.world_size())
        zero, precision = settings["zero_optimization"]["stage"], resolve_precision(config.training, config.deepspeed)
        search = MicroBatch(self.stage.folder, config.training, {"zero_stage": zero, "precision": precision})
        random = rng_state()
        while True:
            self.at(0, "starting")
            training = replace(config.training, micro_batch_size=search.rows)
            self.stage = replace(self.stage, config=replace(config, training=training))
            restore_rng_state(random)
            opened = self._opened()
            if search.is_good or zero == 3 or search.fits(self._trial(opened)):
                say(f"{self.stage.name}: micro-batches of {search.rows} row(s)")
                return search, opened
            if opened.distiller:
                opened.distiller.remove()
            opened.attached.remove()
            opened.engine.close()
            del opened

    def _trial(self, opened: Opened) -> Callable[[], None]:
        """A function that runs the passes of a step on the stage's first micro-batch."""
        rank, world = distributed.rank(), distributed.world_size()
        loader = open_loader(self.stage, self.data, ledger=False)
        try:
            batch = loader.micro_batches(0, rank, world, self.stage.config.training.rows_at_once(world))[0]
        finally:
            loader.close()

        def passes() -> None:
            opened.sizes.before_step(1)
            try_step(opened.engine, batch, attached=opened.attached, gates=opened.gates, extra_loss=opened.distiller)

        return passes

    def _ready(self, opened: Opened, *, resumed: bool) -> None:
        """Finds what a checkpoint would hold: the optimizer's state, the blocks that a search removes, and means."""
        engine, gates = opened.engine, opened.gates
        if not resumed:
            if sentence := carry_optimizer(self.stage, self.inputs, self.trained, engine):
                say(f"{self.stage.name}: {sentence}")
            if gates and gates.start == "search":
                self._settle(opened, gates)
            if gates and self.stage.compensates:
                gates.means = self._means(opened)
        if gates:
            opened.attached.compensate({name: mean.to(engine.device) for name, mean in gates.means.items()})

    def _first_batches(self) -> list[Batch]:
        """This rank's micro-batches of the first `gates.start_steps` steps."""
        stage, rank, world = self.stage, distributed.rank(), distributed.world_size()
        rows = stage.config.training.rows_at_once(world)
        with closing(open_loader(stage, self.data, ledger=False)) as loader:
            return [
                batch
                for step in range(stage.config.gates.start_steps)
                for batch in loader.micro_batches(step, rank, world, rows)
            ]

    @torch.no_grad()
    def _means(self, opened: Opened) -> dict[str, torch.Tensor]:
        """The mean input features of output projections, with the gates open."""
        engine, batches = opened.engine, self._first_batches()
        groups = compensable(self.trained.space, self.trained.learned)
        means = MeanInputs(engine.module, groups)
        kinds = [name for kind, name in (("heads", "heads"), ("dimff", "dims")) if kind in {g.kind for g in groups}]
        say(f"{self.stage.name}: what removed {' and '.join(kinds)} add on average stays as a bias")
        with evaluating(engine.module):
            for batch in batches:
                self.at(0, "starting")
                means.at((batch["targets"].flatten() != NO_TARGET).nonzero().flatten().to(engine.device))
                engine(**model_inputs(on_device(batch, engine.device)))
        means.remove()
        return means.means()

    def _settle(self, opened: Opened, gates: Gates) -> None:
        """Searches for the blocks to remove."""
        stage, inputs, (engine, _, attached, _, distiller) = self.stage, self.inputs, opened
        assert stage.config.coarse is not None, "a search without a target for blocks"
        batches = self._first_batches()

        def measure(masks: Mapping[str, torch.Tensor]) -> float:
            self.at(0, "starting")
            attached.set({name: mask.to(engine.device) for name, mask in masks.items()})
            return held_out_loss(engine, batches, engine.device, distiller)

        coarse = stage.config.coarse
        with evaluating(engine.module):
            gates.settle(search_blocks(measure, inputs.space, inputs.learned, coarse.target_sparsity, unit=coarse.unit))

    def _seed(self) -> None:
        seed_everything(derived_seed(self.stage.config.seed, self.stage.name, distributed.rank()))

    def _build(self) -> torch.nn.Module:
        inputs = self.trained
        if inputs.weights is not None:
            return unfilled_model(inputs.adapter, inputs.model_config)
        # The same fresh weights on every rank and for every world size.
        with torch.random.fork_rng():
            torch.manual_seed(derived_seed(self.stage.config.seed, "weights"))
            return inputs.adapter.build(inputs.model_config)

    def _attach(self, engine: Engine) -> AttachedGates:
        inputs = self.trained
        names = {group.name for group in inputs.learned}.union(inputs.fixed, *inputs.nested)
        groups = [group for group in inputs.space.every if group.name in names]
        fixed = {name: mask.to(engine.device) for name, mask in inputs.fixed.items()}
        return AttachedGates(engine.module, groups, fixed)

    def _gate_log(self) -> GateLog | None:
        if not self.inputs.learned or not self.stage.config.training.log_gates:
            return None
        groups = [
            GateGroup(
                name=group.name,
                layer=group.layer,
                site=group.site,
                kind="blocks" if group.kind == "layer" else group.kind,
                units=group.size,
                members=group.members,
            )
            for group in self.inputs.learned
        ]
        return GateLog(self.stage.folder, groups, enabled=distributed.rank() == 0)

    def _opening(self, engine: Engine) -> str:
        stage, training = self.stage, self.stage.config.training
        held = [kind for kind, path in vars(stage.fixed).items() if path]
        does = [f"learns {' and '.join(stage.learns)} masks"] if stage.learns else []
        does += ["applies a pattern"] if stage.pattern_mask else []
        if stage.is_moefy:
            does += ["trains a mixture of experts" if training.train_weights else "makes a mixture of experts"]
        does += (
            [f"applies {' and '.join(held)} masks"] if held else ["random masks"] if stage.is_random_baseline else []
        )
        does += [f"{len(stage.sizes)} nested sizes"] if stage.sizes else []
        does += [described(stage.quantization.scheme, self.quantized)] if stage.quantization else []
        is_trained = training.train_weights or not stage.is_moefy
        length = f"{training.steps} steps × {training.train_batch_size} rows" if is_trained else "no training"
        does = [length, *(does or ["no masks"])]
        return f"\n{stage.name}: {', '.join(does)}, from {self.inputs.origin}; {engine.described()}"

    def _log_losses(self, step: int, losses: list[float | None]) -> None:
        if self.stage.config.training.eval_rows:
            by_size = {f"{size:g}": loss for size, loss in zip(self.stage.sizes, losses, strict=False)}
            named = {"held_out_loss_of_size": by_size} if by_size else {}
            self.log.write({"step": step, "held_out_loss": losses[0], **named})


class Opened(NamedTuple):
    """An engine, and what belongs to its model."""

    engine: Engine
    gates: Gates | None
    attached: AttachedGates
    sizes: TrainedSizes
    distiller: Distiller | None
