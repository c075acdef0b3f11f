"""`cook quantize`: writes a model with weights in few bits, from a run's stage `quantize` or from any model folder."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from cook.base.errors import UserError
from cook.base.files import write_json
from cook.base.tensor_files import read_model_config
from cook.config.load import load_config
from cook.config.quantization import QuantizationConfig, SchemeName
from cook.evaluation.loading import Entry, Loaded, load_tokenizer
from cook.evaluation.measure import read_texts, text_ids
from cook.evaluation.scoring import Windowing, score
from cook.export.check import account, auto_class
from cook.export.companions import copy_companions
from cook.export.model_folder import published
from cook.export.pruned_folder import open_masks, reshaped_source
from cook.families.gguf_settings import PROGRAM
from cook.families.source import load_model, open_model
from cook.pruning.reshape import kept_units
from cook.quantization.folders import write_compressed_tensors, write_torchao_folder
from cook.quantization.gguf_file import write_gguf
from cook.quantization.model import QuantizedModel
from cook.quantization.prepare import check_requirements, loaded
from cook.quantization.schemes import chosen_modules, described, linear_modules, scheme_of, token_embedding
from cook.recipe.plan import Stage, plan_stage
from cook.recipe.sources import check_masks
from cook.recipe.summary import done_record, masks_after
from cook.report.tables import human_bytes, markdown_table

Format = Literal["transformers", "compressed-tensors", "gguf"]
"""`transformers`: torchao's tensors, which `from_pretrained` loads; `compressed-tensors`: for vLLM; `gguf`: for
llama.cpp."""
GGUF_FILE = "model.gguf"
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions:
    """The options of the command line."""

    model: str | None = None
    """A model folder or a CPM-Live `.pt` file; None: the stage `quantize` of the run."""
    output: str | None = None
    """The folder to write; None: `OUTPUT_DIR/quantized/FORMAT` of the run."""
    config: str | None = None
    """Path of the run's `bmcook.json`."""
    overrides: Sequence[str] = ()
    """Changes to the config, `KEY=VALUE`."""
    scheme: SchemeName | None = None
    """How to round a model that no run has trained; None: `int8`."""
    group_size: int | None = None
    """For `int4`."""
    modules: Sequence[str] = ()
    """Ends of the names of the modules to round; empty: all linear modules."""
    embeddings: bool = False
    """Whether the token embedding is rounded too."""
    format: Format = "transformers"
    data: Sequence[str] = ()
    """Text files to compare the losses on."""
    window: int = 512
    """Tokens per window of the text."""


def quantize_run(options: QuantizeOptions) -> None:
    """Rounds the weights, writes them, and prints the sizes and losses before and after.

    Raises:
        UserError: options do not fit together, a package is missing, or the model cannot be written in this format.
        RunFailed: a file cannot be written.
    """
    if options.format not in get_args(Format):
        raise UserError(f"--format {options.format}: there is no such format", wanted=", ".join(get_args(Format)))
    if options.window < 2:
        raise UserError("--window is out of range", wanted="at least 2", got=options.window)
    model, output = _of_run(options) if options.config else _of_folder(options)
    text = read_texts(options.data) if options.data else None
    if text is not None and not model.source.adapter.is_causal:
        raise UserError("--data: only a causal language model has a loss on text", got=model.source.adapter.family)
    if text is not None and model.scheme.inputs:
        check_requirements(model.scheme)
    source = model.source
    print(f"model  {source.path}\n{described(model.scheme.name, model.matrices)}")
    with published(output, source=source.path) as folder:
        notes = _write(model, folder, options.format)
        copy_companions(source.folder, folder)
        written = sum(file.stat().st_size for file in folder.glob("model*") if file.suffix != ".json")
        before = sum(tensor.numel() * tensor.element_size() for tensor in source.tensors.values())
        losses = _losses(model, text, options) if text is not None else None
    parameters = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    print("\n" + _table(model, before, written, parameters, losses) + "\n")
    if source.stored and (carried := account(source, source.adapter.space(source.config)).carried):
        notes.append(f"{len(carried)} tensors that the model does not use were left out, such as {carried[0]}")
    if source.adapter.live_format is not None:
        notes.append("no CPM-Live .pt was written: it holds floating point alone, and `cook reshape` writes one")
    for note in notes:
        print(f"note: {note}")
    print(f"written: {output}  ({_usage(model, output, options.format)})")


def _of_folder(options: QuantizeOptions) -> tuple[QuantizedModel, Path]:
    if not options.model or not options.output:
        raise UserError("cook quantize needs a model and a folder to write, or --config", wanted="MODEL OUT")
    group_size = QuantizationConfig.group_size if options.group_size is None else options.group_size
    if group_size < 8 or group_size % 8:
        raise UserError("--group-size: not usable", wanted="a multiple of 8", got=group_size)
    if options.group_size is not None and options.scheme != "int4":
        got = f"scheme {options.scheme or 'int8'}"
        raise UserError("--group-size: only int4 has groups", got=got, remedy="leave it out, or give --scheme int4")
    source, scheme = open_model(options.model), scheme_of(options.scheme or "int8", group_size)
    with torch.device("meta"):
        whole = source.adapter.build(source.config)
    aliases = source.adapter.aliases
    matrices = chosen_modules(whole, scheme, options.modules, aliases, embeddings=options.embeddings)
    others = _others(whole, matrices)
    return QuantizedModel(source=source, scheme=scheme, matrices=matrices, others=others), Path(options.output)


def _others(model: torch.nn.Module, chosen: Any) -> tuple[str, ...]:
    """Linear modules that are not rounded, tied ones included."""
    linear = {path for path, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    return tuple(sorted((linear | linear_modules(model).keys()) - chosen.keys()))


def _of_run(options: QuantizeOptions) -> tuple[QuantizedModel, Path]:
    """The model of a run's stage `quantize`, without the units that its masks remove."""
    given = {
        "--scheme": options.scheme,
        "--group-size": options.group_size,
        "--module": options.modules,
        "--embeddings": options.embeddings,
    }
    for name, value in given.items():
        if value:
            raise UserError(
                f"{name}: the run has been trained with its own section quantization", remedy="leave it out"
            )
    if options.model and options.output:
        raise UserError("cook quantize takes a model or --config, not both", got=options.model)
    assert options.config is not None
    config = load_config(options.config, list(options.overrides))
    stage = plan_stage(config, "quantize")
    if not stage.done.exists():
        remedy = f"train it: cook train --config {options.config} --stage quantize"
        raise UserError(f"{stage.done}: the stage quantize has not finished", remedy=remedy)
    check_masks(stage)
    output = options.output or options.model or f"{config.output_dir}/quantized/{options.format}"
    return run_model(stage), Path(output)


def run_model(stage: Stage) -> QuantizedModel:
    """The model of a finished stage `quantize`, rounded as in its training."""
    record = done_record(stage)["quantization"]
    scheme = scheme_of(record["scheme"], record["group_size"])
    whole = open_model(stage.folder / "model")
    space, masks = open_masks(whole, **masks_after(stage).by_option)
    source, renamed = whole, dict[str, str]()
    if masks:
        renamed = dict(whole.adapter.shrink(whole.config, space, kept_units(space, masks)).renamed)
        source = reshaped_source(whole, space, masks)
    with torch.device("meta"):
        built = source.adapter.build(source.config)
    tables = record.get("embeddings", [])  # older records have none
    names = {path: renamed.get(f"{path}.weight", f"{path}.weight") for path in (*record["modules"], *tables)}
    names = {path: name.removesuffix(".weight") for path, name in names.items()}
    known = linear_modules(built) | (token_embedding(built) if tables else {})
    matrices = {new: known[new] for new in names.values()}
    return QuantizedModel(
        source=source,
        scheme=scheme,
        matrices=matrices,
        others=_others(built, matrices),
        precision=PRECISIONS[record["precision"]],
    )


def _write(model: QuantizedModel, folder: Path, format: Format) -> list[str]:
    if format == "transformers":
        return write_torchao_folder(model, folder)
    if format == "compressed-tensors":
        return write_compressed_tensors(model, folder)
    write_json(folder / "config.json", model.source.config)
    return write_gguf(model, folder / GGUF_FILE, model.source.folder)


def _losses(model: QuantizedModel, text: str, options: QuantizeOptions) -> list[float]:
    """The loss of the model before and after, of which one is in memory at a time."""
    config, found = model.source.config, []
    tokenizer = load_tokenizer(model.source.folder, trust_remote_code=False)
    window = Windowing(size=min(options.window, config.get("max_position_embeddings") or options.window))
    entry = Entry(name=str(model.source.path), folder=str(model.source.path))
    for build in (partial(load_model, model.source, None), partial(loaded, model)):
        each = Loaded(entry=entry, model=build(), tokenizer=tokenizer)
        found.append(score(each.model, text_ids(each, text), window, batch_size=8).loss)
    return found


def _table(model: QuantizedModel, before: int, after: int, parameters: int, losses: Sequence[float] | None) -> str:
    rows = [
        [name, human_bytes(size), f"{8 * size / parameters:.2f}"] + ([f"{losses[number]:.4f}"] if losses else [])
        for number, (name, size) in enumerate((("before", before), (model.scheme.name, after)))
    ]
    return markdown_table(["", "weights", "bits per weight", *(["loss"] if losses else [])], rows)


def _usage(model: QuantizedModel, output: Path, format: Format) -> str:
    if format == "gguf":
        return f"for {PROGRAM}: {output / GGUF_FILE}"
    option = ", trust_remote_code=True" if model.source.adapter.modeling(model.source.config) else ""
    return f"{auto_class(read_model_config(output))}.from_pretrained(…{option})"
