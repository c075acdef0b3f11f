"""Further encoders under their heads, from folders that transformers saved."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING

from cook.export.pruned_folder import mask_model, prune_to_folder, reshaped_source
from cook.families.source import load_model, open_model
from tests.families.tiny_models import EXACT, difference, some
from tests.tiny_families import IDS as SPECIAL
from tests.tiny_families import MORE_ENCODERS, SIZES, draw_weights
from tests.tiny_pruning import random_masks

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS).index_fill(1, torch.tensor([7, 8]), 0)
HEADS = ("AutoModelForMaskedLM", "AutoModelForSequenceClassification", "AutoModel")
CASES = [(name, head) for name in MORE_ENCODERS for head in HEADS] + [("electra", "AutoModelForPreTraining")]


def written(name, head, folder):
    fields = {k: v for k, v in {**SIZES, **SPECIAL, **MORE_ENCODERS[name]}.items() if v is not None}
    fields |= {} if "n_layers" in fields else {"intermediate_size": 20}
    config = CONFIG_MAPPING[fields.pop("model_type")](**fields)
    model = draw_weights(getattr(transformers, head).from_config(config, dtype=torch.float32)).eval()
    model.save_pretrained(folder)
    return model, open_model(folder)


@torch.no_grad()
def outputs(model):
    found = model(input_ids=IDS, attention_mask=PADDED)
    values = found.logits if "logits" in found else found.last_hidden_state
    # The padding's own answers say nothing.
    return values[PADDED.bool()] if values.shape[:2] == IDS.shape else values


def some_dims(space):
    return {"hidden": some(space.hidden.size, space.hidden.size - 12)}


@pytest.mark.parametrize(("name", "head"), CASES)
def test_masked_and_reshaped_are_equal_and_load_under_their_head(name, head, tmp_path):
    model, source = written(name, head, tmp_path / "model")
    space = source.adapter.space(source.config)
    for seed in (0, 1):
        masks = random_masks(space, seed, blocks=0.8) | (some_dims(space) if space.hidden and seed else {})
        small = load_model(reshaped_source(source, space, masks))
        attached = mask_model(model, space, masks)
        assert difference(outputs(model), outputs(small)) <= EXACT
        attached.remove()
    attached = mask_model(model, space, masks)
    pruned = prune_to_folder(source, space, masks, tmp_path / "small")
    loaded, report = getattr(transformers, head).from_pretrained(
        tmp_path / "small", trust_remote_code=pruned.needs_remote_code, output_loading_info=True
    )
    assert pruned.needs_remote_code and not any(report.values())
    assert difference(outputs(model), outputs(loaded)) <= EXACT


@pytest.mark.parametrize("name", MORE_ENCODERS)
def test_fewer_dims_need_no_remote_code(name, tmp_path):
    model, source = written(name, HEADS[0], tmp_path / "model")
    space = source.adapter.space(source.config)
    masks = {g.name: ((torch.arange(g.size) + g.layer) % 2).float() for g in space.of("dimff")}
    assert not prune_to_folder(source, space, masks, tmp_path / "small").needs_remote_code
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "small")
    mask_model(model, space, masks)
    assert difference(outputs(model), outputs(loaded)) <= EXACT


@pytest.mark.parametrize("gone", [0, 1])
def test_the_first_layer_of_modernbert_stays(gone, tmp_path):
    """It has no norm before attention, and so no other layer can take its place."""
    model, source = written("modernbert", HEADS[0], tmp_path)
    space = source.adapter.space(source.config)
    masks = {g.name: torch.tensor([float(g.layer != gone)]) for g in space.of("layer")}
    small = reshaped_source(source, space, masks)
    assert small.config["num_hidden_layers"] == (3 if gone == 0 else 2)
    assert (source.adapter.modeling(small.config) is None) == (gone == 1)
    reshaped = load_model(small)
    mask_model(model, space, masks)
    assert difference(outputs(model), outputs(reshaped)) <= EXACT


def test_the_hidden_size_stays_where_positions_are_relative(tmp_path):
    for number, name in enumerate(n for n in MORE_ENCODERS if n.startswith("deberta")):
        _, source = written(name, HEADS[0], tmp_path / str(number))
        assert (source.adapter.space(source.config).hidden is None) == bool(source.config["relative_attention"])
