from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cook.data.benchmarks.token_rows import TokenRows
from cook.evaluation.all_ranks import held_out_loss, predict
from tests.models.cpm_ant_tiny import random_batch, tiny_model

CPU = torch.device("cpu")


def batches(count, rows=3, seed=0):
    model = tiny_model()
    random = torch.Generator().manual_seed(seed)
    made = []
    for number in range(count):
        batch = random_batch(number, model.config, rows=rows)
        targets = torch.randint(0, 61, batch["input"].shape, generator=random)
        made.append(batch | {"targets": targets.masked_fill(torch.rand(targets.shape, generator=random) < 0.4, -100)})
    return model, made


def numpy_loss(model, made):
    total, tokens = 0.0, 0
    for batch in made:
        with torch.no_grad():
            logits = model(**{k: v for k, v in batch.items() if k != "targets"}).logits.numpy().astype(np.float64)
        targets = batch["targets"].numpy()
        for row, column in zip(*np.nonzero(targets != -100), strict=True):
            scores = logits[row, column]
            peak = scores.max()
            total += peak + np.log(np.exp(scores - peak).sum()) - scores[targets[row, column]]
            tokens += 1
    return total / tokens


def test_the_loss_is_the_mean_over_all_tokens():
    model, made = batches(3)
    assert held_out_loss(model, made, CPU) == pytest.approx(numpy_loss(model, made), rel=1e-6)


def test_batches_of_unequal_tokens_weigh_by_their_tokens():
    model, made = batches(2)
    made[1]["targets"][:, 3:] = -100
    loss = held_out_loss(model, made, CPU)
    assert loss == pytest.approx(numpy_loss(model, made), rel=1e-6)
    assert abs(loss - np.mean([numpy_loss(model, [b]) for b in made])) > 1e-4
    one = {key: torch.cat([b[key] for b in made]) for key in made[0]}
    assert loss == pytest.approx(held_out_loss(model, [one], CPU), rel=1e-6)


def test_it_leaves_batches_and_gradients_alone():
    model, made = batches(1)
    before = {key: value.clone() for key, value in made[0].items()}
    held_out_loss(model, made, CPU)
    assert all(torch.equal(made[0][key], value) for key, value in before.items())
    assert all(p.grad is None for p in model.parameters())


def test_half_precision_logits_are_summed_in_full():
    logits = torch.randn(1, 4, 9).bfloat16()
    batch = {"targets": torch.tensor([[1, 2, 3, -100]])}
    loss = held_out_loss(lambda: SimpleNamespace(logits=logits), [batch], CPU)
    wanted = -torch.log_softmax(logits.double(), -1)[0, torch.arange(3), torch.tensor([1, 2, 3])].mean()
    assert loss == pytest.approx(float(wanted), rel=1e-6)


def test_no_tokens_is_our_mistake():
    model, made = batches(1)
    made[0]["targets"][:] = -100
    with pytest.raises(AssertionError, match="no held-out tokens"):
        held_out_loss(model, made, CPU)


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
