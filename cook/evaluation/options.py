"""The command lines of `python -m cook.evaluation` and its `compare`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from cook.base.errors import UserError, UserErrors
from cook.evaluation.measure import Settings

LEAST = {
    "window": 2,
    "stride": 1,
    "max_windows": 1,
    "batch_size": 1,
    "prompts": 1,
    "prompt_tokens": 1,
    "new_tokens": 1,
    "repeats": 1,
}


def evaluate_parser() -> argparse.ArgumentParser:
    """One model, one JSON object."""
    parser = argparse.ArgumentParser(
        prog="python -m cook.evaluation",
        description="Loss, perplexity, speed, memory and size of a model as one JSON object.",
        epilog="python -m cook.evaluation compare --help: several models side by side.",
    )
    parser.add_argument("--model", required=True, help="Hugging Face model folder, with its tokenizer")
    parser.add_argument("--coarse-mask", help="layer mask (.pt) to apply")
    parser.add_argument("--heads-mask", help="head mask (.pt)")
    parser.add_argument("--dimff-mask", help="FFN mask (.pt)")
    return _with_settings(parser)


def compare_parser() -> argparse.ArgumentParser:
    """Several models."""
    parser = argparse.ArgumentParser(
        prog="python -m cook.evaluation compare",
        description="Compare several models on one text: a table, JSON and a figure. Ratios are to the first model.",
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="[NAME=]DIR[,coarse=FILE][,heads=FILE][,dimff=FILE]",
        help="a model folder, optionally with masks to apply",
    )
    parser.add_argument(
        "--output",
        default="results/comparison",
        metavar="DIR",
        help="folder for comparison.json and comparison.png (default: %(default)s)",
    )
    return _with_settings(parser)


def _with_settings(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    own = Settings()
    parser.add_argument("--data", required=True, nargs="+", help="UTF-8 text files to score")
    parser.add_argument("--window", type=int, default=own.window, help="tokens per window (default: %(default)s)")
    parser.add_argument(
        "--stride",
        type=int,
        help="tokens from the start of one window to the next; the overlap is context only "
        "(default: disjoint windows; the first token of each and an incomplete last window do not count)",
    )
    parser.add_argument("--bos", action="store_true", help="begin every window with the tokenizer's BOS (Gemma)")
    parser.add_argument("--max-windows", type=int, help="score at most this many windows")
    parser.add_argument(
        "--batch-size", type=int, default=own.batch_size, help="windows per pass (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="default: as stored; bfloat16 on a GPU",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="do not time prefill and decoding")
    parser.add_argument("--prompts", type=int, default=own.prompts, help="prompts per batch (default: %(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=own.prompt_tokens, help="default: %(default)s")
    parser.add_argument(
        "--new-tokens", type=int, default=own.new_tokens, help="new tokens per prompt (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=own.repeats, help="rounds of timing (default: %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run a folder's own modeling file")
    return parser


def settings_of(options: argparse.Namespace) -> Settings:
    """The settings of a parsed command line.

    Raises:
        UserErrors: all values that are out of range.
    """
    errors = [
        UserError(f"--{name.replace('_', '-')} is too small", wanted=f"at least {least}", got=value)
        for name, least in LEAST.items()
        if (value := getattr(options, name)) is not None and value < least
    ]
    longest = options.window - options.bos
    if options.stride is not None and options.stride > longest:
        what = "--stride would skip tokens between the windows"
        errors.append(UserError(what, wanted=f"at most {longest}", got=options.stride))
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        errors.append(UserError(f"--device {device} cannot be used", got=str(error).splitlines()[0]))
    if errors:
        raise UserErrors("the command line cannot be used", errors)
    names = Settings.__dataclass_fields__
    return Settings(**{k: v for k, v in vars(options).items() if k in names} | {"device": device})


def read_texts(paths: Sequence[str]) -> str:
    """The contents of text files, joined with line breaks.

    Raises:
        UserError: a file is missing or not UTF-8, or all are empty.
    """
    text = "\n".join(map(_read_text, paths))
    if not text.strip():
        raise UserError("the text files are empty", got=", ".join(paths))
    return text


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
