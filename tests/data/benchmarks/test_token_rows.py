"""Tokenised rows: padding, truncation, and an evaluation's order over ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

from cook.data.benchmarks.glue import GLUE_TASKS, GlueRow
from cook.data.benchmarks.token_rows import TokenRows, glue_rows, ordered_batches
from cook.data.loader import RowLoader
from cook.data.reports import LeftOut
from cook.data.token_loss import model_inputs
from tests.recipe.benchmarks.tiny_task import CONFIG, SPECIAL, WORDS


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> BertTokenizer:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join((*SPECIAL, *WORDS)) + "\n")
    return BertTokenizer(vocab=str(path))


def rows(*lengths: int) -> TokenRows:
    ids = [[100 * number + place for place in range(length)] for number, length in enumerate(lengths)]
    segments = [[0] * (length // 2) + [1] * (length - length // 2) for length in lengths]
    return TokenRows(ids, segments, np.arange(len(lengths)), pad_id=-1)


def test_a_batch_is_as_wide_as_its_longest_row():
    batch = rows(2, 5, 3).batch(np.array([2, 0]))
    assert batch["input_ids"].tolist() == [[200, 201, 202], [0, 1, -1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["token_type_ids"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert batch["targets"].tolist() == [2, 0] and batch["rows"].tolist() == [2, 0]


def test_the_loader_reads_them():
    loader = RowLoader(rows(1, 2, 3, 4), train_batch_size=2, seed=0)
    seen = torch.cat([loader.micro_batches(step, 0, 1, 1)[i]["targets"] for step in range(2) for i in range(2)])
    assert sorted(seen.tolist()) == [0, 1, 2, 3] and loader.num_targets(0) == 2


LENGTHS = (9, 2, 7, 3, 8, 2, 9, 3)


@pytest.mark.parametrize(("world", "micro"), [(1, 2), (1, 4), (2, 2)])
def test_a_share_is_cut_into_rows_of_like_length(world, micro):
    data = rows(*LENGTHS, *LENGTHS)
    plain = RowLoader(data, train_batch_size=8, seed=3)
    loader = RowLoader(data, train_batch_size=8, seed=3, lengths=data.lengths)
    for step, rank in ((step, rank) for step in range(3) for rank in range(world)):
        batches = loader.micro_batches(step, rank, world, micro)
        read = torch.cat([batch["targets"] for batch in batches]).tolist()
        own = plain.indices(step).reshape(world, -1)[rank].tolist()
        assert sorted(read) == sorted(own) and [len(batch["targets"]) for batch in batches] == [micro] * len(batches)
        assert data.lengths[read].tolist() == sorted(data.lengths[own].tolist())
        longest = data.lengths[read].reshape(-1, micro).max(1)
        assert [batch["input_ids"].shape[1] for batch in batches] == longest.tolist()


def test_padding_changes_no_gradient():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(**CONFIG)).eval()  # without dropout
    pick = np.random.default_rng(0)
    ids = [pick.integers(5, CONFIG["vocab_size"], length).tolist() for length in LENGTHS]
    data = TokenRows(ids, [[0] * len(row) for row in ids], np.arange(len(ids)) % 2, pad_id=0)

    def gradient(batches):
        model.zero_grad()
        for batch in batches:
            logits = model(**model_inputs(batch)).logits
            torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum").backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loader = RowLoader(data, train_batch_size=8, seed=0, lengths=data.lengths)
    short, wide = loader.micro_batches(0, 0, 1, 2), loader.micro_batches(0, 0, 1, 8)
    assert sum(batch["input_ids"].numel() for batch in short) < wide[0]["input_ids"].numel()
    one, other = gradient(short), gradient(wide)
    # fp32: sums in another order.
    assert float((one - other).abs().max()) < 1e-5 * float(one.abs().max())


def test_the_fingerprint_sees_every_part():
    one = TokenRows([[1, 2]], [[0, 1]], np.array([0]), pad_id=0).fingerprint
    others = [
        TokenRows([[1, 3]], [[0, 1]], np.array([0]), pad_id=0),
        TokenRows([[1, 2]], [[0, 0]], np.array([0]), pad_id=0),
        TokenRows([[1, 2]], [[0, 1]], np.array([1]), pad_id=0),
    ]
    assert one not in {other.fingerprint for other in others}
    assert TokenRows([[1, 2]], [[0, 1]], np.array([0]), pad_id=0).fingerprint == one


def test_pairs_and_scores(tokenizer):
    pair = GlueRow(first="good film", second="bad", target=2.5)
    made = glue_rows(GLUE_TASKS["STS-B"], [pair], tokenizer, 16, LeftOut())
    batch = made.batch(np.array([0]))
    assert batch["input_ids"].tolist() == [[2, 5, 7, 3, 6, 3]]
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1]]
    assert batch["targets"].tolist() == [2.5] and batch["targets"].dtype == torch.float32


def test_the_longer_text_of_a_pair_is_cut(tokenizer):
    long = GlueRow(first="good film the a", second="bad", target=0)
    left_out = LeftOut()
    made = glue_rows(GLUE_TASKS["RTE"], [long], tokenizer, 6, left_out)
    assert made.batch(np.array([0]))["input_ids"].tolist() == [[2, 5, 7, 3, 6, 3]]


def test_a_single_text_is_cut(tokenizer):
    left_out = LeftOut()
    texts = [GlueRow(first=text, second=None, target=1) for text in ("good film the", "good film")]
    made = glue_rows(GLUE_TASKS["CoLA"], texts, tokenizer, 4, left_out)
    assert left_out.record() == {"ends of rows longer than 4 tokens": {"count": 1, "named": []}}
    assert made.batch(np.array([0]))["input_ids"].tolist() == [[2, 5, 7, 3]]


@pytest.mark.parametrize(("count", "size", "world"), [(7, 2, 1), (7, 2, 3), (1, 4, 2), (8, 2, 2)])
def test_an_evaluation_reads_every_row_and_all_ranks_as_many_batches(count, size, world):
    data = rows(*np.random.default_rng(0).integers(1, 9, count).tolist())
    batches = [list(ordered_batches(data, size, rank, world)) for rank in range(world)]
    assert len({len(own) for own in batches}) == 1
    read = np.concatenate([indices for own in batches for indices in own])
    assert set(read.tolist()) == set(range(count))
    assert all(len(indices) <= size for own in batches for indices in own)
