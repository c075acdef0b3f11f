"""Layers and blocks removed by `cook.pruning.search`, against the layers of least influence (ShortGPT).

    python scripts/bench/block_search.py --model SMOLLM2_FOLDER --calibration valid.txt --text wikitext2=test.txt …

Texts are those of `quality.py`. A search minimises the cross entropy of `--rows` windows of `--row-length` tokens; with
`+teacher` plus 2 T² · KL to the whole model, T = 2. Hidden states up to the first block that two masks do not share are
computed once. For models of the Llama family, in fp32.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from common import publish
from quality_rig import Rig, settings_of, text_parser, with_texts

from cook.pruning.search import search_blocks

STORED = 400
"""Hidden states that are kept."""
TEMPERATURE = 2.0


class Stack:
    """A model's blocks in order, with the hidden states of one batch before each, by what is removed before it."""

    def __init__(self, model: Any, ids: torch.Tensor):
        self.model, self.ids, self.layers = model, ids, model.model.layers
        self.names = [f"layers.{n}.{site}" for n in range(len(self.layers)) for site in ("att", "ffn")]
        self.start = model.model.embed_tokens(ids)
        self.angles = model.model.rotary_emb(self.start, torch.arange(ids.shape[1])[None])
        self.states: OrderedDict[tuple[int, ...], torch.Tensor] = OrderedDict()

    def block(self, number: int, x: torch.Tensor) -> torch.Tensor:
        layer = self.layers[number // 2]
        if number % 2:
            return x + layer.mlp(layer.post_attention_layernorm(x))
        return x + layer.self_attn(layer.input_layernorm(x), position_embeddings=self.angles, attention_mask=None)[0]

    def logits(self, masks: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """`[tokens, vocabulary]` of all but the last tokens."""
        gone = [number for number, name in enumerate(self.names) if name in masks and not masks[name].all()]
        keys = [(number, *(g for g in gone if g < number)) for number in range(len(self.names) + 1)]
        begin = max((number for number, key in enumerate(keys) if key in self.states), default=0)
        x = self.states[keys[begin]] if begin else self.start
        for number in range(begin, len(self.names)):
            x = x if number in gone else self.block(number, x)
            self.states[keys[number + 1]] = x
            if len(self.states) > STORED:
                self.states.popitem(last=False)
        return self.model.lm_head(self.model.model.norm(x))[:, :-1].flatten(0, 1)

    def loss(self, masks: Mapping[str, torch.Tensor]) -> float:
        return float(F.cross_entropy(self.logits(masks), self.ids[:, 1:].flatten()))


@torch.no_grad()
def searched(rig: Rig, stack: Stack, unit: str, teacher: bool, share: float) -> tuple[dict[str, torch.Tensor], int]:
    """The masks of a search, and the number of its measurements."""
    targets, count = stack.ids[:, 1:].flatten(), 0
    dense = F.log_softmax(stack.logits({}) / TEMPERATURE, -1)

    def measure(masks: Mapping[str, torch.Tensor]) -> float:
        nonlocal count
        count += 1
        logits = stack.logits(masks)
        loss = F.cross_entropy(logits, targets)
        if teacher:
            own = F.log_softmax(logits / TEMPERATURE, -1)
            loss = loss + 2 * TEMPERATURE**2 * (dense.exp() * (dense - own)).sum(-1).mean()
        rig.say(f"{unit}: measurement {count}, objective {float(loss):.3f}")
        return float(loss)

    blocks = rig.groups("blocks")
    return search_blocks(measure, rig.space, blocks, share, unit=unit), count  # type: ignore[arg-type]


@torch.no_grad()
def least_influence(rig: Rig, stack: Stack, share: float) -> dict[str, torch.Tensor]:
    """Masks of the layers that change the residual stream least, on the same windows."""
    streams = [stack.start]
    for number in range(len(stack.names)):
        streams.append(stack.block(number, streams[-1]))
    streams = streams[::2]
    pairs = zip(streams[:-1], streams[1:], strict=True)
    influence = [float(1 - F.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]
    gone = sorted(range(len(influence)), key=influence.__getitem__)[: round(share * len(influence))]
    return {group.name: torch.tensor([float(group.layer not in gone)]) for group in rig.groups("blocks")}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    rig, rows = Rig(options), []
    rig.load(torch.float32)
    windows = torch.cat([rig.batch(step, options.seed) for step in range(8)])
    calibration = windows[: options.search_rows, : options.row_length]
    with torch.no_grad():
        stack = Stack(rig.model, calibration)
    for name in options.methods:
        started, count = time.perf_counter(), 0
        if name == "influence":
            masks = least_influence(rig, stack, options.share)
        else:
            unit, _, teacher = name.partition("+")
            masks, count = searched(rig, stack, unit, bool(teacher), options.share)
        seconds = round(time.perf_counter() - started)
        losses = {}
        for text, windows in rig.texts.items():
            with torch.no_grad():
                parts = [(Stack(rig.model, part).loss(masks), len(part)) for part in windows.split(4)]
            losses[text] = sum(loss * number for loss, number in parts) / len(windows)
            print(f"{name}, {text}: {losses[text]:.3f}", flush=True)
        rows.append(
            {
                "method": name,
                "measurements": count,
                "seconds": seconds,
                **{f"loss, {text}": loss for text, loss in losses.items()},
                f"perplexity, {next(iter(losses))}": math.exp(next(iter(losses.values()))),
                "removed": ", ".join(key.removeprefix("layers.") for key, mask in masks.items() if not mask.all()),
            }
        )
        publish("block_search", settings_of(options), rows, options.output)


def parse() -> argparse.Namespace:
    parser = text_parser(__doc__)
    parser.add_argument("--methods", nargs="+", default=["layer+teacher", "layer", "block", "influence"])
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--rows", dest="search_rows", type=int, default=4)
    parser.add_argument("--row-length", type=int, default=256)
    options = with_texts(parser.parse_args())
    options.length, options.rows = 512, 2  # of the windows that are scored, and of the batches of `quality.py`
    return options


if __name__ == "__main__":
    main()
