"""What DeepSpeed would refuse is found before an engine is built, by its key; builds are announced."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cook.base.errors import UserError, UserErrors
from cook.training import deepspeed_builds
from cook.training.deepspeed_builds import _await_lock, announced
from cook.training.deepspeed_checks import import_deepspeed, refusals
from cook.training.settings import check_settings
from cook.training.zero import fit_disk_buffers
from tests.training.tiny_training import TRAINING


def zero(**keys: Any) -> dict[str, Any]:
    return {"zero_optimization": keys}


def optimizer(name: Any, stage: int = 0, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": name, "params": params}, **zero(stage=stage)}


def scheduler(name: Any, **params: Any) -> dict[str, Any]:
    return {"scheduler": {"type": name, "params": params}}


@pytest.mark.parametrize(
    ("config", "key"),
    [
        # Each of these ended in DeepSpeed 0.19.8 in a traceback while its engine was made, or in its first steps.
        (zero(stage=5), "zero_optimization.stage"),
        (zero(stage="2"), "zero_optimization.stage"),
        (zero(stage=True), "zero_optimization.stage"),
        ({"zero_optimization": True}, "zero_optimization"),
        (zero(stage=1, buckett=3), "zero_optimization.buckett"),
        (zero(stage=2, cpu_offload=True), "zero_optimization.cpu_offload"),
        (zero(stage=3, cpu_offload_param=True), "zero_optimization.cpu_offload_param"),
        (zero(stage=2, offload_optimizer="cpu"), "zero_optimization.offload_optimizer"),
        (zero(stage=2, offload_optimizer={"device": "gpu"}), "zero_optimization.offload_optimizer.device"),
        (zero(stage=3, offload_param={"device": "nvme"}), "zero_optimization.offload_param.nvme_path"),
        (
            zero(stage=3, offload_optimizer={"device": "nvme", "nvme_path": "/x"}),
            "zero_optimization.offload_optimizer.device",
        ),
        (zero(stage=2, offload_param={"device": "cpu"}), "zero_optimization.offload_param"),
        (zero(stage=0, offload_optimizer={"device": "cpu"}), "zero_optimization.offload_optimizer"),
        (zero(stage=2, reduce_bucket_size="big"), "zero_optimization.reduce_bucket_size"),
        (zero(stage=3, mics_shard_size=1), "zero_optimization"),
        (zero(stage=1, legacy_stage1=True), "zero_optimization.legacy_stage1"),
        (zero(stage=2, zenflow={}), "zero_optimization.zenflow"),
        ({"fp16": {"enabled": False, "loss_scale": -1}}, "fp16.loss_scale"),
        ({"bf16": {"foo": 1}}, "bf16.foo"),
        ({"bf16": {"bf16_master_weights_and_grads": True}, **zero(stage=0)}, "bf16"),
        ({"data_types": {"grad_accum_dtype": "fp64"}}, "data_types.grad_accum_dtype"),
        ({"data_types": {"param_dtype": "bf16"}}, "data_types.param_dtype"),
        ({"data_types": None}, "data_types"),
        ({"communication_data_type": 5}, "communication_data_type"),
        ({"gradient_predivide_factor": 2.0, **zero(stage=2)}, "gradient_predivide_factor"),
        ({"gradient_allreduce_op": "max"}, "gradient_allreduce_op"),
        ({"gradient_clipping": "x"}, "gradient_clipping"),
        ({"steps_per_print": 0}, "steps_per_print"),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown"),
        ({"elasticity": {"enabled": True}}, "elasticity"),
        ({"sequence_parallel_size": 2}, "sequence_parallel_size"),
        ({"tensor_parallel": {"autotp_size": 2}}, "tensor_parallel.autotp_size"),
        ({"activation_checkpointing": [1]}, "activation_checkpointing"),
        ({"tensorboard": {"enabled": "maybe"}}, "tensorboard.enabled"),
        ({"flops_profiler": {"enabled": True, "profile_step": "x"}}, "flops_profiler.profile_step"),
        ({"comms_logger": {"enabled": 5}}, "comms_logger.enabled"),
        ({"checkpoint": {"tag_validation": "x"}}, "checkpoint"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal"),
        ({"log_level": "x"}, "log_level"),
        ({"optimizer": {}}, "optimizer.type"),
        (optimizer("Lion8"), "optimizer.type"),
        (optimizer("sgd"), "optimizer.type"),
        (optimizer("SGD", stage=1), "optimizer.type"),
        (optimizer("Lamb"), "optimizer.type"),
        (optimizer("Lion"), "optimizer.type"),
        (optimizer("MuAdam"), "optimizer.type"),
        (optimizer("LBFGS"), "optimizer"),
        (optimizer("AdamW", betas=[0.9]), "optimizer"),
        (optimizer("AdamW", torch_adam=True, foo=1), "optimizer"),
        (optimizer("AdamW", max_grad_norm=1), "optimizer.params.max_grad_norm"),
        (scheduler("Warm"), "scheduler.type"),
        (scheduler("WarmupLR", warmup_num_steps=0), "scheduler"),
        (scheduler("WarmupDecayLR"), "scheduler"),
        (scheduler("ReduceLROnPlateau"), "scheduler"),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler.params"),
    ],
)
def test_what_deepspeed_cannot_use_is_named_by_its_key(config, key):
    with pytest.raises(UserErrors) as caught:
        check_settings(TRAINING, config, world_size=1)
    assert [error.what.partition(":")[0] for error in caught.value.errors][0] == f"deepspeed.{key}"


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        (zero(stage=2, overlap_comm="yes", reduce_bucket_size=5e8, offload_optimizer=None), "fp32"),
        (zero(stage=3, offload_param={"device": "cpu"}), "fp32"),
        ({"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}, **zero(stage=1)}, "bf16"),
        ({"data_types": {"grad_accum_dtype": "bf16"}, **zero(stage=2)}, "bf16"),
        (optimizer("AdamW", stage=1, torch_adam=True, betas=[0.8, 0.9]), "fp32"),
        (optimizer("SGD", momentum=0.9), "fp32"),
        (optimizer("SGD", stage=1) | {"zero_allow_untested_optimizer": True}, "fp32"),
        (scheduler("OneCycle", cycle_min_lr=0.01, cycle_max_lr=0.1), "fp32"),
        (scheduler("StepLR", step_size=2), "fp32"),
        ({"tensorboard": {"enabled": False}, "flops_profiler": {"enabled": True, "profile_step": 1}}, "fp32"),
        ({"a_key_of_tomorrow": 1}, "fp32"),
    ],
)
def test_what_deepspeed_can_use_passes(config, precision):
    training = dataclasses.replace(TRAINING, precision=precision)
    assert check_settings(training, config, world_size=1)["train_batch_size"] == 4


@pytest.mark.parametrize("config", [{}, {"fp16": {"enabled": True}}])
def test_fp16_is_refused_where_the_device_has_none(config):
    import_deepspeed()
    from deepspeed.accelerator import get_accelerator

    training = dataclasses.replace(TRAINING, precision="fp16")
    if get_accelerator().is_fp16_supported():
        check_settings(training, config, world_size=1)
    else:
        with pytest.raises(UserError, match=r"deepspeed\.fp16\.enabled, training\.precision"):
            check_settings(training, config, world_size=1)


def test_all_mistakes_come_at_once_and_close_names_are_offered():
    config = {"bf16": {"foo": 1}, "communication_data_type": "int8", **zero(stage=1, buckett=1, overlap_comm="perhaps")}
    with pytest.raises(UserErrors) as caught:
        check_settings(TRAINING, config, world_size=1)
    assert len(caught.value.errors) == 4
    with pytest.raises(UserError, match="did you mean 'AdamW'"):
        check_settings(TRAINING, optimizer("AdamWW"), world_size=1)


def test_what_the_checks_do_not_know_is_still_a_mistake_of_the_user():
    with pytest.raises(UserError, match="deepspeed: DeepSpeed cannot make an engine of this configuration: 'layers'"):
        with refusals({"data_efficiency": {}}):
            raise KeyError("layers")
    with pytest.raises(KeyError), refusals({"train_batch_size": 1}):
        raise KeyError("layers")


def test_without_a_compiler_an_optimizer_in_cpp_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    with pytest.raises(UserError, match=r"AdamW needs C\+\+ code that must be built first, and c\+\+ is missing"):
        check_settings(TRAINING, optimizer("AdamW"), world_size=1)
    assert not (tmp_path / "ext").exists()
    check_settings(TRAINING, optimizer("AdamW", torch_adam=True), world_size=1)
    (tmp_path / "ext" / "fused_adam").mkdir(parents=True)
    (tmp_path / "ext" / "fused_adam" / "fused_adam.so").touch()
    check_settings(TRAINING, optimizer("AdamW"), world_size=1)


def test_nvme_without_its_library_is_refused_before_anything_is_built(monkeypatch, tmp_path):
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().get_op_builder("AsyncIOBuilder")
    monkeypatch.setattr(builder, "is_compatible", lambda self, verbose=False: False)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ext"))
    config = zero(stage=3, offload_param={"device": "nvme", "nvme_path": str(tmp_path)})
    wanted = (
        r"offload_param.device: nvme needs C\+\+ code that must be built first, and the library libaio .* is missing"
    )
    with pytest.raises(UserError, match=wanted):
        check_settings(TRAINING, config, world_size=1)
    assert not (tmp_path / "ext").exists()


def old(lock: Path) -> Path:
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    os.utime(lock, (time.time() - 60,) * 2)
    return lock


def test_the_lock_of_a_build_that_was_killed_is_removed(tmp_path, capsys):
    lock = tmp_path / "op" / "lock"
    # As torch takes it: created exclusively, the file kept open; then killed.
    holder = f"import os, time; os.open({str(lock)!r}, os.O_CREAT | os.O_EXCL); print(flush=True); time.sleep(60)"
    lock.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.kill()
    old(lock)
    _await_lock(lock, "op")
    assert not lock.exists()
    assert f"removing {lock}: the process that was building op has ended" in capsys.readouterr().out


def test_a_build_that_is_at_work_is_waited_for_by_name(tmp_path, capsys):
    lock = old(tmp_path / "op" / "lock")
    holder = f"import os, sys; held = open({str(lock)!r}); print(flush=True); sys.stdin.read(); os.unlink(held.name)"
    with subprocess.Popen([sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdin.close()
        _await_lock(lock, "op")
        waited = f"waiting for process {process.pid}, which builds op"
    said = capsys.readouterr().out
    assert said == "" or waited in said  # the other may have been quicker
    assert not lock.exists() and "removing" not in said


def test_a_lock_on_a_shared_file_system_is_only_named(tmp_path, capsys, monkeypatch):
    lock = old(tmp_path / "op" / "lock")
    monkeypatch.setattr(deepspeed_builds, "LOCAL_FILE_SYSTEMS", ())
    monkeypatch.setattr(time, "sleep", lambda _: lock.unlink())
    _await_lock(lock, "op")
    assert f"waiting for {lock}: if no machine builds op, remove this file" in capsys.readouterr().out


class Builder:
    name = "some_op"


def test_a_build_is_announced_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def jit_load(builder, verbose):
        (tmp_path / "some_op" / "some_op.so").touch()
        return "op"

    assert announced(jit_load)(Builder()) == "op"
    said = capsys.readouterr().out
    assert "building DeepSpeed's some_op (C++): once per machine" in said and "built some_op in 0 s" in said
    assert announced(jit_load)(Builder()) == "op" and capsys.readouterr().out == ""


def test_a_build_that_fails_says_where_and_what_else_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    def jit_load(builder, verbose):
        raise RuntimeError("Error building extension 'some_op': c++ not found\n...")

    with pytest.raises(UserError, match="could not be built: Error building extension 'some_op'") as caught:
        announced(jit_load)(Builder())
    assert str(tmp_path / "some_op") in caught.value.remedy


def test_deepspeeds_own_builders_are_announced():
    import_deepspeed()
    from deepspeed.ops.op_builder.builder import OpBuilder

    assert OpBuilder.jit_load.__qualname__.startswith("announced")


def test_buffers_are_as_large_as_the_largest_part_of_a_weight(tmp_path):
    def build():
        return torch.nn.Sequential(torch.nn.Embedding(999, 10), torch.nn.Linear(10, 10))

    offload = {"device": "nvme", "nvme_path": str(tmp_path)}
    for given, world, size in ((None, 1, 9990), (None, 4, 2498), (5000, 2, 5000), (4995, 2, 4995)):
        zero = {"offload_param": offload | ({} if given is None else {"buffer_size": given})}
        fit_disk_buffers(zero, build, world)
        assert zero["offload_param"]["buffer_size"] == size
    with pytest.raises(UserError, match=r"0\.weight does not fit on 2 rank") as refused:
        fit_disk_buffers({"offload_param": offload | {"buffer_size": 4994}}, build, 2)
    assert "at least 4995" in str(refused.value) and not list(tmp_path.iterdir())
    elsewhere = {"offload_param": {"device": "cpu"}}
    fit_disk_buffers(elsewhere, build, 1)
    assert elsewhere == {"offload_param": {"device": "cpu"}}
