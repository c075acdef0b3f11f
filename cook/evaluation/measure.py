"""What `cook eval` measures of a model, and what `cook compare` reports of several."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from cook.base.errors import UserError
from cook.base.files import write_json
from cook.evaluation.loading import Entry, Loaded, load
from cook.evaluation.scoring import Windowing, predicts_blindly, score
from cook.evaluation.settings import Settings, device_of, too_long_stride
from cook.evaluation.speed import PeakMemory, generation_speed
from cook.report.comparison import comparison_table, plot_comparison
from cook.text.hf import begins_texts

SCALES = ("_scale", "_zero_point", "_shape")
"""Ends of the names of what compressed-tensors stores beside its weights."""


def measure_loss(entry: Entry, text: str, settings: Settings) -> tuple[Loaded, dict[str, Any]]:
    """Loads a model and scores `text` with it.

    Raises:
        UserError: the model cannot be loaded, the text is too short, or the window is longer than the model's context.
    """
    device = device_of(settings)
    with PeakMemory(torch.device(device)) as memory:
        loaded = load(
            entry,
            trust_remote_code=settings.trust_remote_code,
            dtype=settings.dtype,
            device=device,
            weights=settings.weights,
        )
        windowing = _windowing(loaded, settings)
        ids = text_ids(loaded, text)
        if len(ids) > 1 and not predicts_blindly(loaded.model, ids):
            raise UserError(f"{entry.folder}: not a causal language model", got=type(loaded.model).__name__)
        got = score(loaded.model, ids, windowing, batch_size=settings.batch_size)
    record = {
        "model": entry.folder,
        **({"masks": entry.masks} if entry.masks else {}),
        "loss": _finite(got.loss),
        "perplexity": _finite(got.perplexity),
        # Per byte, because tokens of different tokenizers have different lengths.
        "bits_per_byte": _finite(got.loss / math.log(2) * len(ids) / len(text.encode())),
        "method": windowing.method,
        "bos": windowing.bos is not None,
        "tokens": got.tokens,
        "tokens_per_second": got.seen / got.seconds,
        "peak_memory_bytes": memory.bytes,
        "parameters": sum(p.numel() for name, p in loaded.model.named_parameters() if not name.endswith(SCALES)),
        "dtype": str(next(loaded.model.parameters()).dtype).removeprefix("torch."),
        "device": str(loaded.device),
        **({"weights": "disk"} if loaded.streamed else {}),
    }
    return loaded, record


def measure_speed(models: Sequence[Loaded], text: str, settings: Settings) -> list[dict[str, float]]:
    """Measures prefill and decode speed of each model, in turns, on prompts from the beginning of `text`.

    Raises:
        UserError: prompt and new tokens are longer than a model's context.
    """
    prompts, by_number = {}, {}
    wanted = settings.prompts * settings.prompt_tokens
    for number, loaded in enumerate(models):
        _check_positions(loaded, settings.prompt_tokens + settings.new_tokens, "--prompt-tokens")
        ids = text_ids(loaded, text)
        repeated = ids.repeat(math.ceil(wanted / len(ids)))[:wanted]
        prompts[str(number)] = repeated.view(settings.prompts, settings.prompt_tokens)
        by_number[str(number)] = loaded.model
    speeds = generation_speed(by_number, prompts, new_tokens=settings.new_tokens, repeats=settings.repeats)
    return [speed.as_record() for speed in speeds.values()]


def text_ids(loaded: Loaded, text: str) -> torch.Tensor:
    """The token ids of the whole text, `(count,)`, without special tokens."""
    # verbose=False: the text may be longer than the context, since it is cut into windows.
    ids = loaded.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    known, largest = _known_ids(loaded.model), max(ids, default=0)
    if known is not None and largest >= known:
        raise UserError(
            f"{loaded.entry.folder}: the tokenizer gives the id {largest}, but the model has {known} ids",
            remedy="evaluate with the tokenizer that the model was trained with, or enlarge the model's embedding "
            "(transformers: model.resize_token_embeddings)",
        )
    return torch.tensor(ids, dtype=torch.long, device=loaded.device)


def _known_ids(model: torch.nn.Module) -> int | None:
    """The number of rows of the token embedding."""
    find = getattr(model, "get_input_embeddings", None)
    weight = getattr(find() if find else None, "weight", None)
    return None if weight is None else len(weight)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON cannot store NaN or infinity


def _windowing(loaded: Loaded, settings: Settings) -> Windowing:
    bos = loaded.tokenizer.bos_token_id
    if settings.bos and bos is None:
        raise UserError(f"{loaded.entry.folder}: its tokenizer has no beginning-of-sequence token for --bos")
    if not (begins_texts(loaded.tokenizer) if settings.bos is None else settings.bos):
        bos = None
    if long := too_long_stride(settings, bos=bos is not None):
        raise long
    _check_positions(loaded, settings.window, "--window")
    return Windowing(size=settings.window, stride=settings.stride, bos=bos, limit=settings.max_windows)


def _check_positions(loaded: Loaded, wanted: int, option: str) -> None:
    limit = getattr(getattr(loaded.model, "config", None), "max_position_embeddings", None)
    if isinstance(limit, int) and wanted > limit:
        raise UserError(
            f"{loaded.entry.folder}: the model has only {limit} positions", got=wanted, remedy=f"set {option} lower"
        )


def read_texts(paths: Sequence[str]) -> str:
    """Text files' contents, a line break between them.

    Raises:
        UserError: one is missing, not UTF-8, or all are empty.
    """
    texts = []
    for path in paths:
        try:
            texts.append(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 at byte {error.start}", remedy="convert it to UTF-8") from None
        except IsADirectoryError:
            raise UserError(f"{path}: a folder", wanted="text files; the option may be repeated") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if not any(text.strip() for text in texts):
        raise UserError("there is nothing to score", got=", ".join(paths))
    return "\n".join(texts)


RATIOS = ("parameters", "prefill_tokens_per_second", "decode_tokens_per_second", "peak_memory_bytes")


def compare(entries: Sequence[Entry], text: str, settings: Settings, *, files: Sequence[str]) -> dict[str, Any]:
    """Measures several models, of which the first is the reference.

    With timing, all models are in memory together, so that they can take turns. Without timing, each model is freed
    before the next is loaded.

    Returns:
        `{"data": files, "settings", "same_tokens", "models": [record with the model's name and ratios to the first]}`.

    Raises:
        UserError: two models have the same name, or a model cannot be measured.
    """
    names = [entry.name for entry in entries]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"two models are called {twice[0]!r}", remedy="give each a name: NAME=DIR")
    records: list[dict[str, Any]] = []
    models: list[Loaded] = []
    first_ids, same_tokens = torch.empty(0), True
    for entry in entries:
        loaded, record = measure_loss(entry, text, settings)
        records.append({"name": entry.name} | record)
        ids = text_ids(loaded, text).cpu()
        first_ids = first_ids if len(records) > 1 else ids
        same_tokens = same_tokens and torch.equal(ids, first_ids)
        models += [loaded] if settings.speed else []
        del loaded
    if settings.speed and not any(loaded.streamed for loaded in models):
        for record, speed in zip(records, measure_speed(models, text, settings), strict=True):
            record.update(speed)
    for record in records:
        known = [key for key in RATIOS if record.get(key) and records[0].get(key)]
        record["ratio_to_first"] = {key: record[key] / records[0][key] for key in known}
    settled = dataclasses.asdict(settings)
    return {"data": list(files), "settings": settled, "same_tokens": same_tokens, "models": records}


def write_comparison(comparison: dict[str, Any], folder: Path) -> None:
    """Prints the table; writes `comparison.json` and `comparison.png` into `folder`."""
    records, same_tokens = comparison["models"], comparison["same_tokens"]
    settings, files = comparison["settings"], ", ".join(Path(file).name for file in comparison["data"])
    stride = f", stride {settings['stride']}" if settings["stride"] else ""
    title = f"{files}: {records[0]['method']}, {settings['window']} tokens{stride}"
    print(comparison_table(records, same_tokens=same_tokens))
    if not same_tokens:
        print("The models' tokenizers differ, so their losses and perplexities per token cannot be compared.")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "comparison.json", comparison)
    plot_comparison(records, folder / "comparison.png", same_tokens=same_tokens, title=title)
    print(f"written: {folder}/comparison.json, {folder}/comparison.png")
