"""Pruned weights under real engines on 1 and 2 ranks at every ZeRO stage, against masked training in plain PyTorch.

Rotary frequencies stay exact under every engine: bf16 would put distant tokens at wrong angles.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from cook.training.zero import HeldZeros, reserve_state
from tests.recipe.tiny_run import REPOSITORY, run, run_on_ranks
from tests.training import tiny_held, tiny_training

STAGES = {1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}
RESUMED = (("fp32", 0), ("bf16", 2), ("bf16", 3))


def cases(ranks: int) -> dict[str, Any]:
    share, made = tiny_training.ROWS // ranks, {}
    for zero in STAGES[ranks]:
        for precision in ("fp32", "bf16") if zero else ("fp32",):
            one = {"zero": zero, "precision": precision, "micro": share}
            if precision == "fp32":
                made[f"start {precision} {zero}"] = {**one, "from_start": True, "micro": 1}
            made[f"stale {precision} {zero}"] = one
            if (precision, zero) in RESUMED:
                half = {**one, "from_start": True}
                made[f"first half {precision} {zero}"] = {**half, "last": 3, "save": f"half {precision} {zero}"}
                made[f"second half {precision} {zero}"] = {**half, "first": 4, "load": f"half {precision} {zero}"}
    made["drifting fp32 0"] = {"zero": 0, "precision": "fp32", "micro": share, "from_start": True, "drifting": True}
    return made


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    found = {}
    for ranks in STAGES:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        found[ranks] = run_on_ranks(tiny_held.__file__, cases(ranks), folder, ranks)
    return found


def plain(masks_from: int) -> dict[str, Any]:
    """Masked training in plain PyTorch, the whole batch at once; masks come before step `masks_from`."""
    model, masks = tiny_training.build(), tiny_held.masks()
    model.load_state_dict(tiny_training.weights())
    training = tiny_held.TRAINING
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=training.weight_decay)
    first, norms = {}, []
    for step in range(1, tiny_training.STEPS + 1):
        rows = tiny_training.ROWS
        batch = tiny_training.Batches().rows(range((step - 1) * rows, step * rows))
        targets = batch.pop("targets")
        held = masks if step >= masks_from else {}
        for name, parameter in model.named_parameters():
            if step == masks_from and name in masks:
                values = [parameter.data, *(v for v in optimizer.state[parameter].values() if v.dim())]
                for value in values:
                    value *= masks[name]
        loss = F.cross_entropy(model(**batch).logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in model.named_parameters():
            if name in held:
                parameter.grad *= held[name]
        first = first or {name: p.grad.clone() for name, p in model.named_parameters() if name in masks}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), training.clip)))
        optimizer.step()
    return {"weights": {n: p.detach().clone() for n, p in model.named_parameters()}, "gradients": first, "norms": norms}


def each(results: dict[int, list[dict[str, Any]]], prefix: str) -> list[tuple[str, Any]]:
    found = [
        (f"{name} on rank {rank} of {ranks}", case)
        for ranks, ranked in results.items()
        for rank, of_rank in enumerate(ranked)
        for name, case in of_rank.items()
        if name.startswith(prefix)
    ]
    assert found, prefix
    return found


@pytest.mark.parametrize("kind", ["start", "stale", "first half", "second half"])
def test_pruned_entries_are_exactly_zero(results, kind):
    masks = tiny_held.masks()
    for name, result in each(results, kind):
        for path, mask in masks.items():
            assert (result["weights"][path][~mask] == 0).all() and (result["moments"][path][~mask] == 0).all(), name
            assert result["weights"][path][mask].abs().min() > 0, name
            if path in result["working"] and result["working"][path].shape == mask.shape:
                assert (result["working"][path][~mask] == 0).all(), name


@pytest.mark.parametrize(("kind", "masks_from"), [("start", 1), ("stale", 1 + tiny_held.STALE)])
def test_the_rest_trains_as_in_plain_pytorch(results, kind, masks_from):
    wanted = plain(masks_from)
    for name, result in each(results, f"{kind} fp32"):
        # The tolerances of test_engine_and_step.py, for the same reasons: sums in another order, divided by their size.
        assert result["norms"] == pytest.approx(wanted["norms"], rel=1e-4), name
        for path, tensor in wanted["weights"].items():
            assert float((result["weights"][path] - tensor).abs().max()) < 1e-4, (name, path)


def test_gradients_are_read_whole_averaged_and_unclipped(results):
    wanted = plain(1 + tiny_held.STALE)["gradients"]
    for name, result in each(results, "stale fp32"):
        for path, gradient in wanted.items():
            torch.testing.assert_close(result["gradients"][path], gradient, rtol=1e-4, atol=1e-6, msg=f"{name} {path}")
    masks = tiny_held.masks()
    for name, result in each(results, "start"):
        assert all((result["gradients"][path][~mask] == 0).all() for path, mask in masks.items()), name


def test_resumed_training_is_the_uninterrupted_one(results):
    for ranks in STAGES:
        for precision, zero in RESUMED:
            resumed = results[ranks][0][f"second half {precision} {zero}"]["weights"]
            for path, mask in tiny_held.masks().items():
                assert (resumed[path][~mask] == 0).all()
                start = tiny_training.weights()[path]
                assert float((resumed[path] - start * mask).abs().max()) > 0.05, "six steps move further than three"


def test_the_quirk_of_drifting_weights(results):
    masks = tiny_held.masks()
    for name, result in each(results, "drifting"):
        for path, mask in masks.items():
            start = tiny_training.weights()[path][~mask]
            factor = (1 - 0.02 * tiny_held.TRAINING.weight_decay) ** tiny_training.STEPS
            # Decayed by nothing but the decoupled weight decay: their gradients and moments are 0.
            torch.testing.assert_close(result["weights"][path][~mask], start * factor, rtol=1e-5, atol=0, msg=name)


class Restless(torch.optim.SGD):
    """Moves even what has no gradient, as optimizers do that mix a matrix's entries."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += 1.0


def test_an_optimizer_that_moves_zeros_is_undone():
    layer = torch.nn.Linear(4, 3)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) > 0.5

    def whole(parameter: torch.nn.Parameter, *, modified: bool = False) -> Any:
        import contextlib

        return contextlib.nullcontext()

    for kind, expected in ((Restless, True), (torch.optim.AdamW, False)):
        optimizer = kind(layer.parameters(), lr=0.1)
        held = HeldZeros(dict(layer.named_parameters()), {"weight": mask}, optimizer, whole)
        assert held.can_be_left is expected
        layer(torch.ones(4)).sum().backward()
        optimizer.step()
        held.restore()
        assert torch.equal(layer.weight != 0, mask)


def test_a_mask_of_something_else_is_our_mistake():
    layer = torch.nn.Linear(4, 3)
    with pytest.raises(AssertionError, match="lacks"):
        HeldZeros(dict(layer.named_parameters()), {"x": torch.ones(1)}, None, None)
    with pytest.raises(AssertionError, match="shape"):
        HeldZeros(dict(layer.named_parameters()), {"weight": torch.ones(4, 3)}, None, None)


SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from cook.families.source import unfilled_model
from cook.config.types import TrainingConfig
from cook.training.engine import Engine, initialise_processes
from tests.tiny_families import tiny_source

initialise_processes(1)
source = tiny_source("gemma3")
wanted = {n: b for n, b in source.adapter.build(source.config).named_buffers() if b.is_floating_point()}
assert wanted and any((b != b.bfloat16().float()).any() for b in wanted.values())
training = TrainingConfig(
    steps=1, train_batch_size=1, micro_batch_size=1, learning_rate=0.1, precision="bf16", threads=1
)
for stage in (0, 2, 3):
    engine = Engine(
        lambda: unfilled_model(source.adapter, source.config), {n: t.detach() for n, t in source.tensors.items()},
        training, {"zero_optimization": {"stage": stage}},
    )
    found = dict(engine.module.named_buffers())
    assert all(torch.equal(found[name], buffer) for name, buffer in wanted.items()), stage
    assert next(engine.module.parameters()).dtype == torch.bfloat16
    engine.close()
print("exact")
"""


def test_buffers_are_not_rounded_with_the_weights(tmp_path: Path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run([sys.executable, "script.py", str(REPOSITORY)], tmp_path)
    assert done.code == 0 and "exact" in done.out, done


@pytest.mark.parametrize(("options", "place"), [({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({}, "cpu")])
def test_fused_optimizers_count_steps_where_the_weights_are(options, place):
    """A checkpoint's counters are read to the CPU; PyTorch's fused kernels refuse them there."""
    weight = torch.nn.Parameter(torch.empty(3, device="meta"))
    optimizer = SimpleNamespace(param_groups=[{"params": [weight], **options}], state={})
    reserve_state(optimizer, 0, [weight], {"step": torch.tensor(7.0)}, ["exp_avg"])
    assert optimizer.state[weight]["step"].device.type == place and optimizer.state[weight]["exp_avg"].is_meta
    assert place == "meta" or optimizer.state[weight]["step"] == 7
