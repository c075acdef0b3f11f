"""Peers that run from clones of their authors' repositories, on the model, texts and calibration of `quality.py`.

    git clone https://github.com/FabrizioSandri/2SSP
    git clone https://github.com/microsoft/TransformerCompression && pip install ml-collections
    python scripts/bench/quality_clones.py --two-ssp 2SSP --slicegpt TransformerCompression \
        --model SMOLLM2_FOLDER --calibration valid.txt --text wikitext2=test.txt …

| method | what goes |
|---|---|
| 2SSP (Sandri et al. 2025) | FFN dims by the norm of their activations, then whole attention blocks by perplexity |
| SliceGPT (Ashkboos et al. 2024) | directions of the residual stream with the least variance, after rotations |

Each removes the share `--removed` of the parameters of all blocks; SliceGPT's rotations of the residual count as
parameters. Both repositories are for older versions of transformers: what is adapted here is where their layers meet
the caller. For models of the Llama family, on a CPU, in fp32.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import publish
from quality_rig import Rig, settings_of, text_parser, with_texts
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

ROUNDED_TO = 8
"""SliceGPT rounds the hidden size down to multiples of this."""
PERPLEXITY_TOKENS = 2048
"""Of which 2SSP takes the perplexity."""


def two_ssp(rig: Rig, clone: Path, removed: float) -> None:
    """Prunes `rig.model` by `two_stage_2ssp`."""
    sys.path.insert(0, str(clone))
    from src import pruning, utilities

    def mask_with_pairs(model: Any, **masks: list[int]) -> None:
        # Layers of today unpack two values of attention; the replacement returns three.
        original(model, **masks)
        for number, masked in enumerate(masks["attnMask"]):
            if masked:
                attention = model.model.layers[number].self_attn
                attention.forward = partial(lambda forward, *a, **k: forward(*a, **k)[:2], attention.forward)

    original = utilities.maskModel
    utilities.maskModel = pruning.maskModel = mask_with_pairs
    utilities.evaluate_perplexity = partial(utilities.evaluate_perplexity, device="cpu")
    rows = [row[None] for row in calibration(rig)]
    samples = PERPLEXITY_TOKENS // rows[0].numel()
    assert pruning.two_stage_2ssp(rig.model, rows, removed, num_calibration_second_stage=samples) is rig.model


def slicegpt(rig: Rig, clone: Path, removed: float) -> None:
    """Rotates and slices `rig.model` by `rotate_and_slice`."""
    sys.path.insert(0, str(clone / "src"))
    from slicegpt import fuse_modules, replace_layers, rotate_and_slice
    from slicegpt.adapters.llama_adapter import LlamaModelAdapter
    from slicegpt.slicing_scheduler import ConstSlicingScheduler

    class Layer(LlamaDecoderLayer):
        """`CompressedLlamaDecoderLayer` for layers that return a tensor."""

        def forward(self, hidden_states: torch.Tensor, **named: Any) -> torch.Tensor:
            x = hidden_states
            y = self.self_attn(hidden_states=self.input_layernorm(x), **named)[0]
            x = y + (x if self.attn_shortcut_Q is None else x @ self.attn_shortcut_Q)
            y = self.mlp(self.post_attention_layernorm(x))
            return y + (x if self.mlp_shortcut_Q is None else x @ self.mlp_shortcut_Q)

    class Adapter(LlamaModelAdapter):
        compressed_layer_type = Layer

    rig.model.config.torch_dtype = torch.float32
    rig.model.config.use_cache = False
    adapter = Adapter(rig.model)
    replace_layers(adapter, verbose=False)
    fuse_modules(adapter)
    batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in calibration(rig)]
    size = sliced_size(rig.model, removed)
    rotate_and_slice(adapter, batches, ConstSlicingScheduler(size), final_orientation="random")


def sliced_size(model: Any, removed: float) -> int:
    """The largest hidden size with which layers have lost enough, two rotations of the residual per layer counted."""
    hidden = model.config.hidden_size
    weights = block_parameters(model) / model.config.num_hidden_layers
    return max(
        size
        for size in range(ROUNDED_TO, hidden + 1, ROUNDED_TO)
        if weights * size / hidden + 2 * size**2 <= weights * (1 - removed)
    )


def block_parameters(model: Any) -> int:
    """The number of parameters of all layers, rotations included."""
    return sum(p.numel() for p in model.model.layers.parameters())


def calibration(rig: Rig) -> torch.Tensor:
    """`[rows, length]`: the rows of all calibration steps."""
    return torch.cat([rig.batch(step, rig.options.seed) for step in range(rig.options.steps)])


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads or torch.get_num_threads())
    torch.manual_seed(options.seed)
    rig, rows = Rig(options), []
    for name, prune, clone in (("2SSP", two_ssp, options.two_ssp), ("SliceGPT", slicegpt, options.slicegpt)):
        if clone is None:
            continue
        rig.load(torch.float32)
        rig.attached.remove()
        whole, started = block_parameters(rig.model), time.perf_counter()
        with torch.no_grad():
            prune(rig, clone, options.removed)
            seconds, losses = time.perf_counter() - started, rig.losses()
        left = block_parameters(rig.model) / whole
        rows.append({"method": name, "of the blocks' parameters": left, "seconds": seconds, **losses})
        print(rows[-1], flush=True)
    publish("quality_clones", settings_of(options), rows, options.output)


def parse() -> argparse.Namespace:
    parser = text_parser(__doc__)
    parser.add_argument("--two-ssp", type=Path, metavar="CLONE")
    parser.add_argument("--slicegpt", type=Path, metavar="CLONE")
    parser.add_argument("--removed", type=float, default=0.303, help="of all blocks' parameters")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    return with_texts(parser.parse_args())


if __name__ == "__main__":
    main()
