from __future__ import annotations

import pytest

PAIR = '["[pre]a:[post]b"]'


@pytest.mark.parametrize(
    "settings, said",
    [
        ([], "ce_scale, mse_hidn_scale and mse_att_scale are all 0"),
        (["distillation.mse_hidn_scale=1"], "mse_hidn_scale and mse_hidn_module must be given together"),
        (["distillation.mse_att_scale=1"], "mse_att_scale and mse_att_module must be given together"),
        (["distillation.ce_scale=1", f"distillation.mse_hidn_module={PAIR}"], "must be given together"),
        (["distillation.ce_scale=1", f"distillation.mse_att_module={PAIR}"], "must be given together"),
        (["distillation.ce_scale=1", 'distillation.mse_hidn_module=["a:b"]'], "wrong value at"),
        (["distillation.ce_scale=1", "distillation.ce_temp=0"], "wrong value at"),
        (["distillation.ce_scale=1", "distillation.mse_hidn_proj=true"], "no hidden states are compared"),
        (["distillation.ce_scale=1", "distillation.teacher_device=disk"], "wrong value at"),
        (["distillation.ce_scale=1", 'distillation.stages=["pretrain"]'], "wrong value at"),
        (["distillation.ce_scale=1", 'distillation.stages=["ffn_mask"]'], "ffn_mask is not a stage of the recipe"),
    ],
)
def test_distillation(errors_of, bmcook, settings, said):
    bmcook["distillation"] = {"teacher": "results/tiny/dense"}
    [message] = errors_of(*settings)
    assert said in message


def test_all_mistakes_at_once(errors_of, bmcook):
    bmcook["distillation"] = {
        "teacher": "self",
        "teacher_device": "cpu",
        "stages": ["ffn_mask", "att_mask"],
        "mse_att_module": ["[pre]a:[pre]a"],
        "mse_hidn_proj": True,
    }
    said = (
        "are all 0",
        "mse_att_scale and",
        "no hidden states",
        "not a stage of the recipe",
        "no weights of its own",
        "stay fixed",
    )
    messages = errors_of()
    assert len(messages) == len(said) and all(words in m for words, m in zip(said, messages, strict=True))


FROZEN = {"train_weights": False}


@pytest.mark.parametrize(
    "stages, named, unfit",
    [
        ([("pretrain", {}), ("layer_mask", FROZEN), ("att_mask", FROZEN)], [], None),
        (
            [("pretrain", {}), ("layer_mask", FROZEN), ("layer_finetune", {}), ("att_mask", FROZEN)],
            ["layer_mask", "att_mask"],
            None,
        ),
        ([("pretrain", {}), ("layer_mask", FROZEN), ("layer_finetune", {})], [], "layer_finetune (it learns no mask)"),
        ([("layer_mask", FROZEN), ("att_mask", {})], [], "att_mask (it trains weights)"),
        ([("layer_mask", FROZEN), ("att_mask", {})], ["layer_mask"], None),
        ([], [], "layer_mask (it trains weights)"),
    ],
)
def test_a_model_teaches_itself_only_while_its_weights_stand_still(load, errors_of, bmcook, stages, named, unfit):
    bmcook["distillation"] = {"teacher": "self", "ce_scale": 1, "stages": named}
    bmcook["pruning"]["mask_method"] = "coarse-grained"
    bmcook["model"]["path"] = None
    bmcook["stages"] = [{"name": name, "training": training} for name, training in stages]
    if unfit is None:
        assert load().distillation.teacher == "self"
    else:
        [message] = errors_of()
        assert "the teacher would change with the student" in message and f"got:    {unfit}" in message


def test_frozen_weights_of_the_one_stage_that_is_described(load, bmcook):
    bmcook["distillation"], bmcook["stages"] = {"teacher": "self", "ce_scale": 1}, []
    bmcook["pruning"]["mask_method"] = "coarse-grained"
    assert load("training.train_weights=false").distillation.teacher == "self"
