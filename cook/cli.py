"""The `cook` command. Each command is a typed function: its docstring is its help."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import cook
from cook.base.environment import choose_waiting, quiet_torchao
from cook.base.errors import EXIT_FAILED, UserError, run_entry
from cook.base.signals import heed_launcher
from cook.commands.data import app as data_commands
from cook.commands.evaluation import compare, evaluate, profile
from cook.commands.families import app as family_commands
from cook.commands.options import AsJson, options_of
from cook.commands.quantize import quantize
from cook.commands.service import COMMANDS as SERVICE_COMMANDS
from cook.config.moefy import MoefyJob
from cook.config.tasks import OneLineJob, PlanOptions
from cook.config.types import STAGE_NAMES

app = typer.Typer(
    name="cook",
    help="Make large transformer language models small while they are still in pretraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
recipes = typer.Typer(no_args_is_help=True, help="List and copy the recipes that come with cook.")
checkpoint = typer.Typer(no_args_is_help=True, help="List and verify checkpoints.")
app.add_typer(recipes, name="recipes")
app.add_typer(data_commands, name="data")
app.add_typer(checkpoint, name="checkpoint")
app.add_typer(family_commands, name="families")
app.command("eval")(evaluate)
app.command()(compare)
app.command()(profile)
app.command()(quantize)
for service_command in SERVICE_COMMANDS:
    app.command()(service_command)

Config = Annotated[str, typer.Option("--config", help="What to do: the path of a `bmcook.json`.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, such as `training.steps=200`; may be repeated."),
]
DEFAULT_CONFIG = "config/bmcook.json"


def main(command: str | None = None) -> None:
    """The entry point of all commands: runs one and ends the process with the documented exit code.

    Args:
        command: The command that `sys.argv` has the options of; None: the first argument names it.
    """

    quiet_torchao()

    def run() -> int:
        # Only here: `run_entry` resolves `~` in the arguments.
        try:
            app([*([command] if command else []), *sys.argv[1:]], prog_name="cook")
        except SystemExit as end:  # every command ends with it, and `run_entry` has output to flush
            return int(end.code or 0)
        return 0

    run_entry(run)


def invoke(command: str, arguments: list[str] | None = None) -> None:
    """Runs a command in a program of your own, which has registered a model family perhaps.

    Args:
        command: Its name.
        arguments: Its options; None: those of `sys.argv`.

    Raises:
        UserError, RunFailed, Interrupted: for the caller, or for `cook.base.errors.run_entry`.
        SystemExit: mistaken options (2), or Ctrl-C (130).
    """
    try:
        app([command, *(sys.argv[1:] if arguments is None else arguments)], prog_name="cook")
    except SystemExit as end:
        # Only a failure ends the caller's program.
        if end.code:
            raise


def _choose_waiting() -> None:
    if (sentence := choose_waiting()) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(sentence, flush=True)


def _version(asked: bool) -> None:
    if asked:
        print(cook.__version__)
        raise typer.Exit()


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: Config = DEFAULT_CONFIG,
    set: Overrides = None,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"One of {', '.join(STAGE_NAMES)}, or `all`: every stage of the recipe. "
            "Default: the stage that the two files describe.",
        ),
    ] = None,
    resume: Annotated[
        str,
        typer.Option(metavar="auto|never|PATH", help="Resume from the newest valid checkpoint, never, or from PATH."),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, print the plan and stop.")] = False,
    local_rank: Annotated[int | None, typer.Option("--local_rank", "--local-rank", hidden=True)] = None,
) -> None:
    """Train one stage, or the whole recipe. Start it with `deepspeed` or `torchrun` for several processes."""
    heed_launcher()
    _choose_waiting()
    from cook.recipe.start import start

    if stage not in (None, "all", *STAGE_NAMES):
        raise UserError(f"--stage {stage}: there is no such stage", wanted=f"{', '.join(STAGE_NAMES)}, or all")
    start(config, set or [], stage=stage, resume=resume, dry_run=dry_run)


@app.command()
@options_of(PlanOptions)
def plan(
    settings: PlanOptions, config: Config = DEFAULT_CONFIG, set: Overrides = None, as_json: AsJson = False
) -> None:
    """Check a recipe and print what it would do and need, for any number of GPUs; nothing is written.

    No GPU is needed. Memory and communication follow from the model and the settings, times from the named card.
    """
    from cook.recipe.dry_run import show_plan
    from cook.recipe.start import make_plan

    facts = make_plan(config, set or [], options=settings)
    print(json.dumps(facts)) if as_json else show_plan(facts)


@app.command()
@options_of(OneLineJob)
def prune(
    model: Annotated[str, typer.Argument()],
    settings: OneLineJob,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write the recipe, print the plan and stop.")] = False,
) -> None:
    """Prune a model with one command: plan, learn masks, reshape, verify, report.

    Writes the two configuration files that it stands for, to be edited and run again with `cook train`. Stopped at any
    time, the same command resumes.
    """
    _choose_waiting()
    from cook.config.load import load_config
    from cook.recipe.dry_run import show_plan
    from cook.recipe.one_line import remarks, small_models, write_recipe
    from cook.recipe.run_report import report_run
    from cook.recipe.start import start

    path, facts = write_recipe(settings)
    config = str(path)
    show_plan(facts)
    if dry_run:
        return
    start(config, [], stage="all")
    for size, output in small_models(settings):
        reshape(config=config, size=size, output=output, verify=True)
    report_run(load_config(config), Path(settings.output) / "report", remarks(settings))


@app.command()
def reshape(
    config: Annotated[
        str | None,
        typer.Option(help="The run's `bmcook.json`. Default: `config/bmcook.json`, unless --model is given."),
    ] = None,
    set: Overrides = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model folder, a CPM-Live `.pt` file, or a training checkpoint of any ZeRO stage."),
    ] = None,
    model_config: Annotated[
        str | None, typer.Option(help="The model's JSON, where it does not lie beside the weights.")
    ] = None,
    coarse_mask: Annotated[str | None, typer.Option(help="Layer mask (`.pt`).")] = None,
    heads_mask: Annotated[str | None, typer.Option(help="Head mask (`.pt`).")] = None,
    dimff_mask: Annotated[str | None, typer.Option(help="FFN mask (`.pt`).")] = None,
    head_dims_mask: Annotated[str | None, typer.Option(help="Mask of the head dims (`.pt`).")] = None,
    experts_mask: Annotated[str | None, typer.Option(help="Mask of the experts (`.pt`).")] = None,
    hidden_mask: Annotated[str | None, typer.Option(help="Mask of the hidden dims (`.pt`).")] = None,
    vocabulary: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|min_count=N",
            help="Tokens that stay: a file that `cook data vocabulary` wrote, or those that occur N times in the run's "
            "texts.",
        ),
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(help="Which of the run's nested sizes. Default: all of them, each in a folder of its own."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder to write. Default: `OUTPUT_DIR/pruned`, `OUTPUT_DIR/pruned/SIZE`.")
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform", help="Pad all blocks with zero units to the size of the largest, so that a stock class fits."
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the masked and the reshaped model before publishing the result.")
    ] = False,
    time: Annotated[bool, typer.Option("--time", help="Measure the speed of both models, some seconds each.")] = False,
) -> None:
    """Write the small dense model that computes exactly what the masked one did."""
    from cook.recipe.plan import MaskPaths
    from cook.recipe.reshape_run import ReshapeOptions, reshape_run

    reshape_run(
        ReshapeOptions(
            config=config,
            overrides=set or [],
            model=model,
            model_config=model_config,
            masks=MaskPaths(
                layer=coarse_mask,
                heads=heads_mask,
                dimff=dimff_mask,
                experts=experts_mask,
                head_dims=head_dims_mask,
                hidden=hidden_mask,
            ),
            vocabulary=vocabulary,
            size=size,
            output=output,
            uniform=uniform,
            verify=verify,
            time=time,
        )
    )


@app.command()
@options_of(MoefyJob)
def moefy(
    model: Annotated[str, typer.Argument()],
    output: Annotated[str, typer.Argument(metavar="OUT")],
    settings: MoefyJob,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Turn a model's FFN blocks into mixtures of experts: a token then uses a part of their dims.

    Needs no training; with --steps, routers and weights are trained. Writes the configuration that it stands for, to be
    edited and run again with `cook train`. Stopped at any time, the same command resumes.
    """
    _choose_waiting()
    from cook.recipe.dry_run import show_plan
    from cook.recipe.moefy_job import moefy_table, write_moefy_recipe
    from cook.recipe.start import start

    path, facts = write_moefy_recipe(settings)
    show_plan(facts)
    if dry_run:
        return
    start(str(path), [], stage="all")
    reshape(config=str(path), output=str(Path(output) / "model"), verify=True)
    print(moefy_table(settings))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def tasks(context: typer.Context) -> None:
    """Fine-tune, prune or export an encoder on a GLUE task or SQuAD: `cook tasks pretrain|prune|export`."""
    heed_launcher()
    _choose_waiting()
    from cook.config.tasks import parse_task_options
    from cook.recipe.start import start_task

    start_task(parse_task_options(context.args))


@app.command()
def report(
    config: Config = DEFAULT_CONFIG,
    set: Overrides = None,
    output: Annotated[
        str | None, typer.Option(help="Folder for report.md and its figures. Default: `OUTPUT_DIR/report`.")
    ] = None,
) -> None:
    """Write the report of a run: its table, figures and report.md."""
    from cook.config.load import load_config
    from cook.recipe.run_report import report_run

    settings = load_config(config, set or [])
    report_run(settings, Path(output or f"{settings.output_dir}/report"))


Checkpoints = Annotated[
    Path, typer.Argument(metavar="DIR", help="A checkpoint, a stage's checkpoints, or a run's output folder.")
]


@checkpoint.command("ls")
def list_checkpoints(folder: Checkpoints, as_json: AsJson = False) -> None:
    """List checkpoints: their step, tokens, ranks, layout and size, and whether all files are there."""
    from cook.training.manifest import checkpoints, describe, table

    found = [describe(path) for path in checkpoints(folder)]
    print(json.dumps(found) if as_json else table(found))


@checkpoint.command("verify")
def verify_checkpoints(folder: Checkpoints) -> None:
    """Compare every file of the checkpoints with its checksum; the exit code is 1 if one is not what was saved."""
    from cook.training.manifest import checkpoints, verified

    whole = True
    for path in checkpoints(folder):
        is_whole, sentence = verified(path)
        whole = whole and is_whole
        print(sentence)
    if not whole:
        raise typer.Exit(EXIT_FAILED)


@recipes.command("list")
def list_recipes(as_json: AsJson = False) -> None:
    """List the recipes that come with cook."""
    found = {name: _title(folder) for name, folder in _recipes().items()}
    if as_json:
        print(json.dumps(found))
        return
    for name, title in found.items():
        print(f"{name:24} {title}")


@recipes.command("copy")
def copy_recipe(
    name: Annotated[str, typer.Argument(help="A name that `cook recipes list` prints.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Copy a recipe to a new folder, with its paths made to fit."""
    known = _recipes()
    if name not in known:
        raise UserError(f"there is no recipe {name!r}", wanted=", ".join(known))
    if folder.exists():
        raise UserError(f"{folder}: exists", remedy="name a new folder")
    source = known[name]
    folder.mkdir(parents=True)
    for file in sorted(source.glob("*")):
        if file.is_file() and file.suffix in (".json", ".md"):
            shutil.copyfile(file, folder / file.name)
    bmcook = json.loads((folder / "bmcook.json").read_text())
    if isinstance(bmcook.get("deepspeed"), str):
        engine = next(path for path in (source, *source.parents) if (path / Path(bmcook["deepspeed"]).name).is_file())
        shutil.copyfile(engine / Path(bmcook["deepspeed"]).name, folder / Path(bmcook["deepspeed"]).name)
        bmcook["deepspeed"] = str(folder / Path(bmcook["deepspeed"]).name)
    text = json.dumps(bmcook, indent=2)
    old, new = bmcook["output_dir"], f"results/{folder.name}"
    (folder / "bmcook.json").write_text(text.replace(old, new) + "\n")
    scheme = folder / "l0_pruning.json"
    scheme.write_text(scheme.read_text().replace(old, new))
    print(f"{folder / 'bmcook.json'}: edit it, then run `cook plan --config {folder / 'bmcook.json'}`")


def _recipes() -> dict[str, Path]:
    """Folders of recipes by name: those of the installed package, or of the checkout."""
    here = Path(cook.__file__).parent
    root = here / "recipes" if (here / "recipes" / "bmcook.json").is_file() else here.parent / "config"
    found = {"default": root}
    return found | {
        file.parent.relative_to(root).as_posix(): file.parent
        for file in sorted(root.rglob("bmcook.json"))
        if file.parent != root
    }


def _title(folder: Path) -> str:
    if folder == _recipes()["default"]:
        return "A small CPM-Ant on the standard library of Python, from fresh weights: needs no data"
    for page in (folder / "README.md", folder.parent / "README.md"):
        if page.is_file():
            return page.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    model: dict[str, Any] = json.loads((folder / "bmcook.json").read_text())["model"]
    return f"{model['type']} from fresh weights" if not model.get("path") else f"{model['path']}"
