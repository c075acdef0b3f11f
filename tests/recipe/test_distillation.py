"""Distillation is what plain PyTorch computes, on any number of ranks and at every ZeRO stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.recipe import tiny_distill
from tests.recipe.tiny_run import run_on_ranks
from tests.training import tiny_training as tiny

# fp32: sums in another order; AdamW divides by the gradient's own size (see tests/training/test_engine_and_step.py).
LOSS, GATE = 1e-5, 1e-4
# Measured with the wide teacher: 2e-4 in a single weight whose gradient all but vanishes, 5e-6 in the last thousandth.
WEIGHT, NEARLY_ALL = 5e-4, 2e-5
ZERO = (0, 1, 2, 3)
FROZEN = {"train_weights": False}


def cases(ranks: int) -> dict[str, Any]:
    share, made = tiny.ROWS // ranks, {}
    for zero in ZERO:
        own = {**FROZEN, "micro_batch_size": share}
        made[f"self {zero}"] = {"zero": zero, "teacher": "self", "training": own}
        finetune = {"zero": zero, "teacher": "wide", "gated": False, "masked": True}
        made[f"wide {zero}"] = finetune | {"training": {"micro_batch_size": 1}}
    for zero in (0, 3):
        own = {**FROZEN, "micro_batch_size": 1, "activation_checkpointing": True}
        made[f"self {zero} checkpointing"] = {"zero": zero, "teacher": "self", "training": own}
        made[f"wide {zero} checkpointing"] = {
            "zero": zero,
            "teacher": "wide",
            "gated": False,
            "masked": True,
            "training": {"micro_batch_size": 1, "activation_checkpointing": True},
        }
    for zero, precision in ((0, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")):
        own = {**FROZEN, "micro_batch_size": share, "precision": precision}
        for teacher in ("self", "copy", "streamed"):
            made[f"{teacher} of {zero} {precision}"] = {
                "zero": zero,
                "teacher": teacher,
                "training": own,
                "dropout": 0.3,
            }
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """By the number of ranks, what each rank saw."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        found[ranks] = run_on_ranks(tiny_distill.__file__, cases(ranks), folder, ranks)
    return found


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def same_weights(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], name: str) -> None:
    errors = torch.cat([(a[key] - b[key]).abs().flatten() for key in b])
    assert float(errors.max()) < WEIGHT and float(errors.quantile(0.999)) < NEARLY_ALL, name


def runs(results: dict[int, list[dict[str, Any]]], kind: str) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{name} on rank {rank} of {ranks}", result)
        for ranks, seen in results.items()
        for rank, own in enumerate(seen)
        for name, result in own.items()
        if name.startswith(kind)
    ]


def test_a_model_that_teaches_itself_is_a_dense_copy_in_plain_pytorch(results):
    training = tiny.dataclasses.replace(tiny.TRAINING, **FROZEN)

    def extra(model: torch.nn.Module) -> tiny_distill.Oracle:
        return tiny_distill.Oracle(model, tiny_distill.same_teacher())

    plain, alone = tiny.plain_run(training, extra=extra), tiny.plain_run(training)
    gates = plain["gates"]["values"]
    assert float((gates - alone["gates"]["values"]).abs().max()) > 0.1, "the teacher says nothing"
    found = [run for number in ZERO for run in runs(results, f"self {number}")]
    assert len(found) == 3 * (len(ZERO) + 2)
    for name, result in found:
        assert not result["problems"], name
        assert result["losses"] == pytest.approx(plain["losses"], rel=LOSS), name
        assert float((result["gates"]["values"] - gates).abs().max()) < GATE, name
        for key in ("multipliers", "moment", "second_moment"):
            torch.testing.assert_close(result["gates"][key], plain["gates"][key], rtol=1e-3, atol=1e-6, msg=name)
        assert distance(result["weights"], tiny.weights()) == 0, name


def test_finetuning_under_a_wider_teacher_is_that_of_plain_pytorch(results):
    oracles = []

    def extra(model: torch.nn.Module) -> tiny_distill.Oracle:
        oracles.append(tiny_distill.Oracle(model, tiny_distill.wide_teacher()))
        return oracles[-1]

    plain = tiny.plain_run(tiny.TRAINING, gated=False, masked=True, extra=extra)
    alone = tiny.plain_run(tiny.TRAINING, gated=False, masked=True)
    assert distance(plain["weights"], alone["weights"]) > 0.01, "the teacher says nothing"
    oracles.append(tiny_distill.Oracle(tiny.build(), tiny_distill.wide_teacher()))
    maps, fresh = ({name: weight.detach() for name, weight in oracle.maps.items()} for oracle in oracles)
    # Adam's first steps are of its learning rate's size, whatever the gradient.
    assert distance(maps, fresh) > 3 * tiny_distill.LEARNING_RATE
    found = runs(results, "wide")
    assert len(found) == 3 * (len(ZERO) + 2)
    for name, result in found:
        assert not result["problems"], name
        assert result["losses"] == pytest.approx(plain["losses"], rel=LOSS), name
        assert result["norms"] == pytest.approx(plain["norms"], rel=1e-4), name
        same_weights(result["weights"], plain["weights"], name)
        same_weights(result["projections"], maps, name)


@pytest.mark.parametrize("case", ["0 fp32", "2 bf16", "3 fp32", "3 bf16"])
def test_a_model_that_teaches_itself_is_bit_for_bit_its_own_copy(results, case):
    for ranks, seen in results.items():
        for own in seen:
            itself, *others = (own[f"{teacher} of {case}"] for teacher in ("self", "copy", "streamed"))
            for other in others:
                assert itself["losses"] == other["losses"], ranks
                assert torch.equal(itself["gates"]["values"], other["gates"]["values"]), ranks
