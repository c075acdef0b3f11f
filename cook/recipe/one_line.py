"""`cook prune`: the two configuration files that a one-line job stands for."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cook.base.errors import UserError, UserErrors
from cook.base.files import read_json, write_json
from cook.config.load import load_config
from cook.config.moefy import MoefyJob
from cook.config.tasks import OneLineJob
from cook.evaluation.profile import measure_block_times, time_share
from cook.evaluation.settings import ProfileSettings
from cook.export.vocabulary import with_vocabulary
from cook.families.source import open_model, with_biases
from cook.pruning.block_times import read_block_times
from cook.pruning.budgets import KEEP_KEYS, NUMBERS, WHOLE_KEYS, Keep, check_keep
from cook.pruning.compensation import compensable, keep_of_wider
from cook.pruning.counts import parameters
from cook.pruning.family import ModelSource, vocabulary_size
from cook.pruning.restrict import is_matrix
from cook.pruning.units import WIDE
from cook.recipe.fewer_tokens import FEWER_TOKENS, RECORD, of_the_rest, record_of, write_rest
from cook.recipe.head_units import budget_kinds
from cook.recipe.one_line_scheme import TIMES, scheme_of
from cook.recipe.plan import LEARNS
from cook.recipe.reshape_run import kept_tokens
from cook.recipe.start import make_plan
from cook.report.tables import human_count
from cook.text.hf import check_has_tokenizer

DATA_TYPES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = {".gz", ".bz2", ".zst"}
SHOWN = 4
"""Differences between two recipes that a message lists."""
ALMOST_ALL = 0.99
"""A share of the parameters that every model can keep."""


def parse_keep(values: Sequence[str]) -> dict[str, float]:
    """`["dims=0.7", "heads=6"]` as shares (with a decimal point) and numbers (without one).

    Raises:
        UserError: a value is not of the form KEY=VALUE, or a key is repeated.
    """
    keep: dict[str, float] = {}
    for value in values:
        key, equals, number = value.partition("=")
        try:
            keep[key] = float(number) if "." in number or key not in NUMBERS else int(number)
        except ValueError:
            equals = ""
        if not equals or sum(other.startswith(f"{key}=") for other in values) > 1:
            raise UserError(f"--keep {value}", wanted=f"KEY=VALUE once per key, with KEY one of {', '.join(KEEP_KEYS)}")
    check_keep(keep)
    return keep


def parse_sizes(values: Sequence[str]) -> list[dict[str, float]]:
    """What each size keeps, from the largest: `["params=0.8,0.5"]` has two sizes, `["dims=0.7", "heads=6"]` one.

    Raises:
        UserError: as `parse_keep`; also several sizes of another name, or not in descending order.
    """
    key, _, given = values[0].partition("=") if values else ("", "", "")
    if len(values) != 1 or "," not in given:
        return [parse_keep(values)]
    sizes = [parse_keep([f"{key}={size}"]) for size in given.split(",")]
    if key not in ("params", "flops") or any(after[key] >= before[key] for before, after in pairwise(sizes)):
        raise UserError(
            f"--keep {values[0]}",
            wanted="several sizes in descending order, of params or flops, such as params=0.8,0.5",
        )
    return sizes


def small_models(job: OneLineJob) -> list[tuple[float | None, str]]:
    """Each size as the recipe of the job names it, and the folder of its model; None if there is one size."""
    sizes = parse_sizes(job.keep)
    if len(sizes) == 1:
        return [(None, str(Path(job.output) / "model"))]
    [key] = sizes[0]
    shares = read_json(Path(job.output) / "recipe" / "l0_pruning.json")["joint"][f"target_{key}"]
    folders = [str(Path(job.output) / "model" / f"{size[key]:g}") for size in sizes]
    return list(zip(shares, folders, strict=True))


def remarks(job: OneLineJob) -> list[str]:
    """What the report says beside the table of stages: the time that was reached, and folders with fewer tokens."""
    return [*_reached_time(job), *_fewer_tokens(job)]


def _reached_time(job: OneLineJob) -> list[str]:
    """The measured time of the small model beside its budget, if that is in milliseconds."""
    [keep, *_] = parse_sizes(job.keep)
    if "latency_ms" not in keep:
        return []
    first = Path(job.output) / FEWER_TOKENS if job.vocabulary else local_model(job.model)
    times, budget = read_block_times(Path(job.output) / TIMES), keep["latency_ms"]
    settings = ProfileSettings(length=job.max_length)
    share = time_share(open_model(small_models(job)[0][1]), open_model(first), settings)
    reached = share * times.whole
    return [
        f"A forward pass of {job.max_length} tokens takes {reached:.4g} ms, {100 * share:.0f}% of the whole model's "
        f"time; the budget is {budget:.4g} ms ({100 * (reached / budget - 1):+.0f}%)."
    ]


def _fewer_tokens(job: OneLineJob) -> list[str]:
    """How many tokens were removed before the first stage, and how many parameters with them."""
    if not job.vocabulary:
        return []
    whole, rest = (open_model(path) for path in (local_model(job.model), Path(job.output) / FEWER_TOKENS))
    tokens = [vocabulary_size(source.config) for source in (rest, whole)]
    counts = [human_count(parameters(source.adapter.space(source.config))) for source in (rest, whole)]
    return [
        f"The run started from a model with {tokens[0]:,} of the {tokens[1]:,} tokens, and {counts[0]} of the "
        f"{counts[1]} parameters of {job.model}, of which `--keep params` and `--keep flops` are shares."
    ]


def local_model(name: str) -> Path:
    """The folder of a model: the given folder, or a snapshot of the Hub model of that name.

    Raises:
        UserError: not a folder, and not a Hub name that can be downloaded.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"{name}: there is no such model folder", remedy="check the path, or use a Hub name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # every network and Hub failure has a class of its own
        raise UserError(
            f"{name}: no such folder, and it cannot be downloaded from the Hub",
            got=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            remedy="check the name and the network, or use a model folder",
        ) from None


def write_recipe(job: OneLineJob) -> tuple[Path, dict[str, Any]]:
    """Writes `recipe/bmcook.json` and `recipe/l0_pruning.json` below the output folder, unless they are there.

    If tokens are to be removed, a model without them is written first, from which the recipe starts. If a size
    cannot be reached even so, it stays, and the next try uses it.

    Returns:
        The path of the first one, and the plan (`cook.recipe.start.make_plan`).

    Raises:
        UserError: unknown model or data, a size that cannot be reached, anything else that a plan finds, an output
            folder that cannot be made, or one with the recipe of another job; nothing is written then.
    """
    source, sizes, folder = open_model(local_model(job.model)), parse_sizes(job.keep), Path(job.output) / "recipe"
    check_output(job.output, source.path)
    check_has_tokenizer(source.folder)
    if job.vocabulary:
        source, sizes = _with_fewer_tokens(job, source, sizes)
    files = _recipe_files(job, source, sizes)
    check_same(folder, files)
    times = Path(job.output) / TIMES
    with tempfile.TemporaryDirectory(prefix="cook-plan-") as name:
        aside = Path(name)
        if "latency_ms" in sizes[0] and not times.is_file():
            # Measuring takes a while: every other mistake is found before it.
            planned(_recipe_files(job, source, _easy(sizes)), aside)
            settings = ProfileSettings(length=job.max_length)
            space = source.adapter.space(source.config)
            wide = [kind for kind in budget_kinds(space, job.units, job.pin, job.hidden) if kind in WIDE]
            measured = measure_block_times(source, settings, wide=wide, on_point=print)
            write_json(aside / TIMES, measured.as_json())
            joint = files["l0_pruning.json"]["joint"] | {"block_times": str(aside / TIMES)}
            plan = planned(files | {"l0_pruning.json": files["l0_pruning.json"] | {"joint": joint}}, aside)
            write_json(times, read_json(aside / TIMES))
        else:
            plan = planned(files, aside)
    for name, content in files.items():
        if not (folder / name).exists():
            write_json(folder / name, content)
    return folder / "bmcook.json", plan | {"config": str(folder / "bmcook.json")}


def _with_fewer_tokens(
    job: OneLineJob, source: ModelSource, sizes: Sequence[Keep]
) -> tuple[ModelSource, list[dict[str, float]]]:
    """The model without the tokens that go, written unless it is there, and what each size keeps of it."""
    rest, recipe = Path(job.output) / FEWER_TOKENS, Path(job.output) / "recipe"
    record = record_of(job.vocabulary, source)
    if (recipe / "bmcook.json").exists() and not (recipe / RECORD).exists():
        raise _of_another_job(recipe, "all tokens stay")
    check_same(recipe, {RECORD: record})
    if rest.exists() and (recipe / RECORD).exists():
        smaller = open_model(rest)
        return smaller, of_the_rest(sizes, source, smaller, job.max_length)
    with tempfile.TemporaryDirectory(prefix="cook-plan-") as name:
        # Counting tokens and writing a model take a while: every other mistake is found before them.
        planned(_recipe_files(job, source, _easy(sizes)), Path(name))
        tokens = kept_tokens(job.vocabulary, load_config(str(Path(name) / "bmcook.json")), source)
    keeps = of_the_rest(sizes, source, with_vocabulary(source, tokens), job.max_length)
    write_json(recipe / RECORD, record)
    write_rest(source, tokens, rest)
    return open_model(rest), keeps


def _easy(sizes: Sequence[Keep]) -> Sequence[Keep]:
    """The same, with budgets for the whole model that every model can reach."""
    return [{"params": ALMOST_ALL}] if set(sizes[0]) & set(WHOLE_KEYS) else sizes


def planned(files: Mapping[str, Mapping[str, Any]], aside: Path) -> dict[str, Any]:
    """The plan of a recipe, whose files are written to the folder `aside`, which errors do not name."""
    for name, content in files.items():
        write_json(aside / name, content)
    try:
        return make_plan(str(aside / "bmcook.json"))
    except UserErrors as errors:
        known = [
            UserError(e.what.replace(f"{aside}/", ""), wanted=e.wanted, got=e.got, remedy=e.remedy)
            for e in errors.errors
        ]
        raise UserErrors("the recipe of these options cannot be used", known) from None


def check_output(output: str, model: Path) -> None:
    """Refuses an output folder that is a file, lies in one, or is the model's own folder."""
    path, remedy = Path(output).resolve(), "name another folder"
    file = next((each for each in (path, *path.parents) if each.exists() and not each.is_dir()), None)
    if file is not None:
        raise UserError(f"{output}: no folder can be made there", got=f"{file} is a file", remedy=remedy)
    if path == model.resolve():
        raise UserError(f"{output}: the folder of the model itself", wanted="a folder for the results", remedy=remedy)


def check_same(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses a folder whose recipe differs from the one to write: its checkpoints are of another job."""
    differences = []
    for name, content in files.items():
        if (folder / name).is_file():
            old, new = _flat(read_json(folder / name)), _flat(content)
            keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            differences += [f"{key}: {old.get(key)} there, {new.get(key)} by these options" for key in keys]
    if differences:
        more = f"; {len(differences) - SHOWN} more" * (len(differences) > SHOWN)
        raise _of_another_job(folder, "; ".join(differences[:SHOWN]) + more)


def _of_another_job(folder: Path, got: str) -> UserError:
    return UserError(
        f"{folder}: has the recipe of another job",
        got=got,
        remedy=f"give the options as before to resume, or another output folder, or remove {folder.parent}; "
        f"an edited recipe is run by `cook train --config {folder / 'bmcook.json'} --stage all`",
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """The values of nested objects by dotted name."""
    if not isinstance(value, Mapping):
        return {name: list(value) if isinstance(value, tuple) else value}
    return {key: each for k, v in value.items() for key, each in _flat(v, f"{name}.{k}" if name else str(k)).items()}


def _recipe_files(job: OneLineJob, source: ModelSource, sizes: Sequence[Keep]) -> dict[str, Any]:
    scheme, stages = scheme_of(job, sizes, source)
    wide = with_biases(source)
    can = len(sizes) == 1 and _can_compensate(wide, stages[0])
    if job.compensation == "on" and not can:
        raise UserError(
            "--compensation on: what removed heads and FFN dimensions add on average needs a bias to stay in",
            got="several sizes, which would need biases of their own"
            if len(sizes) > 1
            else f"--keep {' '.join(job.keep)} of this {source.adapter.family} model, which leaves none",
            remedy="leave the option out",
        )
    if can and job.compensation != "off":
        before, after = (each.adapter.space(each.config) for each in (source, wide))
        scheme, _ = scheme_of(job, [keep_of_wider(size, before, after) for size in sizes], wide)
        scheme["gates"] = scheme.get("gates", {}) | {"compensation": True}
    # A search is over before the first step, and the weights are frozen.
    mask_steps = 1 if scheme.get("gates", {}).get("start") == "search" else job.steps
    bmcook = base_recipe(job, source, job.steps) | {
        "distillation": _distillation(job, stages[0]),
        "logging": {"tensorboard": True},
        "pruning": {
            "is_pruning": True,
            "pruning_mask_path": None,
            "pruned_module": matrices(
                source, with_hidden=scheme.get("fine-grained", {}).get("target_hidden") is not None
            ),
            "mask_method": {"layer": "coarse-grained", "joint": "joint"}.get(stages[0].split("_")[0], "fine-grained"),
            "l0_pruning": "l0_pruning.json",
        },
        "stages": [
            {"name": stages[0], "training": {"steps": mask_steps, "train_weights": False}},
            *({"name": name, "training": {"steps": job.finetune_steps}} for name in stages[1:] if job.finetune_steps),
        ],
    }
    bmcook["training"] |= {"weight_decay": 0.0, "clip": 1.0, "precision": "auto"}
    return {"l0_pruning.json": scheme, "bmcook.json": bmcook}


def base_recipe(job: OneLineJob | MoefyJob, source: ModelSource, steps: int) -> dict[str, Any]:
    """What the `bmcook.json` of a one-line job says of the model, the data and the training."""
    return {
        "output_dir": str(Path(job.output) / "run"),
        "seed": job.seed,
        "model": {"type": "hf", "path": str(source.path)},
        "tokenizer": {"type": "hf", "path": str(source.path), "vocab_size": vocabulary_size(source.config)},
        "data": {
            "type": data_type(job.data),
            "paths": list(job.data),
            "text_field": job.text_field,
            "held_out": 0.03,
            "max_length": job.max_length,
        },
        "training": {
            "steps": steps,
            "train_batch_size": job.batch_size,
            "micro_batch_size": job.batch_size,
            "learning_rate": job.learning_rate,
            "warmup": 0.1,
            "log_every": 5,
            "save_every": 50,
            "keep_checkpoints": 1,
            "eval_rows": 16,
        },
        "deepspeed": {"zero_optimization": {"stage": 2}},
    }


def _can_compensate(source: ModelSource, stage: str) -> bool:
    """Whether a stage prunes units before output projections that have a bias."""
    space = source.adapter.space(source.config)
    groups = [group for kind in LEARNS[stage] if kind in ("heads", "dimff") for group in space.of(kind)]
    return bool(compensable(space, groups))


def _distillation(job: OneLineJob, stage: str) -> Mapping[str, Any] | None:
    if job.teacher == "none":
        return None
    return {"teacher": job.teacher, "stages": [stage], "ce_scale": 2.0, "ce_temp": 2.0}


def matrices(source: ModelSource, *, with_hidden: bool) -> list[str]:
    """The names of all prunable matrices inside a layer; with those on the residual stream if it is pruned too."""
    space = source.adapter.space(source.config)
    pieces = [(group.layer, piece.path) for group in space.groups for piece in group.slices]
    inside = {path.split(f".{layer}.", 1)[1] for layer, path in pieces if is_matrix(space, path)}
    stream = [piece.path for piece in space.hidden.slices] if with_hidden and space.hidden else []
    outside = {p for p in stream if is_matrix(space, p) and not p.endswith(tuple(f".{name}" for name in inside))}
    return sorted(inside | outside)


def data_type(paths: tuple[str, ...]) -> str:
    """The `data.type` of files and folders, by their endings.

    Raises:
        UserError: a path does not exist, or the formats differ.
    """
    found: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise UserError(f"--data {path}: there is no such file or folder", remedy="check the path")
        files = [file for file in sorted(path.rglob("*")) if file.is_file()] if path.is_dir() else [path]
        found += [DATA_TYPES.get(_ending(file), "text") for file in files if not file.name.startswith(".")]
    if not found:
        raise UserError(f"--data {', '.join(paths)}: there are no files", wanted="text, JSON lines or parquet")
    if len(set(found)) != 1:
        raise UserError(
            "--data: one format at a time", wanted="text, JSON lines or parquet", got=", ".join(sorted(set(found)))
        )
    return found[0]


def _ending(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    return suffixes[-2] if len(suffixes) > 1 and suffixes[-1] in COMPRESSED else suffixes[-1] if suffixes else ""
