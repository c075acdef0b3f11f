"""The GPU kernel in Triton's interpreter on the CPU, in a process of its own: the switch counts at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cook.sparsity.kernels import sparse_ways
from cook.sparsity.kernels.sparse_triton import has_triton

ROOT = Path(__file__).resolve().parents[3]
CODE = """
import torch, torch.nn.functional as F
from cook.sparsity.kernels import sparse_ways
from cook.sparsity.tiles import sparse_linear, tiles_of
from tests.sparsity.kernels.test_sparse_layers import tile_mask
for seed, (inputs, widths, rows, uneven, block) in enumerate(CASES):
    random = torch.Generator().manual_seed(seed)
    mask = tile_mask(seed, inputs, widths, uneven)
    if block:
        mask = (torch.rand(inputs // block, 3, generator=random) > 0.5)
        mask = mask.repeat_interleave(block, 0).repeat_interleave(block, 1)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 5e-2)):
        weight = (torch.randn(mask.shape[1], inputs, generator=random) * mask.T).to(dtype)
        bias = torch.randn(mask.shape[1], generator=random).to(dtype)
        layer = sparse_linear(weight, bias, tiles_of(mask, block=block))
        x = torch.randn(rows, inputs, generator=random).to(dtype)
        found = sparse_ways.by(sparse_ways._triton, layer.plan(), x.T.contiguous(), transposed=True).T
        wanted = F.linear(x.float(), weight.float(), bias.float())
        error = float((found.float() - wanted).abs().max() / wanted.abs().max())
        assert error < tolerance, (seed, dtype, error)
print("equal")
"""
CASES = [(40, [70, 12], 33, False, None), (24, [8, 8, 8], 5, True, None), (64, [16], 70, False, 8)]


@pytest.mark.skipif(not has_triton(), reason="Triton is not installed: pip install triton")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself is tested on the card")
@pytest.mark.slow
def test_the_kernel_is_the_dense_product_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    code = f"CASES = {CASES!r}\n{CODE}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no card")
def test_every_way_is_the_dense_product_on_a_card():
    from cook.sparsity.tiles import sparse_linear, tiles_of
    from tests.sparsity.kernels.test_sparse_layers import tile_mask

    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        mask = tile_mask(0, 256, [128, 128, 64], False)
        weight = (torch.randn(mask.shape[1], 256) * mask.T).to("cuda", dtype)
        bias = torch.randn(mask.shape[1], device="cuda", dtype=dtype)
        layer = sparse_linear(weight.cpu(), bias.cpu(), tiles_of(mask)).to("cuda")
        x = torch.randn(256, 300, device="cuda", dtype=dtype)
        wanted = weight.float() @ x.float() + bias.float()[:, None]
        for name, way in sparse_ways.ways(layer.plan(), x).items():
            found = sparse_ways.by(way, layer.plan(), x, transposed=True).float()
            assert float((found - wanted).abs().max() / wanted.abs().max()) < tolerance, name
