from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.evaluation.scoring import Score, Span, Windowing, batches, predicts_blindly, score, spans

VOCAB = 11


def causal(input_ids, use_cache):
    """A model whose logits are a fixed function of the last two tokens and of how many came before."""
    assert not use_cache
    before = torch.nn.functional.pad(input_ids[:, :-1], (1, 0), value=VOCAB)
    place = torch.arange(input_ids.shape[1])[None]
    mixed = torch.stack([input_ids * 1.3 + before * 0.7 + place * 0.11 + v * (input_ids + 1) for v in range(VOCAB)], -1)
    return SimpleNamespace(logits=torch.sin(mixed.double()) * 3)


def log_probability(prefix, token):
    """Of one token after a prefix, in numpy, from a forward pass over the prefix alone."""
    scores = causal(torch.tensor([prefix]), False).logits[0, -1].numpy()
    return scores[token] - np.log(np.exp(scores).sum())


def naive(ids, window, stride, bos):
    """Token by token: which window predicts it, and from which prefix."""
    losses, front = [], [] if bos is None else [bos]
    size = window - len(front)
    for place, token in enumerate(ids):
        if stride is None:
            start = place // size * size
            if start + size > len(ids):
                continue
        else:
            # The first of the windows [k·stride, k·stride + size) that reaches this token.
            start = max(0, math.ceil((place + 1 - size) / stride)) * stride
        prefix = front + ids[start:place]
        if prefix:
            losses.append(-log_probability(prefix, token))
    return losses


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_every_token_as_a_naive_loop_has_it(data):
    ids = data.draw(st.lists(st.integers(0, VOCAB - 1), min_size=8, max_size=30))
    window = data.draw(st.integers(2, 8))
    bos = data.draw(st.sampled_from([None, 5]))
    stride = data.draw(st.none() | st.integers(1, window - (bos is not None)))
    windowing = Windowing(size=window, stride=stride, bos=bos)
    got = score(causal, torch.tensor(ids), windowing, batch_size=data.draw(st.integers(1, 3)))
    wanted = naive(ids, window, stride, bos)
    assert got.tokens == len(wanted)
    # float32 logits in the loss, a few hundred terms.
    assert got.loss == pytest.approx(np.mean(wanted), rel=1e-5)
    assert got.perplexity == math.exp(got.loss)


def test_strided_as_the_documentation_of_transformers_does_it():
    ids, window, stride = torch.arange(23) % VOCAB, 6, 4
    total, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + window, len(ids))
        targets = ids[begin:end].clone()
        targets[: -(end - before)] = -100
        logits = causal(ids[None, begin:end], False).logits[0, :-1]
        total += float(torch.nn.functional.cross_entropy(logits, targets[1:], ignore_index=-100, reduction="sum"))
        count, before = count + int((targets[1:] != -100).sum()), end
        if end == len(ids):
            break
    got = score(causal, ids, Windowing(size=window, stride=stride), batch_size=2)
    assert got.tokens == count == 22 and got.loss == pytest.approx(total / count, rel=1e-5)


def test_more_context_is_what_the_overlap_is_for():
    found = spans(20, Windowing(size=8, stride=2))
    assert found[0] == Span(start=0, stop=8, scored=1) and all(s.scored - s.start == 6 for s in found[1:])
    assert [s.start for s in spans(23, Windowing(size=5))] == [0, 5, 10, 15]
    assert len(spans(23, Windowing(size=5, limit=2))) == len(spans(23, Windowing(size=5, stride=1, limit=2))) == 2


@pytest.mark.parametrize(
    ("count", "windowing"),
    [
        (4, Windowing(size=5)),
        (0, Windowing(size=2)),
        (1, Windowing(size=5, stride=2)),
        (0, Windowing(size=5, stride=1)),
    ],
)
def test_a_text_that_is_too_short(count, windowing):
    with pytest.raises(UserError, match=f"the text has {count} tokens"):
        spans(count, windowing)
    assert spans(1, Windowing(size=5, stride=2, bos=0)) == [Span(start=0, stop=1, scored=0)]


def test_windows_of_other_lengths_are_not_put_together():
    found = spans(11, Windowing(size=4, stride=4))
    assert [[s.stop - s.start for s in part] for part in batches(found, 5)] == [[4, 4], [3]]
    assert [len(part) for part in batches(spans(20, Windowing(size=4)), 2)] == [2, 2, 1]


def test_a_perplexity_beyond_a_float():
    assert Score(loss=1e6, tokens=1, seen=1, seconds=1).perplexity == math.inf


class Quantized(torch.nn.Module):
    """Logits of embedded tokens, to which the last token of the row adds a share `leak` of its own."""

    def __init__(self, leak: float, quantization_config: object):
        super().__init__()
        self.leak, self.config = leak, SimpleNamespace(quantization_config=quantization_config)
        self.table = torch.nn.Embedding(50, 64)

    def forward(self, input_ids):
        seen = self.table(input_ids)
        return SimpleNamespace(logits=seen + self.leak * seen[:, -1:])


@pytest.mark.parametrize(("leak", "plain", "quantized"), [(0.0, True, True), (0.03, False, True), (1.0, False, False)])
def test_a_quantized_model_is_causal_up_to_the_rounding_of_its_inputs(leak, plain, quantized):
    torch.manual_seed(0)
    ids = torch.arange(16)
    assert predicts_blindly(Quantized(leak, None), ids) is plain
    assert predicts_blindly(Quantized(leak, {"quant_method": "torchao"}), ids) is quantized
