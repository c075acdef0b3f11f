from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cook.evaluation.equality import difference, largest_difference, masked_model, written_model, zero_units
from cook.export.model_folder import write_model_folder
from cook.export.pruned_folder import mask_model, prune_to_folder
from cook.families.source import load_model, open_model
from cook.pruning.family import Stored
from tests.models.cpm_ant_tiny import random_batch, tiny_model
from tests.tiny_families import FAMILIES, tiny_source
from tests.tiny_pruning import random_masks
from tests.tiny_pruning import tiny_source as tiny_cpm_ant


def fake(*logits):
    """A model whose answers are given."""
    answers = iter(logits)
    return lambda **_: SimpleNamespace(logits=next(answers))


def compare(first, second, batches=({},)):
    return largest_difference(fake(*first), fake(*second), batches)


def test_the_largest_difference_over_the_largest_logit():
    a, b = torch.tensor([[[1.0, -4.0]]]), torch.tensor([[[1.5, -4.0]]])
    assert compare([a], [b]) == 0.125 and compare([a], [a]) == 0
    assert compare([a, 10 * a], [b, 10 * a], [{}, {}]) == pytest.approx(0.5 / 40)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["first", "second", "both"])
def test_what_is_not_finite_is_never_equal(bad, where):
    good, broken = torch.ones(1, 2, 3), torch.ones(1, 2, 3)
    broken[0, 0, 0] = bad
    first, second = (broken if where in (name, "both") else good for name in ("first", "second"))
    assert compare([first], [second]) == math.inf
    # Also when a good batch comes before or after it.
    assert compare([good, first], [good, second], [{}, {}]) == math.inf
    assert compare([first, good], [second, good], [{}, {}]) == math.inf


def test_all_zero_logits():
    zero, one = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    assert compare([zero], [zero]) == 0 and compare([zero], [one]) == math.inf


def test_padding_does_not_count():
    a, b = torch.ones(2, 3, 4), torch.ones(2, 3, 4)
    b[0, 1:], b[1, 2] = 5, math.nan
    batch = {"length": torch.tensor([1, 2])}
    assert compare([a], [b], [batch]) == 0
    assert compare([a], [b], [{"length": torch.tensor([2, 2])}]) == 4


def test_no_batches_prove_nothing():
    with pytest.raises(AssertionError, match="nothing to compare"):
        compare([], [], [])


def test_real_models():
    first, second = tiny_model(0), tiny_model(0)
    batches = [random_batch(seed, first.config) | {"targets": torch.zeros(3, 17)} for seed in range(2)]
    assert largest_difference(first, second, batches) == 0
    with torch.no_grad():
        second.encoder.layers[1].ffn.ffn.w_out.weight[0, 0] += 0.1
    assert largest_difference(first, second, batches) > 1e-5


IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": IDS}]


def on_disk(name, folder):
    source = tiny_source(name)
    named = type(source.adapter.build(source.config)).__name__
    config = dict(source.config) | {"architectures": [named]}
    write_model_folder(folder, source.adapter, config, source.tensors.items())
    return open_model(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_zeroed_weights_and_closed_gates_are_the_same_model(name):
    source = tiny_source(name)
    space = source.adapter.space(source.config)
    masks = random_masks(space, 3)
    zeroed = load_model(source)
    gated = load_model(dataclasses.replace(source, tensors={n: t.clone() for n, t in source.tensors.items()}))
    mask_model(gated, space, masks)
    zero_units(zeroed, space, masks)
    assert largest_difference(gated, zeroed, BATCHES) <= 1e-5
    untouched = tiny_source(name)
    assert largest_difference(load_model(untouched), zeroed, BATCHES) > 1e-3


def test_transformers_loads_the_model_of_the_folder(tmp_path):
    source = on_disk("llama", tmp_path / "llama")
    space = source.adapter.space(source.config)
    masks = {"layers.1.dimff": (torch.arange(20) < 5).float(), "layers.0.att": torch.zeros(1)}
    model, witness = masked_model(source, space, masks, torch.float32)
    assert type(model) is transformers.LlamaForCausalLM and "LlamaForCausalLM of transformers" in witness
    by_hand = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    by_hand.model.layers[1].mlp.down_proj.weight.data[:, 5:] = 0
    for weight in by_hand.model.layers[0].self_attn.o_proj.parameters():
        weight.data.zero_()
    assert largest_difference(by_hand, model, BATCHES) == 0


def test_the_witness_does_not_rest_on_cooks_reading(tmp_path):
    """A reader that takes another tensor than transformers does is noticed, although reader and writer agree."""
    source = on_disk("llama", tmp_path / "llama")
    space = source.adapter.space(source.config)
    masks = {"layers.1.dimff": (torch.arange(20) < 5).float()}
    wrong = {name: tensor * (0.5 if name == "lm_head.weight" else 1) for name, tensor in source.tensors.items()}
    misread = dataclasses.replace(source, tensors=wrong, stored=Stored({}))
    prune_to_folder(misread, space, masks, tmp_path / "small")
    masked, _ = masked_model(misread, space, masks, torch.float32)
    assert largest_difference(masked, written_model(tmp_path / "small", torch.float32), BATCHES) > 0.4


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "opt", "roberta"])
def test_ragged_results_and_ragged_sources(tmp_path, name):
    source = on_disk(name, tmp_path / "source")
    space = source.adapter.space(source.config)
    masks = random_masks(space, 5, blocks=0.8)
    prune_to_folder(source, space, masks, tmp_path / "small")
    masked, _ = masked_model(source, space, masks, torch.float32)
    assert largest_difference(masked, written_model(tmp_path / "small", torch.float32), BATCHES) <= 1e-5
    again = open_model(tmp_path / "small")
    space = again.adapter.space(again.config)
    masks = {
        group.name: (torch.arange(group.size) < group.size - 1).float() for group in space.of("dimff") if group.size > 1
    }
    prune_to_folder(again, space, masks, tmp_path / "smaller")
    masked, witness = masked_model(again, space, masks, torch.float32)
    assert "RaggedModel" in witness
    assert largest_difference(masked, written_model(tmp_path / "smaller", torch.float32), BATCHES) <= 1e-5


def test_a_family_that_transformers_lacks_is_read_by_cook(tmp_path):
    model, source = tiny_cpm_ant(tmp_path / "source")
    space = source.adapter.space(source.config)
    masks = random_masks(space, 2)
    masked, witness = masked_model(source, space, masks, torch.float32)
    assert "by cook" in witness
    mask_model(model, space, masks)
    batches = [random_batch(1, model.config)]
    assert largest_difference(model, masked, batches) == 0
    prune_to_folder(source, space, masks, tmp_path / "small")
    assert largest_difference(masked, written_model(tmp_path / "small", torch.float32), batches) <= 1e-5


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("bert", "BertModel"),
        ("bert", "BertForQuestionAnswering"),
        ("bert", "BertForMultipleChoice"),
        ("roberta", "RobertaModel"),
    ],
)
def test_encoders_are_compared_by_all_that_they_return(tmp_path, name, architecture):
    source = tiny_source(name, architectures=[architecture])
    write_model_folder(tmp_path / "m", source.adapter, source.config, source.tensors.items())
    source = open_model(tmp_path / "m")
    space = source.adapter.space(source.config)
    masks = random_masks(space, 4, blocks=1)
    prune_to_folder(source, space, masks, tmp_path / "small")
    masked, _ = masked_model(source, space, masks, torch.float32)
    assert largest_difference(masked, written_model(tmp_path / "small", torch.float32), BATCHES) <= 1e-5
    tensors = load_file(tmp_path / "small" / "model.safetensors")
    for path in {"pooler.dense.weight", "qa_outputs.weight", "classifier.weight"} & tensors.keys():
        tensors[path] = tensors[path] * 1.5
    save_file(tensors, tmp_path / "small" / "model.safetensors", metadata={"format": "pt"})
    assert largest_difference(masked, written_model(tmp_path / "small", torch.float32), BATCHES) > 1e-3


def test_answers_of_another_kind_are_no_match():
    with pytest.raises(KeyError):
        difference([{"logits": torch.ones(1)}], [{"last_hidden_state": torch.ones(1)}])
