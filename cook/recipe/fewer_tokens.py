"""`cook prune --vocabulary`: a model without some of its tokens, from which a recipe starts."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from cook.base.errors import UserError
from cook.base.files import sha256
from cook.export.vocabulary import least_count, read_vocabulary, write_vocabulary
from cook.pruning.budgets import Keep
from cook.pruning.counts import forward_flops, parameters
from cook.pruning.family import ModelSource
from cook.recipe.reshape_run import ReshapeOptions, reshape_run

FEWER_TOKENS = "fewer_tokens"
"""The folder of the model, in the output folder."""
RECORD = "vocabulary.json"
"""Which tokens of which model were removed, beside the recipe."""


def record_of(vocabulary: str, source: ModelSource) -> dict[str, str]:
    """What decides which tokens of a model go.

    Raises:
        UserError: the file is not a vocabulary, or was written for another tokenizer.
    """
    record = {"model": str(source.path), "vocabulary": vocabulary}
    if least_count(vocabulary) is None:
        read_vocabulary(vocabulary, source.folder)
        record["sha256"] = sha256(vocabulary)
    return record


def of_the_rest(sizes: Sequence[Keep], whole: ModelSource, rest: ModelSource, length: int) -> list[dict[str, float]]:
    """What to keep of a model with fewer tokens, so that as much stays as `sizes` leave of the whole model.

    Args:
        sizes: What each size keeps of the whole model.
        whole: The model with all tokens.
        rest: The one with fewer.
        length: Tokens per row, for FLOPs.

    Raises:
        UserError: a size is reached with the tokens alone.
    """
    spaces = [source.adapter.space(source.config) for source in (whole, rest)]
    params = [parameters(space) for space in spaces]
    flops = [forward_flops(space, context=length) for space in spaces]
    ratios = {"params": params[0] / params[1], "flops": flops[0] / flops[1]}
    for keep in sizes:
        for key in ratios.keys() & keep.keys():
            if keep[key] * ratios[key] >= 1:
                raise UserError(
                    f"--keep {key}={keep[key]:g}: as much goes with the tokens alone",
                    wanted=f"less than {1 / ratios[key]:.3f}",
                    remedy="keep less; or remove tokens only, with `cook reshape --vocabulary`",
                )
    return [{key: share * ratios.get(key, 1) for key, share in keep.items()} for keep in sizes]


def write_rest(source: ModelSource, tokens: Sequence[int], folder: Path) -> None:
    """Writes the model with `tokens` alone, compared with the whole one before it is published."""
    with tempfile.TemporaryDirectory(prefix="cook-vocabulary-") as name:
        file = Path(name) / RECORD
        write_vocabulary(file, source.folder, tokens, min_count=1)
        options = ReshapeOptions(model=str(source.path), vocabulary=str(file), output=str(folder), verify=True)
        reshape_run(options)
