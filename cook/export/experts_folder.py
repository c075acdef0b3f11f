"""Model folders of models with experts: of a stock class if one holds the model exactly, else with modeling files."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

from cook.base.errors import UserError
from cook.base.tensor_files import open_safetensors_folder, read_model_config
from cook.export.check import account, auto_class, loading_report
from cook.export.model_folder import write_model_folder
from cook.export.pruned_folder import Pruned
from cook.families.stock_experts import stock_config_of, stock_tensors
from cook.pruning.family import ModelSource
from cook.pruning.units import PruningSpace


def write_experts(source: ModelSource, space: PruningSpace, folder: Path) -> Pruned:
    """Writes a model with experts, tensor by tensor, and checks that transformers loads every weight.

    Args:
        source: The model.
        space: The model's space.
        folder: A new folder.

    Raises:
        UserError: a weight has no place in the result.
    """
    found = account(source, space)
    stock = stock_config_of(source.config)
    files = source.stored or source.tensors
    tensors = source.tensors.items() if stock is None else stock_tensors(source.config, source.tensors)
    carried = ((name, files[name]) for name in found.carried)
    config = dict(source.config) if stock is None else stock
    write_model_folder(folder, source.adapter, config, chain(tensors, carried))
    written = read_model_config(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in open_safetensors_folder(folder).items()}
    report = loading_report(written, shapes)
    problems = [str(name) for names in (report or {}).values() for name in names if name not in found.carried]
    if problems:
        what = f"{source.path}: transformers would not load the model with experts"
        raise UserError(what, wanted="every weight in its place", got=", ".join(problems[:3]))
    return Pruned(
        folder=folder,
        config=config,
        auto_class=auto_class(written),
        needs_remote_code=source.adapter.modeling(config) is not None,
        live_obstacle="its FFN blocks are mixtures of experts" if source.adapter.live_format else "",
        account=found,
    )
