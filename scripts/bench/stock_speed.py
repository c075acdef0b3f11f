"""How much of the parameters that a stock model loses turns into speed: prefill and decoding against the dense model.

    python scripts/bench/stock_speed.py --model SMOLLM2_FOLDER [--shares 0.7 0.5] [--dtype bfloat16]

Every block keeps the same number of heads and of dims, drawn at random (speed does not ask which), so that the result
is a model of the stock class: whole key-value groups first, as near to the share as they come, the rest in dims. The
models take turns; prefill computes the logits of the last position only, as generation does, so that the embeddings,
which no pruning touches, cost next to nothing there; a decode step pays for them in full.
"""

from __future__ import annotations

import argparse

import torch
from common import publish

from cook.base.device import default_device
from cook.evaluation.equality import largest_difference
from cook.evaluation.speed import generation_speed
from cook.export.pruned_folder import mask_model, reshaped_source
from cook.families.source import load_model, open_model
from cook.pruning.counts import block_parameters, parameters
from cook.pruning.mask_set import Masks, kept_counts
from cook.pruning.units import PruningSpace

PREFILL_BAR = 0.85


def even_masks(space: PruningSpace, share: float, multiple: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Random masks that leave `share` of the blocks' parameters, the same sizes in every block."""
    wanted = share * block_parameters(space)
    kept = {g.name: max(1, round(share * g.size)) for g in space.of("heads")}
    size = min(g.size for g in space.of("dimff"))
    sizes = range(multiple, size + 1, multiple)
    dims = {n: block_parameters(space, kept | {g.name: n for g in space.of("dimff")}) for n in sizes}
    best = min(dims, key=lambda n: abs(dims[n] - wanted))
    kept |= {g.name: best for g in space.of("dimff")}
    masks = {}
    for group in space.groups:
        if group.name in kept:
            masks[group.name] = torch.zeros(group.size)
            masks[group.name][torch.randperm(group.size, generator=generator)[: kept[group.name]]] = 1.0
    return masks


def row_of(space: PruningSpace, masks: Masks, speeds: dict, name: str, share: float) -> dict:
    """One small model against the dense one."""
    kept = kept_counts(masks)
    blocks = block_parameters(space) / block_parameters(space, kept)
    whole = parameters(space) / parameters(space, kept)
    prefill = speeds["dense"].prefill / speeds[name].prefill
    decode = speeds["dense"].decode / speeds[name].decode
    return {
        "share of blocks": share,
        "parameters": f"{parameters(space) / 1e6:.1f}M -> {parameters(space, kept) / 1e6:.1f}M",
        "block reduction": blocks,
        "whole reduction": whole,
        "prefill speed-up": prefill,
        "prefill / block reduction": prefill / blocks,
        "bar": PREFILL_BAR,
        "decode speed-up": decode,
        "decode / whole reduction": decode / whole,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a stock model, such as SmolLM2-135M")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.7, 0.5], help="of the blocks' parameters to keep")
    parser.add_argument("--multiple", type=int, default=16, help="dims kept are a multiple of this")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = default_device()
    source = open_model(options.model)
    space = source.adapter.space(source.config)
    generator = torch.Generator().manual_seed(0)
    masks = {f"{share:.0%}": even_masks(space, share, options.multiple, generator) for share in options.shares}
    small = {name: reshaped_source(source, space, kept) for name, kept in masks.items()}
    stock = {name: source.adapter.modeling(one.config) is None for name, one in small.items()}
    ids = torch.randint(0, source.config["vocab_size"], (options.prompts, options.prompt_tokens), generator=generator)
    rows = []
    for dtype in options.dtype:
        models = {
            name: load_model(one, getattr(torch, dtype)).to(device) for name, one in {"dense": source, **small}.items()
        }
        prompts = dict.fromkeys(models, ids.to(device))
        speeds = generation_speed(models, prompts, new_tokens=options.new_tokens, repeats=options.repeats)
        rows += [
            {"dtype": dtype} | row_of(space, masks[name], speeds, name, share)
            for name, share in zip(masks, options.shares, strict=True)
        ]
        del models
    differences = {}
    for name, one in small.items():
        # In float32 a model of thirty layers, broken by its random masks, makes 1e-5 out of rounding.
        masked = load_model(source, torch.float64)
        mask_model(masked, space, masks[name])
        exact = load_model(one, torch.float64)
        differences[name] = largest_difference(masked, exact, [{"input_ids": ids[:1, :64]}])
    checked = {"masked vs reshaped in float64, relative": differences, "loads in stock transformers": stock}
    publish("stock_speed", vars(options) | checked, rows, options.output)


if __name__ == "__main__":
    main()
