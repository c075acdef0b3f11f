"""How much of a reshaped model's saved arithmetic turns into speed: speed-up / FLOP reduction, forward passes.

    python scripts/bench/reshaped_speed.py [--dim-model 1024] [--rows 4] [--length 256]

The shape is the published 1B → 300M cut (16 → 4 heads of 128, dim_ff 700 → 350 in every block) on fewer layers and,
where memory is short, a smaller dim_model; the small model is made by cook's own reshape.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import publish
from gated_step import batch_of

from cook.base.device import default_device
from cook.evaluation.equality import largest_difference
from cook.evaluation.speed import forward_seconds
from cook.export.pruned_folder import mask_model
from cook.families.registry import by_config
from cook.families.source import load_model
from cook.pruning.counts import forward_flops, parameters
from cook.pruning.family import ModelSource
from cook.pruning.random_masks import random_masks_like
from cook.pruning.reshape import kept_units, reshaped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim-model", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--vocab-size", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = dict(
        model_type="cook_cpm_ant",
        vocab_size=options.vocab_size,
        dim_model=options.dim_model,
        num_heads=16,
        num_layers=options.layers,
        dim_head=128,
        dim_ff=700,
        prompt_length=32,
    )
    adapter = by_config({})
    space = adapter.space(config)
    torch.manual_seed(0)
    weights = dict(adapter.build(config).state_dict())
    shape = {
        g.name: (torch.arange(g.size) < (4 if g.kind == "heads" else 350)).float()
        for g in space.groups
        if g.kind != "layer"
    }
    masks = random_masks_like(space, shape, torch.Generator().manual_seed(0))
    small_config = adapter.shrink(config, space, kept_units(space, masks)).config
    dense = load_model(ModelSource(adapter=adapter, config=config, tensors=weights, path=Path()))
    small = load_model(
        ModelSource(adapter=adapter, config=small_config, tensors=dict(reshaped(weights, space, masks)), path=Path())
    )
    device = default_device()
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        models = {"dense": dense.to(device, dtype), "small": small.to(device, dtype)}
        batch = batch_of(config, options.rows, options.length)
        seconds = forward_seconds(models, [batch], device, repeats=options.repeats)
        kept = {name: int(mask.sum()) for name, mask in masks.items()}
        flops = [forward_flops(space, k, context=options.length) for k in ({}, kept)]
        speed_up, reduction = seconds["dense"] / seconds["small"], flops[0] / flops[1]
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "parameters": f"{parameters(space) / 1e6:.1f}M -> {parameters(space, kept) / 1e6:.1f}M",
                "FLOP reduction": reduction,
                "speed-up": speed_up,
                "speed-up / reduction": speed_up / reduction,
            }
        )
    masked = dense.float().cpu()
    mask_model(masked, space, masks)
    difference = largest_difference(masked, small.float().cpu(), [batch_of(config, 2, 64)])
    publish("reshaped_speed", vars(options) | {"masked vs reshaped, relative": difference}, rows, options.output)


if __name__ == "__main__":
    main()
