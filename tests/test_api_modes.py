"""What the Python API leaves as it was, and the calls that it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2LMHeadModel, RobertaConfig, RobertaForMaskedLM

import cook
from cook.base.errors import UserError
from tests.test_api import batches, gpt2, llama


def with_dropout() -> GPT2LMHeadModel:
    model = gpt2()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    return model


def test_dropout_is_off_while_masks_are_learned():
    masks = [cook.learn_masks(with_dropout().train(mode), batches(), {"dims": 0.5}, steps=8) for mode in (True, False)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[1])
    # A teacher of one's own predicts without dropout too.
    taught = [
        cook.learn_masks(llama(), batches(), {"dims": 0.5}, steps=8, teacher=with_dropout().train(mode))
        for mode in (True, False)
    ]
    assert all(torch.equal(taught[0][name], taught[1][name]) for name in taught[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda model: cook.learn_masks(model, batches(), {"dims": 0.5}, steps=2),
        lambda model: cook.search_blocks(model, batches(), 0.7),
        lambda model: cook.mean_inputs(model, batches()),
        lambda model: cook.verify(model, masks_of(model), cook.reshape(model, masks_of(model))),
    ],
    ids=["learn_masks", "search_blocks", "mean_inputs", "verify"],
)
def test_every_module_has_its_mode_again(call):
    model = with_dropout().train()
    model.transformer.h[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    call(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert len(set(before.values())) == 2


def masks_of(model: torch.nn.Module, count: int = 10) -> dict[str, torch.Tensor]:
    del model
    return {f"layers.{n}.dimff": (torch.arange(128) >= count).float() for n in range(3)}


def test_training_the_small_model_does_not_move_the_whole_one():
    model = llama()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    masks = {f"layers.{n}.dimff": (torch.arange(20) >= 5).float() for n in range(3)}
    small = cook.reshape(model, masks)
    optimizer = torch.optim.SGD(small.parameters(), lr=1.0)
    small(**batches()[0], labels=batches()[0]["input_ids"]).loss.backward()
    optimizer.step()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    tied = cook.reshape(gpt2(), masks_of(gpt2()))
    assert tied.lm_head.weight is tied.transformer.wte.weight


@pytest.mark.parametrize(
    "keep", [{"blocks": 0.25, "dims": 0.25, "heads": 0.25}, {"blocks": 0.7, "dims": 0.5}, {"blocks": 0.5}]
)
def test_a_plan_of_blocks_and_of_units_inside_of_them_is_near_the_model(keep):
    model = llama()
    plan = cook.plan(model, keep)
    small = cook.reshape(model, cook.learn_masks(model, batches(), keep, steps=8))
    before, after = (sum(p.numel() for p in each.parameters()) for each in (model, small))
    assert plan.parameters[0] == before and plan.active_parameters == plan.parameters
    # One of the six blocks is a tenth of the model.
    assert abs(after - plan.parameters[1]) < 0.1 * before
    assert 0 < plan.flops[1] < plan.flops[0]


@pytest.mark.parametrize("wrong", ["some/model", 3])
def test_a_teacher_that_is_no_model_is_refused(wrong):
    model: Any = llama()
    for call in (
        lambda: cook.learn_masks(model, batches(), {"dims": 0.5}, teacher=wrong),
        lambda: cook.learn_nested_masks(model, batches(), {"dims": [15, 10]}, teacher=wrong),
        lambda: cook.search_blocks(model, batches(), 0.7, teacher=wrong),
    ):
        with pytest.raises(UserError, match="teacher"):
            call()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_numbers_below_one_and_text_without_labels_are_refused():
    with pytest.raises(UserError, match="steps"):
        cook.learn_masks(llama(), batches(), {"dims": 0.5}, steps=0)
    with pytest.raises(UserError, match="round_to"):
        cook.plan(llama(), {"dims": 0.5}, round_to=0)
    unlabelled = [{**batch, "labels": torch.full_like(batch["input_ids"], -100)} for batch in batches()]
    with pytest.raises(UserError, match="none of their tokens has a label"):
        cook.mean_inputs(llama(), unlabelled)


def test_one_batch_per_step_is_enough():
    cook.learn_masks(llama(), (batch for batch in batches(4)), {"dims": 0.5}, steps=4)
    with pytest.raises(UserError, match="batches ran out"):
        cook.learn_masks(llama(), (batch for batch in batches(4)), {"dims": 0.5}, steps=5)


def test_verify_reads_any_batches_but_none():
    model = llama()
    masks = {"layers.0.dimff": (torch.arange(20) >= 5).float()}
    small = cook.reshape(model, masks)
    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)  # its length is unknown
    assert cook.verify(model, masks, small, stream) < 1e-5
    with pytest.raises(UserError, match="there are no batches"):
        cook.verify(model, masks, small, [])


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(batches())


# Calls that failed later, or computed something else


def test_gates_that_a_training_left_do_not_change_the_comparison():
    """The statistics of norms would be corrected twice."""
    model = llama()
    gates = cook.attach(model, {"hidden": 0.75}, steps=3)
    for batch in batches(3):
        gates.before_forward()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gates.after_backward()
    gates.hold()
    small = cook.reshape(model, gates.masks())
    assert cook.verify(model, gates.masks(), small) < 1e-5
    with torch.no_grad():
        # Held again after the comparison; fp32 sums in another order.
        torch.testing.assert_close(model(**batches()[0]).logits, small(**batches()[0]).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "keep, units", [(0.2, ["heads", "dims", "head_dims"]), (0.2, ["blocks", "heads", "dims"]), (0.2, ["hidden"])]
)
def test_a_budget_below_what_stays_is_refused_for_any_units(keep, units):
    model = llama()
    fewest = {g: keep for g in ("params", "flops")}
    for key, share in fewest.items():
        share = 0.001 if units == ["hidden"] or key == "flops" else share
        with pytest.raises(UserError, match="cannot be reached"):
            cook.plan(model, {key: share * 0.5}, units=units)


def test_encoders_other_batches_and_units_that_are_not_there_are_refused():
    encoder = BertForMaskedLM(
        BertConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=20)
    )
    with pytest.raises(UserError, match="does not predict the next token"):
        cook.learn_masks(encoder, batches(), {"dims": 0.5})
    with pytest.raises(UserError, match="does not predict the next token"):
        cook.mean_inputs(encoder, batches())
    wrong: Any
    for wrong in (
        [torch.ones(2, 3)],
        batches()[0],
        [{"input_ids": [[1, 2, 3]]}],
        [{"inputs_embeds": torch.ones(1, 2)}],
    ):
        with pytest.raises(UserError, match="a batch"):
            cook.learn_masks(llama(), wrong, {"dims": 0.5}, steps=2)
    cook.learn_masks(llama(), [{**batch, "use_cache": False} for batch in batches()], {"dims": 0.5}, steps=2)  # type: ignore[dict-item]
    with pytest.raises(UserError, match="learn_nested_masks"):
        cook.learn_masks(llama(), batches(), {"params": [0.8, 0.5]})  # type: ignore[dict-item]
    means = cook.mean_inputs(llama(), batches())
    with pytest.raises(UserError, match=r"means: layers\.0\.dimff"):
        cook.learn_masks(llama(), batches(), {"dims": 0.5}, means=means | {"layers.0.dimff": torch.ones(3)})
    empty = cook.reshape(llama(), {f"layers.{n}.{site}": torch.zeros(1) for n in range(3) for site in ("att", "ffn")})
    for keep in ({"dims": 0.5}, {"blocks": 0.5}, {"heads": 0.5}):
        with pytest.raises(UserError, match=r"none that can go|cannot be pruned"):
            cook.learn_masks(empty, batches(), keep)


def test_an_encoder_is_verified_within_its_positions():
    """RoBERTa's positions begin behind the id of its padding."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12}
    model = RobertaForMaskedLM(RobertaConfig(vocab_size=61, max_position_embeddings=64, pad_token_id=1, **sizes)).eval()
    masks = {"layers.0.dimff": (torch.arange(12) > 5).float()}
    assert cook.verify(model, masks, cook.reshape(model, masks)) < 1e-5
