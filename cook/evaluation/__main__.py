"""`python -m cook.evaluation --model DIR --data FILE`: loss, perplexity, speed and size as one JSON object."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from cook.base.errors import UserError, run_entry
from cook.base.tensor_files import read_model_config


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m cook.evaluation", description=__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face model folder, with its tokenizer")
    parser.add_argument("--data", required=True, nargs="+", help="UTF-8 text files to score")
    parser.add_argument("--window", type=int, default=512, help="tokens a window (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows a pass (default: %(default)s)")
    parser.add_argument("--max-windows", type=int, help="score only so many windows")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the folder's own modeling file run")
    return parser.parse_args()


def load(folder: str, trust_remote_code: bool):
    """Model and tokenizer of a folder; cook's own families need no remote code here.

    Raises:
        UserError: the folder holds no model or no tokenizer that can be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

    from cook.adapters.registry import ADAPTERS
    from cook.adapters.source import open_model

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder}: no model folder", wanted="config.json, safetensors and tokenizer files")
    try:
        # AutoTokenizer would ask about the modeling file, of which a tokenizer.json has no need.
        plain = (Path(folder) / "tokenizer.json").is_file()
        tokenizer = (
            PreTrainedTokenizerFast.from_pretrained(folder)
            if plain
            else AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        )
        model_type = read_model_config(Path(folder)).get("model_type")
        if isinstance(model_type, str) and any(model_type in adapter.model_types for adapter in ADAPTERS):
            source = open_model(folder)
            with torch.device("meta"):
                model = source.adapter.build(source.config)
            model.load_state_dict(dict(source.tensors), strict=True, assign=True)
            return model.eval(), tokenizer
        return (
            AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust_remote_code).eval(),
            tokenizer,
        )
    except (OSError, ValueError, RuntimeError) as error:  # the last: weights that do not fit the config
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: cannot be loaded", got=reason) from None


def windows(ids: torch.Tensor, size: int, batch_size: int, limit: int | None) -> Iterator[torch.Tensor]:
    """Consecutive windows of `size` tokens, `(batch, size)`; a rest shorter than a window is left out."""
    whole = ids[: len(ids) // size * size].view(-1, size)[:limit]
    yield from whole.split(batch_size)


@torch.no_grad()
def evaluate(model, tokenizer, text: str, *, window: int, batch_size: int, limit: int | None) -> dict[str, float]:
    """Scores `text`: every window alone, its first token not predicted."""
    device = next(model.parameters()).device
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if len(ids) < window:
        raise UserError(f"the text has {len(ids)} tokens, less than a window of {window}", remedy="set --window lower")
    total, predicted, seen, seconds = 0.0, 0, 0, 0.0
    for batch in windows(ids, window, batch_size, limit):
        batch = batch.to(device)
        start = time.perf_counter()
        logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten(), reduction="sum"
        )
        total += float(loss)
        seconds += time.perf_counter() - start
        predicted, seen = predicted + batch[:, 1:].numel(), seen + batch.numel()
    return {
        "loss": total / predicted,
        "perplexity": math.exp(total / predicted),
        "bits_per_byte": total / math.log(2) / (len(text.encode()) * seen / len(ids)),
        "tokens": predicted,
        "tokens_per_second": seen / seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def read_text(path: str) -> str:
    """A text file's content.

    Raises:
        UserError: it is missing, or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def main() -> None:
    """Parses, loads, scores, prints."""
    arguments = parse_arguments()
    for name, least in (("window", 2), ("batch_size", 1), ("max_windows", 1)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} is too small", wanted=f"at least {least}", got=value)
    text = "\n".join(map(read_text, arguments.data))
    model, tokenizer = load(arguments.model, arguments.trust_remote_code)
    if torch.cuda.is_available():
        model = model.cuda().to(torch.bfloat16)
    result = evaluate(
        model, tokenizer, text, window=arguments.window, batch_size=arguments.batch_size, limit=arguments.max_windows
    )
    json.dump({"model": arguments.model, **result}, sys.stdout)
    print()


if __name__ == "__main__":
    run_entry(main)
