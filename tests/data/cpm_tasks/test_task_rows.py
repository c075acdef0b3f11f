"""Task rows agree with the slow reference, and hold CPM-Ant's invariants for any records."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.data.cpm_tasks import batches
from cook.data.cpm_tasks.batches import build_batch, epoch_key
from tests.data.cpm_tasks import reference
from tests.models.cpm_ant_tiny import tiny_model

PROMPT = 4
MODEL_KEYS = {"input", "length", "context", "position", "segment", "span", "targets"}


@st.composite
def records(draw):
    """A record: of segments for the tasks of pretraining and of generation, or a question with options."""
    tokens = st.integers(10, 400)
    if draw(st.integers(0, 5)) == 0:
        lengths = draw(st.lists(st.integers(1, 6), min_size=2, max_size=4))
        right = draw(st.integers(0, len(lengths) - 1))
        segments = [(length, 2, 101 if n == right else 100) for n, length in enumerate(lengths)]
    else:
        kinds = st.tuples(st.integers(0, 12), st.integers(1, 3), st.sampled_from([0, 0, 1, 1, 2, 3, 4, 90]))
        segments = draw(st.lists(kinds, min_size=1, max_size=3))
    total = sum(segment[0] for segment in segments)
    body = draw(st.lists(tokens, min_size=total, max_size=total))
    return [draw(st.integers(0, 3)), len(segments), *(value for segment in segments for value in segment), *body]


@given(
    given_records=st.lists(records(), min_size=1, max_size=12),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
    data=st.data(),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_batches_are_those_of_the_reference(make_rows, given_records, seed, epoch, data):
    sizes = [reference.size_of(record, PROMPT) for record in given_records]
    max_length = max(sizes) + data.draw(st.integers(0, 30))
    rows, statistics = make_rows(given_records, max_length=max_length, prompt_length=PROMPT, seed=seed)
    packed = reference.pack(sizes, max_length)
    assert len(rows) == len(packed) == statistics["rows"] and statistics["samples"] == len(given_records)
    assert statistics["filled"] == pytest.approx(sum(sizes) / (len(packed) * max_length), rel=1e-12)  # one division
    indices = np.array(data.draw(st.lists(st.integers(0, len(packed) - 1), min_size=1, max_size=6)))
    options = {"max_length": max_length, "prompt_length": PROMPT}
    expected = reference.batch(given_records, [packed[i] for i in indices], seed=seed, epoch=epoch, **options)
    record_N, row_N = rows.records(indices)
    key = epoch_key(seed, epoch)
    arrays = build_batch(rows._data, record_N, row_N, num_rows=len(indices), key=key, **options)
    assert set(arrays) == set(expected)
    for name, values in expected.items():
        assert arrays[name].tolist() == values, name
    batch = rows.batch(indices, epoch)
    assert set(batch) == MODEL_KEYS
    for name, tensor in batch.items():
        assert tensor.tolist() == expected[name] and tensor.dtype == (torch.bool if name == "context" else torch.int64)
    questions = [sum(choice >= 0 and choice % 2 for choice in row) for row in expected["choices"]]
    told = [sum(target != -100 for target in row) for row in expected["targets"]]
    assert rows.num_targets(indices, epoch).tolist() == [a + b for a, b in zip(told, questions, strict=True)]


@given(given_records=st.lists(records(), min_size=1, max_size=20), epoch=st.integers(0, 3), slack=st.integers(0, 40))
@settings(max_examples=30, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_invariants(make_rows, given_records, epoch, slack):
    max_length = max(reference.size_of(record, PROMPT) for record in given_records) + slack
    rows, _ = make_rows(given_records, max_length=max_length, prompt_length=PROMPT)
    everything = np.arange(len(rows))
    batch = rows.batch(everything, epoch)
    real = torch.arange(max_length) < batch["length"][:, None]
    told = batch["targets"] != -100
    follows = torch.roll(batch["context"], -1, 1)
    follows[:, -1] = True
    # Targets only where the next token is hidden, is real and is of the same sample; they are that token.
    assert not (told & follows).any() and not (told & ~real).any()
    next_span, next_id = torch.roll(batch["span"], -1, 1), torch.roll(batch["input"], -1, 1)
    assert (batch["span"] == next_span)[told].all() and (batch["targets"] == next_id)[told].all()
    # Spans separate the samples of a row, which begin with a prompt; padding is of no span.
    assert ((batch["span"] >= 0) == real).all()
    starts = torch.diff(batch["span"], prepend=torch.full((len(rows), 1), -1)) > 0
    assert (batch["position"][starts] == 0).all() and (batch["segment"][starts] == 0).all()
    assert batch["context"][starts].all() and not told[:, : PROMPT - 1].any()
    # Every record is in exactly one row, whole and in order.
    record_N, row_N = rows.records(everything)
    assert sorted(record_N.tolist()) == list(range(len(given_records)))
    for row in range(len(rows)):
        text = batch["input"][row][real[row] & (batch["segment"][row] != 0)].tolist()
        ids = [id for n in record_N[row_N == row] for id in given_records[n][2 + 3 * given_records[n][1] :]]
        assert text == ids


PRETRAINING = [[task, 1, 40, task, task - 1, *range(100, 140)] for task in (1, 2) for _ in range(200)]


def test_draws_depend_on_the_epoch_and_the_seed_but_not_on_the_company(make_rows):
    rows, _ = make_rows(PRETRAINING, max_length=100, prompt_length=PROMPT)
    other, _ = make_rows(PRETRAINING, max_length=100, prompt_length=PROMPT, seed=1)
    whole = rows.batch(np.arange(len(rows)))
    alone = [rows.batch(np.array([index])) for index in range(len(rows))]
    for name in MODEL_KEYS:
        assert torch.equal(whole[name], torch.cat([batch[name] for batch in alone]))
    travelled = pickle.loads(pickle.dumps(rows))
    assert torch.equal(travelled.batch(np.arange(9), 2)["context"], rows.batch(np.arange(9), 2)["context"])
    assert len(travelled) == len(rows) and travelled.max_length == 100 and travelled.fingerprint == rows.fingerprint
    assert not torch.equal(whole["context"], rows.batch(np.arange(len(rows)), 1)["context"])
    assert not torch.equal(whole["context"], other.batch(np.arange(len(rows)))["context"])


def test_the_number_of_hidden_tokens_and_their_places_have_even_chances(make_rows):
    rows, _ = make_rows(PRETRAINING, max_length=44, prompt_length=PROMPT)
    masked, lm = [], []
    for epoch in range(20):
        context = rows.batch(np.arange(400), epoch)["context"][:, PROMPT:]
        assert context[:, 0].all(), "the first token is always context"
        masked.append(~context[:200, 1:])
        lm.append(~context[200:, 1:])
    masked_counts, lm_counts = torch.cat(masked).sum(1), torch.cat(lm).sum(1)
    # 4000 draws of a number from 1 to 39, mean 20, deviation 11.3: the mean is within 5 of its deviations (0.18).
    for counts in (masked_counts, lm_counts):
        assert counts.min() == 1 and counts.max() == 39 and abs(counts.float().mean() - 20) < 0.9
    share = torch.cat(masked).float().mean(0)  # 4000 draws a place, deviation below 0.008
    assert (share - 20 / 39).abs().max() < 0.04
    assert (torch.cat(lm).float().diff(dim=1) >= 0).all(), "what LM hides is the end"


def test_more_segments_than_one_sort_takes(make_rows, monkeypatch):
    rows, _ = make_rows(PRETRAINING, max_length=100, prompt_length=PROMPT)
    whole = rows.batch(np.arange(len(rows)))["context"]
    monkeypatch.setattr(batches, "_AT_ONCE", 7)
    assert torch.equal(rows.batch(np.arange(len(rows)))["context"], whole)


def test_a_record_that_is_too_long_for_a_row_is_named(make_rows):
    with pytest.raises(UserError) as caught:
        make_rows([PRETRAINING[0], [1, 1, 60, 1, 0, *range(60)]], max_length=50, prompt_length=PROMPT)
    text = str(caught.value)
    assert "1 of 2 records" in text and "x, block 0, offset" in text and "set data.max_length to 64" in text


def test_the_model_computes_every_sample_of_a_row_as_if_it_were_alone(make_rows):
    model = tiny_model()
    prompt = model.config.prompt_length
    some = [[task, 1, 20 + n, task, task - 1, *range(10, 30 + n)] for task in (1, 2) for n in range(5)]
    rows, _ = make_rows(some, max_length=3 * (24 + prompt), prompt_length=prompt)
    single, _ = make_rows(some, max_length=24 + prompt, prompt_length=prompt)
    assert len(rows) < len(single) == 10
    packed, alone = rows.batch(np.arange(len(rows))), single.batch(np.arange(10))
    assert torch.equal(packed["targets"][packed["targets"] != -100], alone["targets"][alone["targets"] != -100])
    with torch.no_grad():
        packed_logits = model(**packed).logits[packed["targets"] != -100]
        alone_logits = model(**alone).logits[alone["targets"] != -100]
    # fp32 sums of other lengths: relative differences of a few 1e-6.
    torch.testing.assert_close(packed_logits, alone_logits, rtol=1e-4, atol=1e-5)
