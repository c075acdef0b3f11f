"""Products of tiles on a GPU, in one kernel that gathers its inputs while it multiplies.

An export carries this file along. Without Triton it says so and does nothing; `TRITON_INTERPRET=1` runs it on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None


def has_triton() -> bool:
    """Whether the kernel can be had here."""
    return triton is not None


if triton is not None:

    @triton.jit
    def _kernel(
        x,
        weight,
        bias,
        inputs,
        tiles,
        out,
        rows_total,
        stride_x,
        stride_out,
        BLOCK_C: tl.constexpr,
        BLOCK_M: tl.constexpr,
        BLOCK_R: tl.constexpr,
        WIDEN: tl.constexpr,
    ):
        # A tile's line in `tiles`: first input, inputs, first output, outputs, first weight.
        line = tiles + 5 * tl.program_id(0)
        first_input, count_inputs = tl.load(line), tl.load(line + 1)
        first_output, count_outputs, first_weight = tl.load(line + 2), tl.load(line + 3), tl.load(line + 4)
        c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
        m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        in_c, in_m = c < count_outputs, m < rows_total
        sums = tl.zeros((BLOCK_C, BLOCK_M), dtype=tl.float32)
        for start in range(0, count_inputs, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            in_r = r < count_inputs
            lines = tl.load(inputs + first_input + r, mask=in_r, other=0).to(tl.int64)
            x_RM = tl.load(x + lines[:, None] * stride_x + m[None, :], mask=in_r[:, None] & in_m[None, :], other=0.0)
            w_CR = tl.load(
                weight + first_weight + c[:, None] * count_inputs + r[None, :],
                mask=in_c[:, None] & in_r[None, :],
                other=0.0,
            )
            if WIDEN:
                w_CR, x_RM = w_CR.to(tl.float32), x_RM.to(tl.float32)
            sums += tl.dot(w_CR, x_RM, input_precision="ieee")
        sums += tl.load(bias + first_output + c, mask=in_c, other=0.0).to(tl.float32)[:, None]
        place = out + (first_output + c[:, None]).to(tl.int64) * stride_out + m[None, :]
        tl.store(place, sums.to(out.dtype.element_ty), mask=in_c[:, None] & in_m[None, :])


def tile_products(
    x_KM: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    inputs: torch.Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    out: torch.Tensor,
) -> None:
    """Writes the products of all tiles, one after the other, into `out`, `[outputs of all tiles, M]`.

    Args:
        x_KM: Activations, each input's line contiguous.
        weight: Flat; tile after tile `[C, R]`.
        bias: Of the outputs in the tiles' order.
        inputs: That the tiles read, tile after tile.
        sizes: Inputs and outputs of every tile.
        out: Lines contiguous.
    """
    assert triton is not None, "no Triton here"
    assert x_KM.stride(1) == 1 and out.stride(1) == 1, "lines of activations must be contiguous"
    table, first = [], [0, 0, 0]
    for rows, columns in sizes:
        table.append([first[0], rows, first[1], columns, first[2]])
        first = [first[0] + rows, first[1] + columns, first[2] + rows * columns]
    tiles = torch.tensor(table, dtype=torch.int64, device=x_KM.device)
    rows_total = x_KM.shape[1]
    # The interpreter, which alone runs this on a CPU, has no products of bf16: it multiplies in fp32.
    block_c, block_m, block_r = 64, 64 if rows_total > 32 else 32, 32
    most = max(columns for _, columns in sizes)
    grid = (len(sizes), -(-most // block_c), -(-rows_total // block_m))
    _kernel[grid](
        x_KM,
        weight,
        bias,
        inputs,
        tiles,
        out,
        rows_total,
        x_KM.stride(0),
        out.stride(0),
        BLOCK_C=block_c,
        BLOCK_M=block_m,
        BLOCK_R=block_r,
        WIDEN=not x_KM.is_cuda,
    )
