"""The section `quantization` and its stage: defaults, steps, and every mistake."""

from __future__ import annotations

import pytest

from cook.config.quantization import QuantizationConfig
from cook.config.types import for_stage

QUANT = 'quantization={"is_quant": true}'


@pytest.fixture
def with_stage(bmcook):
    bmcook["stages"].append({"name": "quantize"})


def test_the_keys_of_bmcook_and_the_defaults(load, with_stage):
    config = load('quantization={"is_quant": true, "quantized_module": ["ffn.w_out"], "steps": 7}')
    assert config.quantization == QuantizationConfig(is_quant=True, quantized_module=("ffn.w_out",), steps=7)
    assert (config.quantization.scheme, config.quantization.group_size) == ("int8", 32)


def test_the_steps_of_the_section_count_unless_the_stage_has_its_own(load, with_stage):
    section = 'quantization={"is_quant": true, "steps": 7}'
    assert for_stage(load(section), "quantize").training.steps == 7
    assert for_stage(load(section), "att_mask").training.steps == 10
    assert for_stage(load(section, "stages.quantize.training.steps=3"), "quantize").training.steps == 3
    assert for_stage(load(QUANT), "quantize").training.steps == 10


def test_without_pruning_and_recipe_the_files_describe_the_stage(load, bmcook):
    bmcook["stages"] = []
    assert load(QUANT, "pruning.is_pruning=false").stage == "quantize"
    assert load(QUANT).stage == "ffn_finetune"
    assert load('quantization={"is_quant": false}', "pruning.is_pruning=false").stage == "pretrain"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], "quantization: missing, and the recipe has a stage quantize"),
        (['quantization={"is_quant": false}'], "quantization: is_quant is false"),
        ([QUANT, "training.train_weights=false"], "training.train_weights: quantize needs true"),
        (
            [QUANT, "stages.quantize.training.remove_masked=false"],
            "stages.quantize.training.remove_masked: quantize needs true",
        ),
        ([QUANT, "quantization.schemes=int4"], "did you mean 'scheme'?"),
        ([QUANT, "quantization.scheme=int3"], 'one of "int8", "int8_weight", "int4", "fp8"'),
        ([QUANT, "quantization.group_size=12"], "a multiple of 8"),
    ],
)
def test_mistakes_in_the_section(errors_of, with_stage, settings, message):
    (error,) = errors_of(*settings)
    assert message in error


def test_mistakes_in_the_order_of_the_stages(errors_of, bmcook):
    bmcook["stages"].insert(2, {"name": "quantize"})
    (error,) = errors_of(QUANT)
    assert "quantize must come after the other stages" in error
    bmcook["stages"] = [{"name": "pretrain"}]
    (error,) = errors_of(QUANT)
    assert "the recipe has no stage quantize" in error and '{"name": "quantize"}' in error
    bmcook["stages"] = [{"name": "pretrain"}, {"name": "pattern"}, {"name": "quantize"}]
    mask = ['pattern={"type": 8, "sparsity": 50}', "pruning.pruning_mask_path=results/tiny/p.safetensors"]
    errors = errors_of(QUANT, *mask, "quantization.is_quant=false")
    assert len(errors) == 1, "a pattern before quantize is no mistake"


def test_several_sizes_cannot_be_quantized_at_once(errors_of, bmcook, scheme):
    bmcook["stages"] = [{"name": "joint_mask"}, {"name": "quantize"}]
    scheme["joint"] = {"train_mask": True, "scope": "global", "target_params": [0.8, 0.5]}
    (error,) = errors_of(QUANT)
    assert "quantize makes one model" in error


def test_the_groups_of_four_bits_divide_the_targets(errors_of, load, bmcook, scheme):
    bmcook["stages"] = [{"name": "ffn_mask"}, {"name": "quantize"}]
    section = 'quantization={"is_quant": true, "scheme": "int4"}'
    (error,) = errors_of(section)
    assert "does not divide fine-grained.target_dimff" in error and "24" in error
    load(section, "quantization.group_size=8")
    load(section, 'quantization.quantized_module=["project_q"]')
    (error,) = errors_of(section, "fine-grained.scope=global")
    assert "does not divide fine-grained.round_to" in error
