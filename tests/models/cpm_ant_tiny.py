"""Small models and batches for the tests of this folder."""

from __future__ import annotations

from typing import Any

import torch

from cook.models.cpm_ant import CpmAntConfig, CpmAntForCausalLM

SIZES = dict(
    vocab_size=61,
    dim_model=24,
    dim_ff=20,
    num_layers=3,
    num_heads=4,
    dim_head=6,
    prompt_types=4,
    prompt_length=5,
    segment_types=4,
    position_bias_num_buckets=16,
    position_bias_max_distance=12,
)
RAGGED = dict(
    mask_modules=[[True, False], [False, True], [False, False]],
    layer_heads=[[], [1, 3], [0, 2, 3]],
    layer_dim_ff=[7, 1, 11],
)


def tiny_config(**changes: Any) -> CpmAntConfig:
    return CpmAntConfig(**{**SIZES, **changes})


def tiny_model(seed: int = 0, **changes: Any) -> CpmAntForCausalLM:
    torch.manual_seed(seed)
    model = CpmAntForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif "embedding" in name or "bias" in name:
                parameter.normal_()
    return model


def random_batch(seed: int, config: CpmAntConfig, rows: int = 3, length: int = 17) -> dict[str, torch.Tensor]:
    """A CPM-Live batch of random contexts, segments, spans and lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator)

    prompt = config.prompt_length
    ids = torch.cat([draw(config.prompt_types * prompt, rows, prompt), draw(20, rows, length - prompt)], 1)
    span = (draw(6, rows, length) == 0).cumsum(1) * (draw(2, rows, 1))
    return dict(
        input=ids,
        length=draw(length - prompt + 1, rows) + prompt,
        context=draw(2, rows, length).bool(),
        position=torch.arange(length).expand(rows, -1),
        segment=draw(config.segment_types, rows, length),
        span=span,
    )
