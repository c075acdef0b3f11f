"""Binary data through the loader: one block serves any number of ranks, a resumed run draws what the whole one drew."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cook.data.loader import RowLoader, held_out_batches
from cook.data.token_loss import count_targets

RECORDS = [
    [task, 1, 20 + n % 9, task, task - 1, *range(100 + 2 * n + task, 120 + 2 * n + task + n % 9)]
    for n in range(60)
    for task in (1, 2)
]
BATCH = 8


@pytest.fixture(scope="module")
def rows(make_rows):
    return make_rows(RECORDS, max_length=70, prompt_length=4)[0]


def epochs_of(rows, ranks, steps, first=0):
    loader = RowLoader(rows, train_batch_size=BATCH, seed=3, first=first)
    found = []
    for step in range(steps):
        shares = [loader.micro_batches(step, rank, ranks, 2) for rank in range(ranks)]
        found.append({key: torch.cat([batch[key] for share in shares for batch in share]) for key in shares[0][0]})
        assert loader.num_targets(step) == (found[-1]["targets"] != -100).sum()
    return found


def test_one_block_is_shared_out_among_four_ranks(rows):
    steps = 2 * len(rows) // BATCH
    alone = epochs_of(rows, 1, steps)
    for ranks in (2, 4):
        for mine, theirs in zip(epochs_of(rows, ranks, steps), alone, strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    first = torch.cat([batch["input"] for batch in alone])[: len(rows)]
    assert len(torch.unique(first, dim=0)) == len(rows), "each row once an epoch"


def test_every_epoch_hides_other_tokens_and_a_resumed_run_the_same(rows):
    steps = 3 * len(rows) // BATCH
    whole = epochs_of(rows, 1, steps)
    resumed = epochs_of(rows, 2, steps - 5, first=5 * BATCH)
    for mine, theirs in zip(resumed, whole[5:], strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)
    contexts = {}
    for batch in whole:
        for ids, context in zip(batch["input"], batch["context"], strict=True):
            contexts.setdefault(tuple(ids.tolist()), set()).add(tuple(context.tolist()))
    assert np.mean([len(seen) for seen in contexts.values()]) > 1.8, "drawn anew in each of the three epochs"


def test_evaluation_counts_every_question_once(make_rows):
    options = [[1, 2, 6, 2, 100, 6, 2, 101, *range(50, 62)] for _ in range(7)]
    rows, _ = make_rows(options, max_length=20, prompt_length=4, choice_token=5)
    ranks = [list(held_out_batches(rows, 2, 100, rank, 2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1])
    assert sum(int(count_targets(batch)) for batches in ranks for batch in batches) == 7
