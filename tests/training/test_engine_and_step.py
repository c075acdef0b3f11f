"""The same training on 1 and 2 ranks, at every ZeRO stage, against a loop in plain PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from cook.evaluation.equality import largest_difference
from cook.export.pruned_folder import mask_model
from cook.families.cpm_ant import ADAPTER
from cook.families.source import load_model
from cook.pruning.family import ModelSource
from cook.pruning.reshape import kept_units, reshaped
from cook.training.checkpoint import stored_weights
from tests.recipe.tiny_run import run_on_ranks
from tests.training import tiny_training as tiny

STAGES = {1: (0, 3), 2: (0, 1, 2, 3)}
"""ZeRO stages by ranks: on one rank there is nothing to share out."""
SPLITS = {"whole": {}, "checkpointing": {"activation_checkpointing": True}}
"""Beside these every case is also cut into micro-batches of a single row."""

# fp32: the sums of 4 rows are taken in another order; AdamW divides by the gradient's own size, so an error of 1e-7 in
# a gradient near 0 is one of up to 1e-4 steps in the weight. Measured: 2e-7, 7e-6, 4e-6.
LOSS, WEIGHT, GATE = 1e-5, 1e-4, 1e-4
# bf16 has 8 bits: a gate whose gradient is small against the noise of 2^-8 wanders. Over 6 steps of up to 0.5,
# measured: 0.47 at most and 0.02 in the median against fp32; between ZeRO stages and ranks that take the same
# micro-batches only the order of sums differs.
HALF_MEDIAN, HALF_MOST, HALF_SAME = 0.08, 1.0, 0.05


def cases(ranks: int) -> dict[str, Any]:
    share = tiny.ROWS // ranks
    made: dict[str, Any] = {}
    for zero in STAGES[ranks]:
        for split, training in SPLITS.items():
            for micro in (share, 1):
                own = {**training, "micro_batch_size": micro}
                name = f"fp32 {zero} {split} {micro}"
                made[name] = {"zero": zero, "training": own, "save": f"saved {name}"}
                if micro == 1 and zero:  # in half precision stage 0 becomes stage 1
                    name, half = f"bf16 {zero} {split}", {**own, "precision": "bf16"}
                    made[name] = {"zero": zero, "training": half, "save": f"saved {name}"}
        own = {"micro_batch_size": share}
        if zero in (0, 3):
            made[f"fresh {zero}"] = {"zero": zero, "fresh": True, "training": own}
            unclipped = {**own, "clip": 0.0}
            made[f"unclipped {zero}"] = {"zero": zero, "gated": False, "training": unclipped}
            made[f"wrong_shape {zero}"] = {"zero": zero, "wrong_shape": True, "training": own}
        for precision in ("fp32", "bf16") if zero else ("fp32",):
            # A scheduler of the user's would raise the learning rate that must stay 0.
            scheduler = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.1}}
            frozen = {**own, "precision": precision, "train_weights": False}
            made[f"frozen {precision} {zero}"] = {
                "zero": zero,
                "training": frozen,
                "deepspeed": {"scheduler": scheduler},
            }
            bad = {"zero": zero, "training": {**own, "precision": precision}, "gated": False}
            last = ranks - 1
            made[f"nan_loss {precision} {zero}"] = bad | {"nan_loss": last, "gated": True}
            made[f"inf_gradient {precision} {zero}"] = bad | {"inf_gradient": last}
            if precision == "bf16" or not zero:
                # DeepSpeed skips this on its own at some stages only.
                loose = {"training": {**bad["training"], "clip": 0.0}}
                loose |= {"deepspeed": {"bf16": {"check_grad_overflow": False}}} if zero else {}
                made[f"inf_gradient unclipped {precision} {zero}"] = bad | {"inf_gradient": last} | loose
            if (precision, zero) == ("fp32", 3):
                offloaded = {"zero": 3, "deepspeed": {"zero_optimization": {"offload_param": {"device": "cpu"}}}}
                made["frozen fp32 3 offloaded"] = {**offloaded, "training": frozen}
                made["fp32 3 offloaded"] = {**offloaded, "training": own, "save": "saved fp32 3 offloaded"}
        whole = {"zero": zero, "training": own}
        made[f"spike skipped {zero}"] = whole | {"huge_gradient": ranks - 1, "limits": {"3": {"norm": 100.0}}}
        if (ranks, zero) in ((1, 0), (2, 2)):
            made[f"loss skipped {zero}"] = whole | {"limits": {"3": {"loss": 0.5}}}
            made[f"gates' gradient {zero}"] = whole | {"inf_gradient": ranks - 1}
        if (ranks, zero) in ((1, 0), (2, 2), (2, 3)):
            warming = {"type": "WarmupLR", "params": {"warmup_max_lr": 0.02, "warmup_type": "linear"}}
            warming["params"]["warmup_num_steps"] = 10
            made[f"scheduled {zero}"] = whole | {
                "nan_loss": ranks - 1,
                "at": [3, 4],
                "gated": False,
                "deepspeed": {"scheduler": warming},
            }
    for zero in (0, 3):
        masked = {"zero": zero, "masked": True, "gated": False, "training": {"micro_batch_size": share}}
        made[f"masked {zero}"], made[f"scrambled {zero}"] = masked, masked | {"scrambled": True}
    return made


def launch(ranks: int, folder: Path) -> list[dict[str, Any]]:
    """Results of all cases, by rank."""
    return run_on_ranks(tiny.__file__, cases(ranks), folder, ranks)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {ranks: tmp_path_factory.mktemp(f"ranks{ranks}") for ranks in (1, 2)}


@pytest.fixture(scope="module")
def results(folders: dict[int, Path]) -> dict[int, list[dict[str, Any]]]:
    return {ranks: launch(ranks, folder) for ranks, folder in folders.items()}


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return tiny.plain_run(tiny.TRAINING)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def named(results: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found = [(name, result) for name, result in results.items() if name.startswith(prefix)]
    assert found, prefix
    return found


def test_the_rows_differ_in_their_number_of_targets_and_so_do_the_ranks_shares():
    batches = tiny.Batches()
    counts = [[int((batches.row(4 * s + i)["targets"] != -100).sum()) for i in range(4)] for s in range(tiny.STEPS)]
    assert all(len(set(row)) > 1 for row in counts) and any(row[0] + row[1] != row[2] + row[3] for row in counts)
    assert [sum(row) for row in counts] == [batches.num_targets(step) for step in range(tiny.STEPS)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_fp32_training_is_that_of_plain_pytorch(results, plain, ranks):
    gate = plain["gates"]["values"]
    assert float(gate.std()) > 0.5, "a test of gates that all move alike could not fail"
    for rank_results in results[ranks]:
        for name, result in named(rank_results, "fp32"):
            assert not result["problems"]
            assert result["losses"] == pytest.approx(plain["losses"], rel=LOSS), name
            assert result["norms"] == pytest.approx(plain["norms"], rel=1e-4), name
            assert distance(result["weights"], plain["weights"]) < WEIGHT, name
            assert float((result["gates"]["values"] - gate).abs().max()) < GATE, name
            # Adam forgets the gradient's scale; the prices of sparsity and the moments do not.
            for key in ("multipliers", "moment", "second_moment"):
                torch.testing.assert_close(result["gates"][key], plain["gates"][key], rtol=1e-3, atol=1e-7, msg=name)


def test_all_ranks_hold_the_same(results):
    first, second = results[2]
    for name in first:
        assert first[name].get("error") == second[name].get("error"), name
        assert first[name].get("problems") == second[name].get("problems"), name
        if first[name].get("gates"):
            assert str(first[name]["losses"]) == str(second[name]["losses"]), name  # NaN is not equal to NaN
            assert torch.equal(first[name]["gates"]["values"], second[name]["gates"]["values"]), name
            assert distance(first[name]["weights"], second[name]["weights"]) == 0, name


def test_bf16_gates_follow_fp32_and_agree_among_stages_and_ranks(results, plain):
    one = dict(named(results[1][0], "bf16"))
    for name, result in [*one.items(), *named(results[2][0], "bf16")]:
        error = (result["gates"]["values"] - plain["gates"]["values"]).abs()
        assert float(error.median()) < HALF_MEDIAN and float(error.max()) < HALF_MOST, name
        assert result["losses"] == pytest.approx(plain["losses"], rel=0.02), name
        same = (result["gates"]["values"] - one["bf16 3 whole"]["gates"]["values"]).abs()
        assert float(same.max()) < HALF_SAME, (name, float(same.max()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_of_any_stage_holds_the_full_weights(results, folders, ranks):
    for name, result in [*named(results[ranks][0], "fp32"), *named(results[ranks][0], "bf16")]:
        assert distance(dict(stored_weights(folders[ranks] / f"saved {name}")), result["weights"]) == 0, name


def test_loaded_weights_keep_what_bf16_cannot_hold(results):
    for ranks, ranked in results.items():
        for name, result in [*named(ranked[0], "bf16"), *named(ranked[0], "fp32")]:
            assert distance(result["start"], tiny.weights()) == 0, (ranks, name)


def test_fresh_weights_and_their_training_do_not_depend_on_ranks_or_stage(results):
    reference = results[1][0]["fresh 0"]
    assert distance(reference["start"], tiny.build().state_dict()) == 0
    for ranks in (1, 2):
        for zero in (0, 3):
            result = results[ranks][0][f"fresh {zero}"]
            assert distance(result["start"], reference["start"]) == 0
            assert distance(result["weights"], reference["weights"]) < WEIGHT
            assert result["losses"] == pytest.approx(reference["losses"], rel=LOSS)


@pytest.mark.parametrize("ranks", [1, 2])
def test_without_train_weights_only_gates_move(results, ranks):
    start = tiny.make_gates().values
    for name, result in named(results[ranks][0], "frozen"):
        assert distance(result["weights"], tiny.weights()) == 0, name
        assert float((result["gates"]["values"] - start).abs().min()) > 0, name
    frozen = tiny.plain_run(tiny.dataclasses.replace(tiny.TRAINING, train_weights=False))
    for name, result in named(results[ranks][0], "frozen fp32"):
        assert float((result["gates"]["values"] - frozen["gates"]["values"]).abs().max()) < GATE, name


def test_no_clipping_is_no_clipping(results):
    plain = tiny.plain_run(tiny.dataclasses.replace(tiny.TRAINING, clip=0.0), gated=False)
    assert max(plain["norms"]) > tiny.TRAINING.clip
    for ranks in (1, 2):
        for name, result in named(results[ranks][0], "unclipped"):
            assert distance(result["weights"], plain["weights"]) < WEIGHT, name


@pytest.fixture(scope="module")
def skipping() -> dict[bool, dict[str, Any]]:
    """What plain training gives without the update of step 3, gated or not."""
    return {gated: tiny.plain_run(tiny.TRAINING, gated=gated, skipped=(3,)) for gated in (False, True)}


def same_as_skipping(name: str, result: dict[str, Any], plain: dict[str, Any]) -> None:
    assert distance(result["weights"], plain["weights"]) < WEIGHT, name
    assert result["losses"][3:] == pytest.approx(plain["losses"][3:], rel=LOSS), name
    for key in ("values", "multipliers", "moment", "second_moment", "steps") if result["gates"] else ():
        torch.testing.assert_close(result["gates"][key], plain["gates"][key], rtol=1e-3, atol=GATE, msg=name)


BAD = {
    "nan_loss": "the loss on rank {last} is not finite",
    "inf_gradient": "the gradient of the weights is not finite",
    "gates' gradient": "the gradient of a gate is not finite",
    "loss skipped": "the loss {loss:.4g} is above 0.5",
}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("fault", BAD)
def test_a_bad_step_updates_nothing_on_any_rank_and_moves_no_schedule(results, plain, skipping, ranks, fault):
    said = BAD[fault].format(last=ranks - 1, loss=plain["losses"][2])
    for rank_results in results[ranks]:
        for name, result in named(rank_results, fault):
            assert result["problems"] == {3: said}, name
            assert all(torch.isfinite(tensor).all() for tensor in result["weights"].values()), name
            assert not result["gates"] or int(result["gates"]["steps"]) == tiny.STEPS - 1, name
            rates = [tiny.learning_rate(tiny.TRAINING, update) for update in (1, 2, 3, 3, 4, 5)]
            assert result["rates"] == pytest.approx(rates), name
            if "bf16" not in name and "unclipped" not in name:
                same_as_skipping(name, result, skipping[bool(result["gates"])])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_spike_of_the_gradient_is_seen_before_it_is_applied(results, skipping, ranks):
    for rank_results in results[ranks]:
        for name, result in named(rank_results, "spike skipped"):
            assert list(result["problems"]) == [3] and "the gradient's norm" in result["problems"][3], name
            assert result["norms"][2] > 1e5 and f"{result['norms'][2]:.4g} is above 100" in result["problems"][3], name
            same_as_skipping(name, result, skipping[True])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_schedule_of_deepspeeds_stands_still_too(results, ranks):
    for name, result in named(results[ranks][0], "scheduled"):
        assert list(result["problems"]) == [3, 4]
        changed = [after != before for before, after in zip(result["rates"], result["rates"][1:], strict=False)]
        assert changed == [True, False, False, True, True], (name, result["rates"])


@pytest.mark.parametrize("ranks", [1, 2])
def test_weights_of_another_shape_are_refused_on_every_rank(results, ranks):
    for rank_results in results[ranks]:
        for name, result in named(rank_results, "wrong_shape"):
            assert "encoder.output_layernorm.weight has another shape" in result["error"], name


@pytest.mark.parametrize("ranks", [1, 2])
def test_pruned_units_stay_dead_and_masked_equals_reshaped_after_finetuning(results, ranks):
    space, masks = ADAPTER.space(tiny.CONFIG), tiny.fixed_masks()
    plain = tiny.plain_run(tiny.TRAINING, gated=False, masked=True)
    for zero in (0, 3):
        result, scrambled = (results[ranks][0][f"{kind} {zero}"] for kind in ("masked", "scrambled"))
        assert distance(result["weights"], plain["weights"]) < WEIGHT
        assert result["losses"] == scrambled["losses"] and result["norms"] == scrambled["norms"]
        assert distance(result["weights"], scrambled["weights"]) > 1, "the scrambling did nothing"
        tensors = dict(reshaped(result["weights"], space, masks))
        for name, tensor in reshaped(scrambled["weights"], space, masks).items():
            assert torch.equal(tensor, tensors[name]), name
        small_config = ADAPTER.shrink(tiny.CONFIG, space, kept_units(space, masks)).config
        small = load_model(ModelSource(adapter=ADAPTER, config=small_config, tensors=tensors, path=Path()))
        whole = ModelSource(adapter=ADAPTER, config=dict(tiny.CONFIG), tensors=result["weights"], path=Path())
        masked = load_model(whole)
        mask_model(masked, space, masks)
        assert largest_difference(masked, small, [tiny.Batches().rows(range(6))]) <= 1e-5
