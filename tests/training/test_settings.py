"""What the user's DeepSpeed config becomes before DeepSpeed sees it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from cook.base.errors import UserError
from cook.config.types import TrainingConfig
from cook.training.settings import check_settings, filled_config, resolve_precision

TRAINING = TrainingConfig(
    steps=200,
    train_batch_size=48,
    micro_batch_size=4,
    learning_rate=0.03,
    warmup=0.1,
    weight_decay=0.2,
    clip=0.7,
    precision="bf16",
)


def filled(config: dict[str, Any], world_size: int = 4, training: TrainingConfig = TRAINING) -> dict[str, Any]:
    return check_settings(training, config, world_size=world_size)


def changed(**changes: Any) -> TrainingConfig:
    return TrainingConfig(**{**TRAINING.__dict__, **changes})


def test_an_empty_config_is_filled_from_the_training_section():
    config = filled({})
    assert {key: config[key] for key in ("train_batch_size", "train_micro_batch_size_per_gpu")} == {
        "train_batch_size": 48,
        "train_micro_batch_size_per_gpu": 4,
    }
    assert config["gradient_accumulation_steps"] == 3 and config["gradient_clipping"] == 0.7
    assert config["bf16"]["enabled"] is True and config["fp16"]["enabled"] is False
    assert config["zero_optimization"] == {"stage": 2} and "optimizer" not in config


def test_every_auto_of_the_usual_template_gets_a_value():
    template = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto", "loss_scale": 0},
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
        },
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "total_num_steps": "auto",
                "warmup_min_lr": "auto",
                "warmup_max_lr": "auto",
                "warmup_num_steps": "auto",
            },
        },
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    before = copy.deepcopy(template)
    config = filled(template)
    assert template == before, "the user's config was changed"
    assert config["optimizer"]["params"] == {"lr": 0.03, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.2}
    assert config["scheduler"]["params"] == {
        "total_num_steps": 200,
        "warmup_min_lr": 0.0,
        "warmup_max_lr": 0.03,
        "warmup_num_steps": 20,
    }
    # DeepSpeed chooses these itself where they are absent.
    assert config["zero_optimization"] == {"stage": 3, "overlap_comm": True}
    assert config["fp16"] == {"enabled": False, "loss_scale": 0}


def test_values_of_the_user_stay():
    config = filled({"gradient_clipping": 0.7, "zero_optimization": {"stage": 1, "reduce_bucket_size": 5}, "x": 1})
    assert config["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 5} and config["x"] == 1


def test_an_optimizer_takes_from_training_what_it_does_not_say():
    config = filled_config({"optimizer": {"type": "Lamb"}}, TRAINING, world_size=4, precision="fp16")
    assert config["optimizer"]["params"] == {"lr": 0.03, "weight_decay": 0.2}
    config = filled({"optimizer": {"type": "AdamW", "params": {"lr": 0.5, "torch_adam": True}}})
    assert config["optimizer"]["params"] == {"lr": 0.5, "weight_decay": 0.2, "torch_adam": True}


def test_offloaded_states_get_deepspeeds_own_adam():
    config = filled({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    assert config["optimizer"] == {
        "type": "AdamW",
        "params": {"lr": 0.03, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.2},
    }
    config = filled({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}})
    assert "optimizer" not in config


def test_frozen_weights_have_no_scheduler():
    scheduler = {"scheduler": {"type": "WarmupLR", "params": {}}}
    assert "scheduler" in filled(scheduler) and "scheduler" not in filled(scheduler, 4, changed(train_weights=False))


@pytest.mark.parametrize(
    ("asked", "world_size", "precision", "expected"),
    [
        ("auto", 1, "fp32", 0),
        (None, 1, "fp32", 0),
        ("auto", 2, "fp32", 2),
        (0, 1, "fp32", 0),
        (0, 4, "bf16", 1),
        (1, 1, "bf16", 1),
        (3, 2, "bf16", 3),
    ],
)
def test_the_zero_stage(asked, world_size, precision, expected):
    config = {} if asked is None else {"zero_optimization": {"stage": asked}}
    assert filled(config, world_size, changed(precision=precision))["zero_optimization"]["stage"] == expected


@pytest.mark.parametrize(
    ("config", "place"),
    [
        (
            {"zero_optimization": {"offload_param": {"buffer_size": "auto"}}},
            "zero_optimization.offload_param.buffer_size",
        ),
        ({"comms_logger": {"enabled": "auto"}}, "comms_logger.enabled"),
        ({"optimizer": {"type": "SGD", "params": {"momentum": "auto"}}}, "optimizer.params.momentum"),
    ],
)
def test_an_auto_without_a_value_is_an_error_that_names_it(config, place):
    with pytest.raises(UserError, match=place.replace(".", r"\.")):
        filled(config)


@pytest.mark.parametrize(
    ("precision", "config", "expected"),
    [
        ("fp32", {}, "fp32"),
        ("bf16", {"bf16": {"enabled": "auto"}}, "bf16"),
        ("auto", {"bf16": {"enabled": True}}, "bf16"),
        ("auto", {"fp16": {"enabled": True}}, "fp16"),
        ("fp16", {"fp16": {"enabled": True}}, "fp16"),
    ],
)
def test_the_precision(precision, config, expected):
    assert resolve_precision(changed(precision=precision), config) == expected


@pytest.mark.parametrize(("fast", "expected"), [(True, "bf16"), (False, "fp32")])
def test_an_automatic_precision_suits_the_device(monkeypatch, fast, expected):
    monkeypatch.setattr("cook.training.settings.has_fast_bf16", lambda: fast)
    assert resolve_precision(changed(precision="auto"), {}) == expected


def test_a_precision_that_contradicts_the_config_is_refused():
    with pytest.raises(UserError, match="training.precision is fp32"):
        filled({"bf16": {"enabled": True}}, training=changed(precision="fp32"))


def test_accumulation_makes_up_for_the_ranks():
    for world_size, steps in ((1, 12), (2, 6), (12, 1)):
        config = filled_config({}, TRAINING, world_size=world_size, precision="fp32")
        assert config["gradient_accumulation_steps"] == steps
