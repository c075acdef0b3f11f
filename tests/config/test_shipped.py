"""The configurations that come with the program: they load, and they say what the published ladder says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import cook.config.load as load_module
from cook.base.errors import UserErrors
from cook.config.load import load_config
from cook.config.types import STAGE_NAMES, for_stage

ROOT = Path(load_module.__file__).parents[2]
SIZES = {  # attention blocks, FFN blocks, heads, dim_ff, parameters: the ladder as CPM-Ant's authors published it
    "10B": (48, 48, 32, 10240, 9.39e9),
    "7B": (37, 32, 32, 10240, 6.64e9),
    "3B": (37, 32, 20, 3735, 3.15e9),
    "2B": (25, 21, 20, 3735, 2.14e9),
    "1B": (25, 21, 16, 700, 1.15e9),
    "300M": (25, 21, 4, 350, 0.43e9),
}
RUNGS = [("10B", "7B"), ("7B", "3B"), ("3B", "2B"), ("2B", "1B"), ("1B", "300M")]
EMBEDDINGS = (30720 + 32 * 32 + 32) * 4096 + (32 * 32 + 512) * 32 + 4096  # with the position bias and the last norm


def block_parameters(size: str) -> int:
    kept_att, kept_ffn, heads, dim_ff, _ = SIZES[size]
    return kept_att * (4 * 4096 * heads * 128 + 4096) + kept_ffn * (3 * 4096 * dim_ff + 4096)


@pytest.fixture
def in_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def rung_path(big: str, small: str) -> Path:
    return ROOT / "config" / "cpm_ant" / f"{big}_to_{small}" / "bmcook.json"


@pytest.fixture
def stand_ins(elsewhere, in_root):
    """Overrides that put files of the right kind in the place of the model, the tokenizer and the corpus."""
    (elsewhere / "model").mkdir()
    (elsewhere / "data.jsonl").write_text('{"text": "x"}\n')

    def make(big: str) -> list[str]:
        att, ffn, heads, dim_ff, _ = SIZES[big]
        removed = [[layer >= att, layer >= ffn] for layer in range(48)]
        config = {
            "vocab_size": 30720,
            "prompt_length": 32,
            "num_heads": heads,
            "dim_ff": dim_ff,
            "mask_modules": removed if any(map(any, removed)) else None,
        }
        (elsewhere / "model" / "config.json").write_text(json.dumps(config))
        model = elsewhere / "model"
        return [f"model.path={model}", f"tokenizer.path={model}", f'data.paths=["{elsewhere}/*.jsonl"]']

    return make


def test_every_shipped_file_is_known_here():
    shipped = {path.parent.name for path in (ROOT / "config").rglob("bmcook.json")}
    assert shipped == {"config", "smollm2", "smollm2_int8"} | {f"{big}_to_{small}" for big, small in RUNGS}


@pytest.mark.parametrize("world_size", [None, 1, 2, 4, 8])
def test_the_default_loads_as_it_is(in_root, world_size):
    config = load_config("config/bmcook.json", world_size=world_size)
    others = ("joint", "hidden", "headdim", "experts", "pattern", "quantize", "moefy")
    assert [entry.name for entry in config.stages] == [name for name in STAGE_NAMES if not name.startswith(others)]
    assert config.stage == "layer_mask"
    assert config.data.type == "python_stdlib" and config.tokenizer.path is None
    assert (config.fine.num_heads, config.fine.target_num_heads) == (16, 4)
    assert (config.fine.dim_ff, config.fine.target_dimff) == (700, 350)
    assert 0.25 <= config.coarse.target_sparsity <= 0.35
    assert config.deepspeed["train_batch_size"] == "auto" and config.deepspeed["zero_optimization"]["stage"] == 2


def test_the_default_can_prune_in_the_other_order(in_root):
    names = ["layer_mask", "layer_finetune", "ffn_mask", "ffn_finetune", "att_mask", "att_finetune"]
    setting = "stages=" + json.dumps([{"name": name} for name in names])
    assert [entry.name for entry in load_config("config/bmcook.json", [setting]).stages] == names


@pytest.mark.parametrize(("name", "world_size"), [("smollm2", None), ("smollm2", 1), ("smollm2_int8", 2)])
def test_smollm2_lacks_nothing_but_its_folder(elsewhere, in_root, name, world_size):
    path = ROOT / "config" / name / "bmcook.json"
    (elsewhere / "model").mkdir()
    sizes = {"vocab_size": 49152, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    (elsewhere / "model" / "config.json").write_text(json.dumps({"model_type": "llama", **sizes}))
    model = elsewhere / "model"
    config = load_config(path, [f"model.path={model}", f"tokenizer.path={model}"], world_size=world_size)
    assert config.stage == "ffn_mask" and config.model.type == "hf"
    assert not for_stage(config, "ffn_mask").training.train_weights
    assert for_stage(config, "ffn_finetune").training.train_weights
    assert (config.quantization is not None) == (name == "smollm2_int8")
    assert abs(config.fine.target_dimff - 0.7 * config.fine.dim_ff) < 64 and config.training.precision == "bf16"
    with pytest.raises(UserErrors, match="path\\(s\\) do not exist"):
        load_config(path)


@pytest.mark.parametrize("big, small", RUNGS)
def test_a_rung_lacks_nothing_but_its_files(in_root, big, small):
    with pytest.raises(UserErrors) as caught:
        load_config(rung_path(big, small), world_size=8)
    [error] = caught.value.errors
    assert str(error).startswith("3 path(s) do not exist:")
    for key in ("model.path", "tokenizer.path", "data.paths.0"):
        assert f"\n    {key}: " in str(error)


@pytest.mark.parametrize("big, small", RUNGS)
@pytest.mark.parametrize("world_size", [None, 1, 8, 128])
def test_a_rung_loads_with_stand_ins(stand_ins, big, small, world_size):
    config = load_config(rung_path(big, small), stand_ins(big), world_size=world_size)
    assert config.deepspeed["zero_optimization"]["stage"] == 3 and config.deepspeed["bf16"]["enabled"] is True
    assert config.training.precision == "bf16" and config.training.activation_checkpointing
    before, after = SIZES[big], SIZES[small]
    if before[:2] != after[:2]:
        assert config.stage == "layer_mask"
        wanted = 1 - block_parameters(small) / block_parameters(big)
        assert config.coarse.target_sparsity == pytest.approx(wanted, abs=5e-5)
    else:
        assert config.stage == "att_mask"
        assert (config.fine.num_heads, config.fine.dim_ff) == before[2:4]
        assert (config.fine.target_num_heads, config.fine.target_dimff) == after[2:4]


@pytest.mark.parametrize("size", SIZES)
def test_the_formula_of_the_sizes_gives_the_published_parameters(size):
    assert block_parameters(size) + EMBEDDINGS == pytest.approx(SIZES[size][4], abs=0.006e9)


@pytest.mark.parametrize("big, small", RUNGS[1:])
def test_a_rung_starts_where_the_one_above_ends(big, small):
    above = next(json.loads(rung_path(b, s).read_text()) for b, s in RUNGS if s == big)
    assert json.loads(rung_path(big, small).read_text())["model"]["path"] == above["output_dir"] + "/pruned"


def test_the_last_rung_is_the_guides():
    scheme = json.loads((rung_path("1B", "300M").parent / "l0_pruning.json").read_text())
    assert scheme["coarse-grained"]["coarse_mask"] == "results/sprune/2B_layer_mask.pt"
    assert scheme["coarse-grained"]["target_sparsity"] == 0.67
    assert scheme["fine-grained"] == {
        "train_mask": True,
        "coarse_mask": "results/sprune/2B_layer_mask.pt",
        "num_heads": 16,
        "dim_ff": 700,
        "target_num_heads": 4,
        "target_dimff": 350,
        "heads_mask": "results/sprune/300M_head_mask.pt",
        "dimff_mask": "results/sprune/300M_dimff_mask.pt",
        "prune_mode": "att",
    }
