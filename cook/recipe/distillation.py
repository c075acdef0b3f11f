"""The teacher of a stage, and the places in teacher and student that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cook.base.batches import Batch
from cook.base.distributed import say
from cook.base.errors import UserError
from cook.base.seeds import derived_seed
from cook.config.check_training import own_teacher_moves, unfit_for_itself
from cook.config.distillation import OWN_TEACHER, DistillationConfig
from cook.data.token_loss import model_inputs
from cook.distill.distiller import Distiller, Teacher, model_teacher, stream_weights
from cook.distill.taps import Pair, Place, check_pairs, raise_pairs, read_pair
from cook.distill.teacher_loss import Projections
from cook.export.check import quiet
from cook.families.source import load_model, open_model, placed
from cook.families.stock_models import own_path
from cook.pruning.attach import AttachedGates
from cook.pruning.family import Adapter, ModelConfig, ModelSource, vocabulary_size
from cook.recipe.inputs import Inputs
from cook.recipe.plan import Stage
from cook.text.hf import HuggingFaceTokenizer
from cook.text.jieba import JiebaTokenizer
from cook.text.tokenizer import Tokenizer, load_tokenizer
from cook.training.engine import Engine

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
SAMPLES = (
    "The quick brown fox jumps over the lazy dog. It wasn't there in 1998, 2007 or 2,026,413 years ago.",
    "def f(x):\n    return {'a': x ** 2}  # note\n\n\n<b>bold</b>\t~~~ ====",
    "Die Straße führte naïve Gäste über “große” Brücken — für 12,50 €. В лесу родилась ёлочка. Το ταξίδι.",
    "今天天气很好，我们去公园。日本語の文章です。한국어 문장입니다. هذا نص قصير. यह एक वाक्य है। 😀👩‍👩‍👧",
)
"""Texts on which tokenizers differ: words, numbers, spaces, code, scripts."""


@dataclass(frozen=True, kw_only=True)
class DistillationPlan:
    """The distillation of a stage, checked against both models."""

    options: DistillationConfig
    source: ModelSource | None
    """The teacher on disk; None if the model is its own teacher."""
    hidden: tuple[Pair, ...]
    """Pairs of places, by the names in the two models."""
    attention: tuple[Pair, ...]


def open_distillation(stage: Stage, inputs: Inputs, *, must_exist: bool = True) -> DistillationPlan | None:
    """Finds the teacher and the places to compare, without reading weights; None if the stage has no teacher.

    Args:
        stage: The plan.
        inputs: The inputs of the stage.
        must_exist: False for a dry run, where a teacher that an earlier stage will write may be missing.

    Raises:
        UserError: the teacher does not fit the student, or lacks a place that is compared.
    """
    options = stage.config.distillation
    if options is None:
        return None
    source = None
    if options.teacher == OWN_TEACHER:
        if why := unfit_for_itself(stage.name, stage.config.training, stage.config.joint):
            raise own_teacher_moves(f"{stage.name} ({why})")
    elif not must_exist and not Path(options.teacher).exists():
        return None
    else:
        source = open_model(options.teacher)
        _check_teacher(options.teacher, source, inputs)
        tokenizer = stage.config.tokenizer
        if tokenizer.path and Path(tokenizer.path).exists():  # else the run trains one on its corpus
            check_teacher_tokenizer(source.path, load_tokenizer(tokenizer.type, tokenizer.path))
    teacher = source or inputs
    config = source.config if source else inputs.model_config
    written = {"mse_hidn_module": options.mse_hidn_module, "mse_att_module": options.mse_att_module}
    pairs = {key: tuple(map(read_pair, some)) for key, some in written.items()}
    pairs = _own_names(pairs, inputs.model_config, config)
    check_pairs(pairs, _skeleton(inputs.adapter, inputs.model_config), _skeleton(teacher.adapter, config))
    pairs = {key: _without_masked(some, inputs) for key, some in pairs.items()}
    return DistillationPlan(
        options=options, source=source, hidden=pairs["mse_hidn_module"], attention=pairs["mse_att_module"]
    )


def check_teacher_tokenizer(folder: Path, own: Tokenizer) -> None:
    """Checks that the teacher's token ids mean the same text as the run's.

    Args:
        folder: The teacher's folder.
        own: The run's tokenizer.

    Raises:
        UserError: the tokenizer in the teacher's folder gives other ids.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        say(f"{folder}: the teacher has no tokenizer; its token ids are assumed to be those of the run")
        return
    try:
        if isinstance(own, JiebaTokenizer):  # a package that CPM-Ant's class needs may be missing
            theirs: Tokenizer = JiebaTokenizer.load(folder / "vocab.txt")
        else:
            with quiet():  # of a model that is not transformers' own, it would say that it does not know the type
                theirs = HuggingFaceTokenizer.load(folder)
    except UserError as error:
        raise UserError(
            f"distillation.teacher: the tokenizer in {folder} cannot be compared with the run's",
            got=error.what,
            remedy="if both give the same ids, remove the tokenizer's files from the teacher's folder",
        ) from None
    if theirs.fingerprint != own.fingerprint and (difference := _difference(own, theirs)):
        raise UserError(
            f"distillation.teacher: the tokenizer in {folder} gives different ids than the run's",
            got=difference,
            remedy="use a teacher with the same tokenizer, or remove distillation",
        )


Values = Callable[[], Mapping[str, torch.Tensor]]
"""The present values of a model's gates, by group name."""


def make_distiller(
    plan: DistillationPlan | None,
    stage: Stage,
    engine: Engine,
    attached: AttachedGates,
    largest: Values | None = None,
) -> Distiller | None:
    """Creates the stage's distillation loss; gates must be attached before, so that taps see gated values.

    Args:
        plan: The distillation; None: none.
        stage: The plan of the stage.
        engine: The model in training.
        attached: Its gates.
        largest: The gates of the largest size, if the stage trains the weights of several.
    """
    if plan is None:
        return None
    options = plan.options
    projections = None
    if options.mse_hidn_proj:
        projections = Projections(seed=derived_seed(stage.config.seed, stage.name), device=engine.device)
    return Distiller(
        engine.module,
        _teacher(plan, stage, engine, attached, largest),
        ce_scale=options.ce_scale,
        ce_temp=options.ce_temp,
        mse_hidn_scale=options.mse_hidn_scale,
        hidden_pairs=plan.hidden,
        projections=projections,
        mse_att_scale=options.mse_att_scale,
        attention_pairs=plan.attention,
    )


def own_teacher(engine: Engine, attached: AttachedGates, *, fixed: bool, largest: Values | None = None) -> Teacher:
    """The model in training as its own teacher: the dense model, while its weights are frozen.

    Args:
        engine: The model in training.
        attached: Its gates, which are opened in the teacher's forward pass.
        fixed: Whether to open the fixed masks too.
        largest: The teacher's gates, instead of open ones.
    """

    def forward(batch: Batch) -> Any:
        with attached.holding(largest()) if largest else attached.opened(fixed=fixed):
            return engine.ask(**model_inputs(batch))

    return Teacher(module=engine.module, forward=forward)


def _teacher(
    plan: DistillationPlan, stage: Stage, engine: Engine, attached: AttachedGates, largest: Values | None
) -> Teacher:
    if plan.source is None and largest:
        say(f"{stage.name}: the largest size is the teacher of the others")
        return own_teacher(engine, attached, fixed=False, largest=largest)
    if plan.source is None:
        # If weights have been trained under the fixed masks, the removed units no longer fit the other weights. The
        # teacher is then the masked model from the start of the stage.
        masks = "with the masks that its weights were trained with" if stage.adapted else "with all masks open"
        say(f"{stage.name}: the model is its own teacher, {masks}")
        return own_teacher(engine, attached, fixed=not stage.adapted)
    model = load_model(plan.source)
    if plan.options.teacher_device == "cpu":
        stream_weights(placed(model, "cpu", engine.dtype), engine.device)
    else:
        placed(model, engine.device, engine.dtype)
    return model_teacher(model, plan.source.adapter.call_form(plan.source.config))


def _check_teacher(name: str, teacher: ModelSource, inputs: Inputs) -> None:
    if not teacher.adapter.is_causal:
        raise UserError(f"distillation.teacher: {name} does not predict the next token")
    for key, value_of in {"vocab_size": vocabulary_size, "prompt_length": _prompt_length}.items():
        wanted, got = value_of(inputs.model_config), value_of(teacher.config)
        if wanted != got:
            raise UserError(
                f"distillation.teacher: {name} and the student differ in {key}", wanted=str(wanted), got=str(got)
            )


def _prompt_length(config: ModelConfig) -> int | None:
    """CPM-Ant's."""
    return config.get("prompt_length")


def _difference(own: Tokenizer, theirs: Tokenizer) -> str | None:
    """A difference between two tokenizers' ids, or None; special tokens that only one of them has do not count."""
    if isinstance(own, HuggingFaceTokenizer) and isinstance(theirs, HuggingFaceTokenizer):
        mine, other = own.ordinary_tokens(), theirs.ordinary_tokens()
        for token in sorted(mine.keys() | other.keys(), key=lambda token: mine.get(token, -1)):
            if mine.get(token) != other.get(token):
                return f"the token {token!r} has the id {mine.get(token)} here and {other.get(token)} there"
        for number in (own.bos_id, own.eos_id):
            if own.decode([number]) != theirs.decode([number]):
                return f"the id {number} is {own.decode([number])!r} here and {theirs.decode([number])!r} there"
    for text in SAMPLES:
        ids, others = own.encode(text), theirs.encode(text)
        if ids != others:
            return f"{text[:20]!r}… begins with the ids {ids[:8]} here and {others[:8]} there"
    return None


def _skeleton(adapter: Adapter, config: ModelConfig) -> torch.nn.Module:
    with torch.device("meta"):
        return adapter.build(config)


def _own_names(
    pairs: dict[str, tuple[Pair, ...]], student: ModelConfig, teacher: ModelConfig
) -> dict[str, tuple[Pair, ...]]:
    """Pairs by the names in the models; the config numbers layers as before any was removed."""
    problems: list[str] = []

    def own(key: str, pair: Pair, who: str, config: ModelConfig, place: Place) -> Place:
        path = own_path(config, place.path)
        if path is None:
            problems.append(f"{key}: {pair}: the {who}'s layer has been removed")
        return Place(place.when, path or place.path)

    found = {
        key: tuple(
            Pair(own(key, p, "student", student, p.student), own(key, p, "teacher", teacher, p.teacher)) for p in some
        )
        for key, some in pairs.items()
    }
    if problems:
        raise_pairs(problems, "modules that exist in both models", "delete the pairs of removed blocks")
    return found


def _without_masked(pairs: tuple[Pair, ...], inputs: Inputs) -> tuple[Pair, ...]:
    """Drops pairs inside blocks that a fixed mask removes, whose weights no longer have an effect."""
    dead = [g for g in inputs.space.of("layer") if g.name in inputs.fixed and not inputs.fixed[g.name].any()]

    def inside(path: str) -> bool:
        return any(
            not group.gate.module.startswith(f"{path}.")  # else the module's output is already gated
            and any(piece.path.startswith(f"{path}.") for piece in group.slices)
            for group in dead
        )

    left_out = [pair for pair in pairs if inside(pair.student.path)]
    if left_out:
        say(f"not distilled, since a mask removes the student's block: {', '.join(map(str, left_out))}")
    return tuple(pair for pair in pairs if pair not in left_out)
