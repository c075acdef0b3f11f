from __future__ import annotations

import pytest

from cook.config.types import for_stage

MASK = "results/tiny/pattern.safetensors"


@pytest.fixture
def pattern(bmcook):
    bmcook["pruning"] |= {"mask_method": "pattern", "pruning_mask_path": MASK}
    bmcook["pattern"] = {"type": "tile_wise_k", "sparsity": 75}
    bmcook["stages"] = [{"name": "pretrain"}, {"name": "pattern"}]
    return bmcook


def test_a_pattern_is_read(pattern, load):
    config = load('pattern.quirks=["revive"]')
    assert (config.pattern.type, config.pattern.sparsity, config.pattern.quirks) == ("tile_wise_k", 75.0, ("revive",))
    assert config.stage == "pattern"
    assert for_stage(config, "pattern").pruning.mask_method == "pattern"


@pytest.mark.parametrize("method", ["m4n2_1d", "m4n2_2d"])
def test_two_of_four_needs_no_section(pattern, load, method):
    del pattern["pattern"]
    config = load(f"pruning.mask_method={method}")
    assert for_stage(config, "pattern").stage == "pattern"
    assert for_stage(config, "pattern").pruning.mask_method == method


@pytest.mark.parametrize(
    "override, said",
    [
        ("pattern=null", "pattern: missing"),
        ("pruning.pruning_mask_path=null", "a pattern needs a mask file"),
        ("pruning.pruning_mask_path=x.pt", "a pattern needs a mask file"),
        ("pattern.previous_mask=gone.safetensors", "there is no such file"),
        ("pattern.type=9", "wrong value at 'pattern.type'"),
        ('pattern.quirks=["luck"]', "wrong value at 'pattern.quirks.0'"),
        ("pattern.sparsity=101", "wrong value at 'pattern.sparsity'"),
    ],
)
def test_mistakes(pattern, errors_of, override, said):
    assert any(said in error for error in errors_of(override))


def test_the_mask_that_is_read_is_not_the_one_that_is_written(pattern, errors_of, elsewhere):
    (elsewhere / "mask.safetensors").touch()
    [error] = errors_of("pattern.previous_mask=mask.safetensors", "pruning.pruning_mask_path=./mask.safetensors")
    assert "pattern.previous_mask: this stage writes the same file" in error


def test_patterns_and_gates_are_not_mixed(pattern, errors_of):
    pattern["stages"].append({"name": "layer_mask"})
    assert any("pattern cannot be combined with stages that learn gates" in error for error in errors_of())


def test_other_methods_have_no_mask_of_single_weights(bmcook, errors_of):
    bmcook["pruning"]["pruning_mask_path"] = MASK
    assert any("does not use a mask of single weights" in error for error in errors_of())
