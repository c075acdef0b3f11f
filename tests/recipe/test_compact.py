"""Stages with fixed masks train the smaller model: the same steps as the masked model, in fewer operations."""

from __future__ import annotations

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from cook.distill.taps import read_pair
from cook.families import cpm_ant
from cook.families.source import open_model, unfilled_model, without_units
from cook.pruning.attach import AttachedGates
from cook.pruning.counts import parameters
from cook.pruning.mask_set import consistent
from cook.pruning.reshape import reshaped
from cook.recipe.compact import cut_inputs, whole_weights, without_masked_units
from cook.recipe.distillation import DistillationPlan
from cook.recipe.inputs import Inputs
from tests.recipe.tiny_run import MODEL, train
from tests.tiny_families import CAUSAL, FAMILIES, tiny_source
from tests.tiny_pruning import random_masks

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def inputs_of(source, fixed, head_unit):
    space = source.adapter.space(source.config, head_unit)
    return Inputs(
        adapter=source.adapter,
        model_config=source.config,
        weights={name: source.tensors[name] for name in space.shapes if name in source.tensors},
        origin="memory",
        folder=None,
        head_unit=head_unit,
        space=space,
        fixed=fixed,
        learned=(),
    )


def masks_for(space, case):
    """Masks with cut blocks, with one layer removed as a whole, with FFN dimensions alone, and with hidden ones."""
    masks = random_masks(space, case, blocks=0.8)
    for group in space.groups:
        if case == 1 and group.layer == 1 and group.kind == "layer":
            masks[group.name] = torch.zeros(1)
        if case == 2 and group.kind != "dimff":
            masks[group.name] = torch.ones(group.size)
    if case == 3:
        masks["hidden"] = (torch.arange(space.hidden.size) % 3 > 0).float()
    return consistent(space, masks)


def loss_and_gradients(model, batch_inputs):
    logits = model(**batch_inputs)[0]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), IDS.flatten())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("name", FAMILIES)
def test_the_smaller_model_has_the_masked_models_loss_and_gradients(name, case):
    source = tiny_source(name)
    for head_unit in source.adapter.head_units(source.config):
        masks = masks_for(source.adapter.space(source.config, head_unit), case)
        whole = inputs_of(source, masks, head_unit)
        small = cut_inputs(whole)
        models = [unfilled_model(source.adapter, inputs.model_config).double().eval() for inputs in (whole, small)]
        for model, inputs in zip(models, (whole, small), strict=True):
            for path, weight in model.named_parameters():
                weight.data = inputs.weights[path].detach().double().clone()
        AttachedGates(models[0], [g for g in whole.space.every if g.name in masks], masks)
        batch = {"input_ids": IDS}
        (loss, wanted), (got_loss, got) = (loss_and_gradients(model, batch) for model in models)
        # fp64: sums in another order. RMSNorms of transformers round other inputs to fp32.
        torch.testing.assert_close(got_loss, loss, rtol=1e-7 if case == 3 else 1e-10, atol=0)
        assert sum(p.numel() for p in models[1].parameters()) < sum(p.numel() for p in models[0].parameters())
        zeros = {path: torch.zeros_like(weight) for path, weight in models[0].named_parameters()}
        put_back = dict(whole_weights(got.items(), inputs_of_zeros(whole, zeros), torch.float64))
        scale, tolerance = max(gradient.abs().max() for gradient in wanted.values()), 5e-6 if case == 3 else 1e-7
        # Gemma's embedding is rescaled, so that its gradient is too.
        rescaled = {piece.path for piece in whole.space.hidden.slices if piece.power} if case == 3 else ()
        for path in wanted.keys() & rescaled:
            assert put_back[path].ne(0).any()
        for path, gradient in wanted.items():  # Gemma's norms compute in fp32 also in a model in fp64
            if path in rescaled:
                continue
            torch.testing.assert_close(put_back.get(path, zeros[path]), gradient, rtol=0, atol=float(tolerance * scale))


def inputs_of_zeros(whole, zeros):
    """The whole model with weights of zero, into which gradients can be put back."""
    return dataclasses.replace(whole, weights=zeros)


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("name", CAUSAL)
def test_a_checkpoint_of_the_smaller_model_is_read_as_the_whole_model(name, case, tmp_path):
    source = tiny_source(name)
    for head_unit in source.adapter.head_units(source.config):
        space = source.adapter.space(source.config, head_unit)
        masks = masks_for(space, case)
        small = cut_inputs(inputs_of(source, masks, head_unit)).weights
        (tmp_path / "latest").write_text("engine")
        (tmp_path / "config.json").write_text(json.dumps(without_units(source.config, head_unit, masks)))
        stored = {path: small[path].detach() for path in small}
        read = open_model(tmp_path, read_checkpoint=lambda _, stored=stored: stored).tensors
        assert {path: tuple(read[path].shape) for path in space.shapes if path in read} == {
            path: shape for path, shape in space.shapes.items() if path in source.tensors
        }
        again = reshaped({path: read[path] for path in space.shapes if path in read}, with_shapes(space, read), masks)
        assert {path for path in again if path in stored} == set(stored)
        assert all(torch.equal(again[path], stored[path]) for path in stored)


def with_shapes(space, tensors):
    """A space without the second names of tied weights, which a model in memory does not list."""
    shapes = {path: shape for path, shape in space.shapes.items() if path in tensors}
    return dataclasses.replace(space, shapes=shapes)


P = "model.layers.0."


@pytest.mark.parametrize(
    ("place", "fixed"),
    [
        (f"[post]{P}self_attn", "layers.0.att"),
        (f"[post]{P}self_attn", "layers.0.heads"),
        (f"[post]{P}self_attn.o_proj", "layers.0.heads"),
        (f"[post]{P}input_layernorm", "layers.0.heads"),
        (f"[pre]{P}mlp.down_proj", "layers.0.dimff"),
    ],
)
def test_a_teacher_that_is_compared_inside_a_removed_block_keeps_the_whole_model(place, fixed, capsys):
    source = tiny_source("llama")
    sizes = {group.name: group.size for group in source.adapter.space(source.config).groups}
    mask = torch.zeros(sizes[fixed])
    mask[: 5 if fixed.endswith("dimff") else 0] = 1
    inputs = inputs_of(source, {fixed: mask}, "kv_group")
    training, options = SimpleNamespace(remove_masked=True), SimpleNamespace(teacher="dense")
    stage = SimpleNamespace(name="ffn_finetune", config=SimpleNamespace(training=training), adapted=True)
    plan = DistillationPlan(options=options, source=None, hidden=(read_pair(f"{place}:{place}"),), attention=())
    assert without_masked_units(stage, inputs, plan) is inputs
    assert "trains the whole model with masks applied, since" in capsys.readouterr().out
    output = DistillationPlan(
        options=options, source=None, hidden=(read_pair(f"[post]{P[:-1]}:[post]{P[:-1]}"),), attention=()
    )
    assert without_masked_units(stage, inputs, output) is not inputs


@pytest.fixture(scope="module")
def masked(att_first, tmp_path_factory):
    """The same run from its second stage on, trained as the whole model with masks applied."""
    folder = tmp_path_factory.mktemp("masked")
    shutil.copytree(att_first.folder, folder, dirs_exist_ok=True)
    for stage in att_first.stages[2:]:
        shutil.rmtree(folder / "out" / stage)
    result = train(folder, "--stage", "all", "--set", "training.remove_masked=false")
    assert result.code == 0, result
    return folder


def test_a_recipe_trains_the_same_models_and_masks(att_first, masked):
    space = cpm_ant.ADAPTER.space(MODEL)
    for stage in att_first.stages[2:]:
        small, whole = (json.loads((f / "out" / stage / "done.json").read_text()) for f in (att_first.folder, masked))
        assert small["structure"] == whole["structure"] and small["parameters"] == whole["parameters"]
        # fp32: rounding of sums in another order, over at most 36 steps of AdamW.
        assert small["held_out_loss"] == pytest.approx(whole["held_out_loss"], rel=1e-4)
        got, wanted = (dict(open_model(f / "out" / stage / "model").tensors) for f in (att_first.folder, masked))
        assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in wanted.items()} == dict(space.shapes)
    for name in ("layer", "heads", "dimff"):
        files = (f / "out" / "masks" / f"{name}.pt" for f in (att_first.folder, masked))
        got, wanted = (torch.load(file, weights_only=True) for file in files)
        assert all(torch.equal(got[key], wanted[key]) for key in wanted)


def test_the_engine_holds_only_the_units_that_are_left(att_first, masked):
    space = cpm_ant.ADAPTER.space(MODEL)
    for folder, smaller in ((att_first.folder, True), (masked, False)):
        states = next((folder / "out" / "ffn_finetune" / "checkpoints").glob("step-*/*/mp_rank_00_model_states.pt"))
        weights = torch.load(states, weights_only=False)["module"]
        held = sum(weights[name].numel() for name in space.shapes if name in weights)
        done = json.loads((folder / "out" / "ffn_finetune" / "done.json").read_text())
        assert held == (done["parameters"] if smaller else parameters(space))


@pytest.mark.parametrize("zero", [0, 3])
def test_two_ranks_train_the_smaller_model_as_one_does(att_first, tmp_path, zero):
    shutil.copytree(att_first.folder, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "out" / "ffn_finetune")
    changes = (f"deepspeed.zero_optimization.stage={zero}", "training.activation_checkpointing=true")
    options = [part for change in changes for part in ("--set", change)]
    result = train(tmp_path, "--stage", "ffn_finetune", *options, ranks=2)
    assert result.code == 0, result
    folders = (tmp_path, att_first.folder)
    got, wanted = (json.loads((f / "out" / "ffn_finetune" / "done.json").read_text()) for f in folders)
    assert got["held_out_loss"] == pytest.approx(wanted["held_out_loss"], rel=1e-4)
