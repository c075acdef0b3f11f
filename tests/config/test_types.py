"""The helpers that turn one configuration into the configuration of a stage."""

from __future__ import annotations

import ast
import dataclasses
import inspect

import pytest

from cook.config import corpus, scheme, types
from cook.config.types import STAGE_NAMES, for_stage, method_of, training_for, two_of_four


@pytest.mark.parametrize(
    "settings, stage",
    [
        (["pruning.is_pruning=false"], "pretrain"),
        (["pruning.mask_method=coarse-grained"], "layer_mask"),
        (["pruning.mask_method=coarse-grained", "coarse-grained.train_mask=false"], "layer_finetune"),
        (["fine-grained.prune_mode=att", "fine-grained.train_mask=true"], "att_mask"),
        (["fine-grained.prune_mode=att"], "att_finetune"),
        (["fine-grained.train_mask=true"], "ffn_mask"),
        (["pruning.mask_method=joint", "joint.train_mask=true"], "joint_mask"),
        (["pruning.mask_method=joint", "joint.train_mask=false"], "joint_finetune"),
        ([], "ffn_finetune"),
    ],
)
def test_the_switches_describe_a_stage(load, settings, stage):
    assert load(*settings).stage == stage


@pytest.mark.parametrize("name", STAGE_NAMES)
def test_the_configuration_of_a_stage_names_it(load, name):
    config = for_stage(load("joint.train_mask=false"), name)
    assert config.stage == name and config.pruning.mask_method == "fine-grained"


@pytest.mark.parametrize(
    ("mask_method", "method", "pattern"),
    [("joint", "joint", None), ("pattern", "pattern", None), ("m4n2_2d", "pattern", "m4n2_2d")],
)
def test_the_method_is_decoded(load, mask_method, method, pattern):
    pruning = dataclasses.replace(load().pruning, mask_method=mask_method)
    assert (method_of(pruning), two_of_four(pruning)) == (method, pattern)
    assert method_of(dataclasses.replace(pruning, is_pruning=False)) is None


def test_overrides_of_a_stage(load):
    config = load("stages.layer_mask.training.warmup=1")
    assert training_for(config, "pretrain").steps == 20
    assert training_for(config, "layer_mask").warmup == 1.0 and training_for(config, "layer_mask").steps == 10
    assert training_for(config, "ffn_mask") == config.training
    assert for_stage(config, "pretrain").training.steps == 20 and config.training.steps == 10


def test_for_stage_changes_nothing_else(load):
    config = load()
    other = for_stage(config, "att_mask")
    assert other.fine.heads_mask == config.fine.heads_mask and other.coarse == config.coarse
    assert for_stage(config, "random_baseline").pruning == config.pruning


@pytest.mark.parametrize("module", [types, corpus, scheme])
def test_every_field_has_a_docstring_under_it(module):
    classes = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
    assert classes
    for node in classes:
        for field, after in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                documented = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                assert documented, f"{node.name}.{ast.unparse(field.target)}"
