"""Marks the modules that start processes, build C or train for long; `scripts/test.sh --quick` leaves them out.

Single tests of other modules are marked where they stand.

The longest files come first, so that no test process works alone at the end.
"""

from __future__ import annotations

import atexit
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cook.base.environment import quiet_torchao
from cook.base.rendezvous import VARIABLES

ROOT = Path(__file__).parent
SLOW = {
    "test_api.py",
    "commands/test_prune.py",
    "test_docs.py",
    "test_faults_script.py",
    "test_package.py",
    "test_scripts.py",
    "test_task_scripts.py",
    "test_train.py",
    "test_two_hosts.py",
    "test_warm.py",
    "base/test_distributed.py",
    "base/test_faults.py",
    "base/test_lock.py",
    "base/test_watchdog.py",
    "data/test_loader.py",
    "data/test_main.py",
    "data/test_source_files.py",
    "evaluation/test_equality.py",
    "evaluation/test_lm_eval.py",
    "evaluation/test_main.py",
    "families/test_consumers.py",
    "families/test_experts.py",
    "families/test_families.py",
    "families/test_odd_configs.py",
    "families/test_opening.py",
    "families/test_stock_space.py",
    "families/test_stream.py",
    "families/test_tf_checkpoint.py",
    "models/test_ragged.py",
    "pruning/test_controller.py",
    "pruning/test_pad.py",
    "pruning/test_planted.py",
    "pruning/test_planted_experts.py",
    "export/test_pruned_folder.py",
    "export/test_check.py",
    "test_do_prune.py",
    "pruning/test_reshape.py",
    "quantization/test_prepare_engines.py",
    "recipe/benchmarks/test_task_stages.py",
    "recipe/test_compact.py",
    "recipe/test_distillation.py",
    "recipe/test_distilled_runs.py",
    "recipe/test_expert_runs.py",
    "recipe/test_joint.py",
    "recipe/test_pattern.py",
    "recipe/test_quantize.py",
    "recipe/test_recipe.py",
    "recipe/test_resume.py",
    "recipe/test_sizes.py",
    "recipe/test_stage_data.py",
    "recipe/test_stock.py",
    "recipe/test_task_data.py",
    "recipe/test_teacher_tokenizers.py",
    "service/test_controller.py",
    "service/test_forms.py",
    "service/test_full_disk.py",
    "service/test_page.py",
    "service/test_server.py",
    "service/test_submission.py",
    "service/test_executors.py",
    "service/test_index.py",
    "service/test_kills.py",
    "service/test_real_run.py",
    "service/test_slurm.py",
    "service/test_supervisor.py",
    "service/test_client.py",
    "service/test_schemathesis.py",
    "sparsity/kernels/test_sparse_native.py",
    "sparsity/test_sparse_export.py",
    "training/test_checkpoint.py",
    "training/test_engine_and_step.py",
    "training/test_long_rows.py",
    "training/test_nvme.py",
    "training/test_zero.py",
    "training/test_resume_exactly.py",
}


quiet_torchao()
LONGEST = ("test_faults_script.py", "test_two_hosts.py", "test_train.py", "test_scripts.py", "recipe/test_resume.py")


@pytest.fixture(autouse=True, scope="module")
def _no_launcher() -> Iterator[None]:
    """A module leaves no variables of a launcher behind: the programs that later tests start would act on them."""
    yield
    assert [name for name in VARIABLES if name in os.environ] == []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.relative_to(ROOT).as_posix(), len(places)))
    for item in items:
        if item.path.relative_to(ROOT).as_posix() in SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Collections, which libraries also ask for, no longer look through all that is imported: a second each."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries report as leaked what Python does not free in the end
