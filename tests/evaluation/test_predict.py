"""Outputs come back in the rows' order, whatever the batches."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cook.data.benchmarks.token_rows import TokenRows
from cook.evaluation.predict import predict

LENGTHS = (3, 1, 4, 1, 5, 2)
ROWS = TokenRows(
    [list(range(10 * n, 10 * n + length)) for n, length in enumerate(LENGTHS)],
    [[0] * n for n in LENGTHS],
    np.arange(len(LENGTHS)),
    pad_id=0,
)


def forward(input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor) -> SimpleNamespace:
    assert token_type_ids.shape == input_ids.shape and not torch.is_grad_enabled()
    return SimpleNamespace(
        total=(input_ids * attention_mask).sum(-1, keepdim=True).bfloat16().float(), first=input_ids[:, :1], unused=None
    )


@pytest.mark.parametrize("size", [1, 4, 100])
def test_every_row_once_and_in_order(size):
    found = predict(forward, ROWS, names=("total", "first"), batch_size=size, device=torch.device("cpu"))
    assert [float(first[0]) for _, first in found] == [10.0 * n for n in range(6)]
    sums = [sum(range(10 * n, 10 * n + length)) for n, length in enumerate(LENGTHS)]
    assert [float(total[0]) for total, _ in found] == pytest.approx(sums, rel=2**-8)
