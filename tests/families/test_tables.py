"""Encoders under the heads of tasks, and files of other heads and older versions."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.base.tensor_files import ShardWriter
from cook.export.pruned_folder import mask_model, prune_to_folder, reshaped_source
from cook.families.registry import by_config
from cook.families.source import load_model, open_model
from cook.pruning.attach import AttachedGates
from cook.pruning.counts import forward_flops, parameters
from tests.tiny_families import tiny_config, tiny_source
from tests.tiny_pruning import masks_of, random_masks

HEADS = {
    "BertForSequenceClassification": ("bert", "AutoModelForSequenceClassification"),
    "BertForQuestionAnswering": ("bert", "AutoModelForQuestionAnswering"),
    "BertForTokenClassification": ("bert", "AutoModelForTokenClassification"),
    "BertModel": ("bert", "AutoModel"),
    "RobertaForSequenceClassification": ("roberta", "AutoModelForSequenceClassification"),
    "RobertaModel": ("roberta", "AutoModel"),
}
LABELS = {"id2label": {"0": "no", "1": "maybe", "2": "yes"}, "label2id": {"no": 0, "maybe": 1, "yes": 2}}


def source_of(head):
    labels = {} if head.endswith("QuestionAnswering") else LABELS  # that one has the start and the end
    return tiny_source(HEADS[head][0], architectures=[head], **labels)


SOURCES = {head: source_of(head) for head in HEADS}
MODELS = {head: load_model(source) for head, source in SOURCES.items()}
SPACES = {head: source.adapter.space(source.config) for head, source in SOURCES.items()}
IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
PADDED = torch.ones_like(IDS).index_fill(1, torch.tensor([7, 8]), 0)


@torch.no_grad()
def outputs(model):
    out = model(input_ids=IDS, attention_mask=PADDED)
    found = {name: out[name] for name in ("logits", "start_logits", "end_logits", "pooler_output") if name in out}
    if "last_hidden_state" in out:
        found["hidden"] = out.last_hidden_state[PADDED.bool()]
    # The padding's own answers say nothing.
    return {name: value[PADDED.bool()] if value.shape[:2] == IDS.shape else value for name, value in found.items()}


def assert_same(first, second):
    first, second = outputs(first), outputs(second)
    assert first.keys() == second.keys() and first
    for name, value in first.items():
        assert (value - second[name]).abs().max() <= 1e-5 * value.abs().max(), name  # float32, another order of sums


@pytest.mark.parametrize("head", HEADS)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_masked_and_reshaped_are_equal(head, data):
    model, space = MODELS[head], SPACES[head]
    masks = data.draw(masks_of(space))
    small = load_model(reshaped_source(SOURCES[head], space, masks))
    attached = mask_model(model, space, masks)
    try:
        assert_same(model, small)
    finally:
        attached.remove()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("ragged", [False, True])
def test_the_export_loads_under_its_head(tmp_path, head, ragged):
    source, space = source_of(head), SPACES[head]
    masks = random_masks(space, 3) if ragged else {g.name: torch.arange(g.size) % 3 for g in space.of("dimff")}
    masks = {name: (mask > 0).float() for name, mask in masks.items()}
    prune_to_folder(source, space, masks, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert ("auto_map" in config) == ragged
    auto_class = getattr(transformers, HEADS[head][1])
    model, report = auto_class.from_pretrained(
        tmp_path / "small", trust_remote_code=ragged or None, output_loading_info=True
    )
    assert not any(report.values())
    assert list(model.config.id2label.values()) == (
        ["no", "maybe", "yes"] if "id2label" in source.config else ["LABEL_0", "LABEL_1"]
    )
    own = load_model(open_model(tmp_path / "small"))
    masked = load_model(source)
    mask_model(masked, space, masks)
    for other in (model.eval(), own):
        assert_same(masked, other)


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForQuestionAnswering"])
def test_gradients_reach_every_gate(head):
    model, space = MODELS[head], SPACES[head]
    z = {group.name: torch.full((group.size,), 0.7, requires_grad=True) for group in space.groups}
    attached = AttachedGates(model, space.groups, {})
    attached.set(z)
    out = model(input_ids=IDS, attention_mask=PADDED)
    (out.logits if "logits" in out else out.start_logits).square().sum().backward()
    attached.remove()
    assert all(gate.grad is not None and gate.grad.ne(0).all() for gate in z.values())


def test_a_classifier_has_no_logits_of_tokens():
    space = SPACES["BertForSequenceClassification"]
    assert space.logits_weight == "" and parameters(space) == sum(
        p.numel() for p in MODELS["BertForSequenceClassification"].parameters()
    )
    masked_lm = tiny_source("bert")
    with_logits = masked_lm.adapter.space(masked_lm.config)
    more = forward_flops(with_logits, context=9) - forward_flops(space, context=9)
    assert more == 2 * 61 * 32


def written(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with ShardWriter(folder) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor.detach().clone())
    return open_model(folder)


def test_a_file_with_the_first_versions_keys_and_other_heads(tmp_path):
    """As in the published bert-base: gamma and beta, the bare prefix, a pooler and a head for pairs of sentences."""
    source = tiny_source("bert")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in source.tensors.items()
    }
    old |= {"bert.pooler.dense.weight": torch.ones(32, 32), "cls.seq_relationship.weight": torch.ones(2, 32)}
    old |= {"cls.predictions.decoder.weight": old["bert.embeddings.word_embeddings.weight"]}
    old |= {"bert.embeddings.position_ids": torch.arange(64)[None]}
    opened = written(tmp_path / "old", tiny_config("bert"), old)
    assert set(opened.tensors) == set(source.tensors)
    assert_same(load_model(opened), load_model(source))
    # What a masked-language model lacks goes along with the result.
    prune_to_folder(opened, opened.adapter.space(opened.config), {}, tmp_path / "new")
    with_pairs, report = transformers.BertForPreTraining.from_pretrained(tmp_path / "new", output_loading_info=True)
    # The old file lacks these as well.
    assert set(report["missing_keys"]) == {"cls.seq_relationship.bias", "bert.pooler.dense.bias"}
    assert torch.equal(with_pairs.cls.seq_relationship.weight, torch.ones(2, 32))
    assert torch.equal(with_pairs.bert.pooler.dense.weight, torch.ones(32, 32))


def test_a_bare_encoder_lacks_the_head_that_is_asked_for(tmp_path):
    bare = SOURCES["BertModel"]
    config = tiny_config("bert", architectures=["BertForSequenceClassification"], **LABELS)
    with pytest.raises(UserError, match="'classifier.weight' is missing"):
        written(tmp_path / "bare", config, dict(bare.tensors))


@pytest.mark.parametrize(
    ("name", "prefix", "extra"),
    [
        ("gpt2", "transformer.", {"h.0.attn.bias": torch.ones(1, 1, 64, 64), "h.1.attn.masked_bias": torch.ones(())}),
        ("gpt_neox", "gpt_neox.", {"layers.0.attention.rotary_emb.inv_freq": torch.ones(2)}),
        ("opt", "model.", {}),
    ],
)
def test_files_of_bare_decoders_with_tables_of_older_versions(tmp_path, name, prefix, extra):
    source = tiny_source(name)
    old = {path.removeprefix(prefix): tensor for path, tensor in source.tensors.items()} | extra
    opened = written(tmp_path / "old", tiny_config(name), old)
    assert set(opened.tensors) == set(source.tensors) and opened.adapter is by_config(source.config)
    with torch.no_grad():
        assert torch.equal(load_model(opened)(input_ids=IDS).logits, load_model(source)(input_ids=IDS).logits)


def test_a_strange_weight_is_not_passed_over(tmp_path):
    source = tiny_source("gpt2")
    tensors = dict(source.tensors) | {"transformer.h.0.extra": torch.ones(1)}
    with pytest.raises(UserError, match="'transformer.h.0.extra' has no place in the model"):
        written(tmp_path / "x", tiny_config("gpt2"), tensors)
