"""The summed loss of a batch, against a loop over what it is to tell."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from cook.data.token_loss import count_targets, model_inputs, summed_cross_entropy


def batch_of():
    targets = torch.full((3, 12), -100)
    targets[0, 3], targets[2, 5], targets[2, 6] = 4, 0, 7
    choices = torch.full((3, 12), -1)
    # Row 0: a question of three options; row 1: two questions of two. `2 * question + right`.
    choices[0, 5], choices[0, 8], choices[0, 11] = 0, 1, 0
    choices[1, 2], choices[1, 4], choices[1, 6], choices[1, 9] = 1, 0, 2, 3
    return {"input": torch.zeros(3, 12), "targets": targets, "choices": choices, "choice_token": torch.full((3,), 5)}


QUESTIONS = [(0, [5, 8, 11], 1), (1, [2, 4], 0), (1, [6, 9], 1)]


def test_targets_and_questions_are_summed():
    torch.manual_seed(0)
    logits = (30 * torch.randn(3, 12, 9)).requires_grad_()
    batch = batch_of()
    expected = sum(F.cross_entropy(logits[b, i], batch["targets"][b, i]) for b, i in ((0, 3), (2, 5), (2, 6)))
    for row, positions, right in QUESTIONS:
        expected = expected + F.cross_entropy(logits[row, positions, 5], torch.tensor(right))
    loss = summed_cross_entropy(logits, batch)
    torch.testing.assert_close(loss, expected)
    assert count_targets(batch) == 3 + len(QUESTIONS)
    (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (found,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(found, wanted)
    assert set(model_inputs(batch)) == {"input"}


def test_without_questions_only_the_targets_count():
    logits = torch.randn(3, 12, 9)
    batch = {key: value for key, value in batch_of().items() if key == "targets"}
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), ignore_index=-100, reduction="sum")
    assert torch.equal(summed_cross_entropy(logits, batch), wanted) and count_targets(batch) == 3
    none = batch_of() | {"choices": torch.full((3, 12), -1)}
    torch.testing.assert_close(summed_cross_entropy(logits, none), wanted)
