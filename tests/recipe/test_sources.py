"""Files that a stage reads by path: whatever is replaced in place is noticed, and named."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cook.base import files
from cook.base.errors import UserError
from cook.config.load import load_config
from cook.recipe.plan import plan_stage
from cook.recipe.runner import is_finished
from cook.recipe.sources import changed_sources, check_sources, note_sources
from tests.recipe.tiny_run import write_run


def write_llama(folder: Path, seed: int = 0) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        LlamaForCausalLM(
            LlamaConfig(
                vocab_size=400,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=4,
            )
        ).save_pretrained(folder)


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A stage with a start model, a teacher and a mask that it holds, interrupted after its first checkpoint."""
    write_llama(tmp_path / "start")
    write_llama(tmp_path / "teacher", seed=1)
    write_run(
        tmp_path,
        model={"type": "hf", "path": "start"},
        tokenizer={"type": "hf", "path": "start", "vocab_size": 400},
        fine__dim_ff=24,
        fine__target_dimff=10,
        distillation={"teacher": "teacher", "ce_scale": 1.0},
        pruning__pruned_module=["mlp.down_proj.weight", "self_attn.o_proj.weight"],
        pruning__mask_method="fine-grained",
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "masks").mkdir(parents=True)
    for name in ("layer", "heads"):
        torch.save({"x": torch.ones(3)}, tmp_path / "out" / "masks" / f"{name}.pt")
    stage = plan_stage(load_config("bmcook.json"), "ffn_mask")
    assert stage.fixed.layer and stage.fixed.heads
    note_sources(stage)
    (stage.folder / "checkpoints" / "step-2").mkdir(parents=True)
    check_sources(stage, "auto")
    return stage


def flip(path: Path) -> None:
    """Another content of the same size and time."""
    seen, content = path.stat(), bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(seen.st_atime_ns, seen.st_mtime_ns))


REPLACED = ("start/model.safetensors", "start/config.json", "teacher/model.safetensors", "out/masks/heads.pt")


@pytest.mark.parametrize("name", REPLACED)
def test_a_file_replaced_in_place_is_refused_by_name(stage, name):
    flip(Path(name))
    with pytest.raises(UserError, match=f"(?s)changed since the stage began.*{name}: other content of the same size"):
        check_sources(stage, "auto")
    check_sources(stage, "never")


@pytest.mark.parametrize("name", REPLACED)
def test_a_finished_stage_is_not_taken_for_one_of_other_files(stage, name):
    done = {"fingerprint": stage.fingerprint(), "follows": None, "masks": {}}
    stage.done.write_text(json.dumps(done))
    assert is_finished(stage, "auto")
    flip(Path(name))
    with pytest.raises(UserError, match=f"(?s)files have changed since.*{name}"):
        is_finished(stage, "auto")


def test_what_changes_no_weight_is_no_change_and_neither_is_a_model_that_is_gone(stage):
    Path("start/README.md").write_text("a card")
    Path("start/generation_config.json").write_text("{}")
    assert changed_sources(stage) == []
    for path in Path("start").iterdir():
        path.unlink()
    Path("start").rmdir()
    assert changed_sources(stage) == []  # a finished stage needs it no more


def test_before_the_first_checkpoint_other_files_are_a_new_beginning(stage):
    (stage.folder / "checkpoints" / "step-2").rmdir()
    flip(Path("start/model.safetensors"))
    check_sources(stage, "auto")
    note_sources(stage)
    assert changed_sources(stage) == []


def test_large_files_are_known_by_blocks_from_end_to_end(tmp_path, monkeypatch):
    path, size = tmp_path / "large", 5_000_003
    path.write_bytes(os.urandom(size))
    assert files.content_hash(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(files, "WHOLE_BYTES", 4 << 20)
    for place in (0, 1_400_000, 2_700_000, size - 1):  # between its four blocks nothing is read
        before = files.content_hash(path)
        with open(path, "rb+") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
        files._content_hash.cache_clear()
        assert files.content_hash(path) != before, place


def test_a_mask_that_was_replaced_after_its_own_stage_is_not_held_by_the_next(tmp_path, monkeypatch):
    write_run(tmp_path, ("pretrain", "layer_mask", "layer_finetune"))
    monkeypatch.chdir(tmp_path)
    stage = plan_stage(load_config("bmcook.json"), "layer_finetune")
    mask, done = Path(stage.fixed.layer), Path("out/layer_mask/done.json")
    mask.parent.mkdir(parents=True)
    torch.save({"x": torch.ones(3)}, mask)
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps({"masks": {str(mask): hashlib.sha256(mask.read_bytes()).hexdigest()}}))
    check_sources(stage, "auto")
    flip(mask)
    with pytest.raises(UserError, match=f"{mask.name}: this is not the mask that layer_mask wrote"):
        check_sources(stage, "auto")
