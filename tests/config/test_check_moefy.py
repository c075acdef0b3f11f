"""The section MoEfication: its stage, its numbers, and all mistakes at once."""

from __future__ import annotations

import json

import pytest

from cook.config.types import for_stage, training_for

ALONE = ("stages=[]", "pruning.is_pruning=false", "MoEfication.is_moefy=true")


def recipe(*names, **training):
    return "stages=" + json.dumps([{"name": name, "training": training if name == "moefy" else {}} for name in names])


def test_the_section_alone_describes_the_stage(load):
    config = load(*ALONE, 'MoEfication.first_FFN_module=["ffn.ffn.w_in.w"]')
    assert config.stage == "moefy" and config.moefy.first_FFN_module == ("ffn.ffn.w_in.w",)
    assert load(*ALONE[:2]).stage == "pretrain"


def test_it_trains_as_long_as_the_section_says(load):
    last = recipe("pretrain", "layer_mask", "moefy")
    assert training_for(load(last, ALONE[2]), "moefy").steps == 10
    taught = load(last, ALONE[2], "MoEfication.steps=3")
    assert training_for(taught, "moefy").steps == 3 and training_for(taught, "layer_mask").steps == 10
    untrained = for_stage(load(last, ALONE[2], "MoEfication.steps=0"), "moefy").training
    assert (untrained.steps, untrained.train_weights) == (1, False)


def test_all_mistakes_are_reported_at_once_with_the_right_key(errors_of):
    messages = errors_of(
        recipe("moefy", "layer_mask"),
        "MoEfication.is_moefy=true",
        "MoEfication.expert=8",
        "MoEfication.active=0",
        "data.max_length=0",
    )
    said = "\n".join(messages)
    assert "did you mean 'experts'?" in said
    assert "'MoEfication.active'" in said and "above 0, at most 1" in said
    assert "'data.max_length'" in said
    [message] = errors_of("Moefication.is_moefy=true")
    assert "did you mean 'MoEfication'?" in message


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([recipe("moefy")], "MoEfication: missing"),
        ([recipe("moefy"), "MoEfication.is_moefy=false"], "MoEfication.is_moefy: false"),
        ([recipe("pretrain"), ALONE[2]], "MoEfication: no stage uses it"),
        (["stages=[]", ALONE[2]], "MoEfication: no stage uses it"),
        ([recipe("pretrain", "moefy", "layer_mask"), ALONE[2]], "stages: nothing but quantize can follow moefy"),
        ([recipe("moefy", steps=4), ALONE[2], "MoEfication.steps=5"], "MoEfication.steps: differs"),
        ([recipe("pretrain", "moefy"), ALONE[2], "MoEfication.masked_dims=route"], '"route" needs a mask of FFN dims'),
        ([*ALONE, "MoEfication.shared=8"], "MoEfication.shared: no experts are left"),
        ([*ALONE, "MoEfication.shared=4"], "MoEfication.active: the 4 shared of 8 experts leave"),
        ([*ALONE, "MoEfication.experts=49"], "more experts than an FFN block has dims"),
    ],
)
def test_what_does_not_fit_is_named(errors_of, overrides, said):
    [message] = errors_of(*overrides)
    assert said in message


def test_several_sizes_cannot_become_one_mixture(errors_of):
    sizes = [
        "joint.train_mask=true",
        "joint.scope=global",
        "joint.target_params=[0.8,0.5]",
        "pruning.mask_method=joint",
    ]
    [message] = errors_of(recipe("joint_mask", "moefy"), ALONE[2], *sizes)
    assert "moefy makes one model" in message


def test_the_random_baseline_may_follow(load):
    assert load(recipe("pretrain", "layer_mask", "moefy", "random_baseline"), ALONE[2]).stages[2].name == "moefy"
