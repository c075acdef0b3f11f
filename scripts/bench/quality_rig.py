"""The frozen model, the texts and the gates that `quality.py` measures with."""

from __future__ import annotations

import argparse
import csv
import sys
import time
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer

from cook.distill.teacher_loss import token_divergence
from cook.families.source import load_model, open_model
from cook.pruning.attach import AttachedGates
from cook.pruning.budgets import KINDS
from cook.pruning.units import PruningSpace, UnitGroup
from cook.text.hf import begins_texts

UNITS = {"dims": ("dimff",), "heads": ("heads",), "heads and dims": ("heads", "dimff"), "blocks": ("layer",)}


def text_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options of the model and its texts."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--calibration", required=True, help="FILE[:OFFSET]")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=FILE[:OFFSET]")
    parser.add_argument("--windows", type=int, nargs="+", default=[32, 8, 8], help="of each text that is scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--output")
    return parser


def with_texts(options: argparse.Namespace) -> argparse.Namespace:
    """The options of `text_parser` with `texts`: name, place and number of windows of each."""
    places = [entry.split("=", 1) for entry in options.text]
    counts = options.windows + options.windows[-1:] * len(places)
    options.texts = [(name, place, count) for (name, place), count in zip(places, counts, strict=False)]
    return options


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options to publish: without paths of this machine."""
    local = ("model", "work", "calibration", "text", "masks", "output", "two_ssp", "slicegpt")
    settings = {name: value for name, value in vars(options).items() if name not in local}
    return settings | {"texts": [[name, count] for name, _, count in options.texts]}


class Rig:
    """A model, its texts in windows, and gates on every unit."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.source = open_model(options.model)
        self.space: PruningSpace = self.source.adapter.space(self.source.config, "query_head")
        self.tokenizer = AutoTokenizer.from_pretrained(options.model)
        self.calibration = self._windows(options.calibration, None)
        self.texts = {name: self._windows(place, count) for name, place, count in options.texts}
        self.load(torch.bfloat16)

    def load(self, dtype: torch.dtype) -> None:
        """The model as it is on disk, its weights frozen, all gates open."""
        self.model = load_model(self.source, dtype).requires_grad_(False)
        self.attached = AttachedGates(self.model, self.space.groups, {})

    def _windows(self, place: str, count: int | None) -> torch.Tensor:
        """`[windows, length]`; `count` from the start, None for all that training may want.

        Each begins with the beginning-of-sequence token if the tokenizer begins texts with it.
        """
        front = [self.tokenizer.bos_token_id] if begins_texts(self.tokenizer) else []
        length = self.options.length - len(front)
        wanted = (count or 10**9) * length
        path, _, offset = place.partition(":")
        if path.endswith(".csv"):
            csv.field_size_limit(sys.maxsize)
            with open(path, encoding="utf-8", newline="") as file:
                rows = (row["text"] for row in csv.DictReader(file) if row["source"] == "imdb")
                text = "\n\n".join(row for _, row in zip(range(10 * (count or 1000)), rows, strict=False))
        else:
            with open(path, "rb") as file:
                file.seek(int(offset or 0))
                text = file.read(8 * wanted if count else 4_000_000).decode("utf-8", errors="replace")
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])[:wanted]
        windows = ids[: len(ids) // length * length].view(-1, length)
        return torch.cat([torch.tensor(front, dtype=ids.dtype).expand(len(windows), -1), windows], 1)

    def batch(self, step: int, seed: int) -> torch.Tensor:
        """The calibration batch of a step, counted from 0: every window once, then in another order."""
        rows, count = self.options.rows, len(self.calibration)
        epoch, place = divmod(step * rows, count // rows * rows)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        return self.calibration[order[place : place + rows]]

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        """`[tokens, vocabulary]`, of all but the last tokens."""
        return self.model(input_ids=ids).logits[:, :-1].flatten(0, 1)

    def loss(self, ids: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of the next token."""
        return F.cross_entropy(self.logits(ids).float(), ids[:, 1:].flatten())

    def taught_loss(
        self, ids: torch.Tensor, teacher: torch.Tensor, *, text: float, weight: float, temperature: float
    ) -> torch.Tensor:
        """`text` times the cross entropy, plus `weight` · T² · KL to the distribution of `teacher`, logits."""
        logits, targets = self.logits(ids), ids[:, 1:].flatten()
        taught = weight * token_divergence(logits, teacher, targets, temperature) / len(logits)
        return taught + text * F.cross_entropy(logits.float(), targets) if text else taught

    @torch.no_grad()
    def dense_logits(self, ids: torch.Tensor) -> torch.Tensor:
        """With all gates open."""
        self.attached.set({})
        return self.logits(ids)

    @torch.no_grad()
    def measure(self, masks: dict[str, torch.Tensor], names: tuple[str, ...] = ()) -> dict[str, float]:
        """The loss with these masks on every text, or on those of `names`, nats per token."""
        self.attached.set(masks)
        found = self.losses(names)
        self.attached.set({})
        return found

    def losses(self, names: tuple[str, ...] = ()) -> dict[str, float]:
        """The loss of the model as it is on every text, or on those of `names`, nats per token."""
        return {
            name: sum(float(self.loss(part)) * len(part) for part in windows.split(4)) / len(windows)
            for name, windows in self.texts.items()
            if name in (names or self.texts)
        }

    @staticmethod
    def say(text: str) -> None:
        """Progress: one line on a terminal, every 25th step elsewhere."""
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        elif " of " not in text or int(text.split(": ")[1].split(" of ")[0]) % 25 == 0:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def groups(self, unit: str, *, keys: bool = False) -> list[UnitGroup]:
        """The groups of a cell, in the order of gates; with `keys` the key-value heads of its query heads too."""
        kinds = UNITS[unit] + (("keys",) if keys and "heads" in UNITS[unit] else ())
        found = [group for group in self.space.groups if group.kind in kinds]
        return sorted(found, key=lambda group: KINDS.index(group.kind)) if keys else found
