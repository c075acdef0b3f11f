"""Oracle: folders that stock transformers saves, and what it loads from the results."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, GPT2Config, LlamaConfig, RobertaConfig

from cook.base.errors import UserError
from cook.base.tensor_files import LazyTensors
from cook.export import pruned_folder as prune
from cook.export.check import account, auto_class, loading_report
from cook.export.pruned_folder import prune_to_folder
from cook.families.source import open_model
from cook.pruning.pad import padded
from tests.tiny_families import tiny_source

BERT = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=20,
    vocab_size=61,
    max_position_embeddings=64,
)
GPT2 = dict(
    n_embd=32,
    n_layer=3,
    n_head=4,
    n_inner=20,
    n_positions=64,
    vocab_size=61,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def saved(folder, name, config):
    torch.manual_seed(0)
    model = getattr(transformers, name)(config)
    for weight in model.parameters():
        weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return model.eval()


def dims(source, keep=7):
    space = source.adapter.space(source.config)
    return space, {group.name: (torch.arange(group.size) < keep).float() for group in space.of("dimff")}


def uneven(source):
    space = source.adapter.space(source.config)
    return space, {g.name: (torch.arange(g.size) < 7 + g.layer).float() for g in space.of("dimff")}


def changed_file(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", ["BertForPreTraining", "BertForMaskedLM"])
def test_the_head_for_pairs_of_sentences_goes_along_exactly(tmp_path, name):
    saved(tmp_path / "bert", "BertForPreTraining", BertConfig(**BERT))
    if name == "BertForMaskedLM":  # as in the published files
        config = json.loads((tmp_path / "bert" / "config.json").read_text())
        (tmp_path / "bert" / "config.json").write_text(json.dumps(config | {"architectures": [name]}))
    source = open_model(tmp_path / "bert")
    space, masks = dims(source)
    result = prune_to_folder(source, space, masks, tmp_path / "small")
    lost = load_file(tmp_path / "bert" / "model.safetensors").keys() - load_file(
        tmp_path / "small" / "model.safetensors"
    )
    assert not lost
    if name == "BertForMaskedLM":
        assert "cls.seq_relationship.weight" in result.account.carried
    before, report = transformers.BertForPreTraining.from_pretrained(tmp_path / "bert", output_loading_info=True)
    after, report = transformers.BertForPreTraining.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert torch.equal(before.cls.seq_relationship.weight, after.cls.seq_relationship.weight)
    assert torch.equal(before.bert.pooler.dense.weight, after.bert.pooler.dense.weight)


def test_heads_that_the_class_lacks_are_left_out_with_fewer_hidden_dims(tmp_path):
    saved(tmp_path / "bert", "BertForPreTraining", BertConfig(**BERT))
    source = open_model(tmp_path / "bert")
    space = source.adapter.space(source.config)
    result = prune_to_folder(
        source, space, {"hidden": (torch.arange(space.hidden.size) % 4 > 0).float()}, tmp_path / "small"
    )
    assert {"cls.seq_relationship.weight", "bert.pooler.dense.weight"} <= set(result.account.outgrown)
    assert result.auto_class == "AutoModelForMaskedLM" and not result.account.carried
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "small", trust_remote_code=True)
    assert model.get_input_embeddings().weight.shape[1] == space.hidden.size * 3 // 4


@pytest.mark.parametrize("uniform", [False, True])
def test_a_model_with_a_carried_head_keeps_its_class(tmp_path, uniform):
    saved(tmp_path / "bert", "BertForPreTraining", BertConfig(**BERT))
    source = open_model(tmp_path / "bert")
    space, masks = uneven(source) if uniform else dims(source)
    filled, even = padded(source, space, masks) if uniform else (source, masks)
    result = prune_to_folder(filled, space, even, tmp_path / "small", record=masks)
    assert result.config["architectures"] == ["BertForPreTraining"]
    assert result.auto_class == "AutoModelForPreTraining"
    before = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "bert").eval()
    for group in space.of("dimff"):
        before.bert.encoder.layer[group.layer].output.dense.weight.data *= masks[group.name]
    after = transformers.AutoModelForPreTraining.from_pretrained(tmp_path / "small").eval()
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        a, b = before(input_ids=ids), after(input_ids=ids)
    for name in ("prediction_logits", "seq_relationship_logits"):
        assert (a[name] - b[name]).abs().max() <= 1e-5 * a[name].abs().max()


def test_a_head_that_the_result_cannot_hold_is_refused_by_name(tmp_path, monkeypatch):
    saved(tmp_path / "bert", "BertForPreTraining", BertConfig(**BERT))
    source = open_model(tmp_path / "bert")
    # A family whose table knows one class only, whatever the folder says.
    plain = {"architectures": ["BertForMaskedLM"]}
    monkeypatch.setattr(prune, "_with_architecture", lambda config, before: config | plain)
    space, masks = dims(source)
    with pytest.raises(UserError, match=r"cls\.seq_relationship"):
        prune_to_folder(source, space, masks, tmp_path / "small")
    assert not (tmp_path / "small").exists() and not list(tmp_path.glob(".small*"))


@pytest.mark.parametrize("name", ["LlamaForSequenceClassification", "GPT2ForSequenceClassification"])
def test_a_classifier_on_a_decoder_is_refused_by_name(tmp_path, name):
    config = GPT2Config(num_labels=3, **GPT2) if name.startswith("GPT2") else LlamaConfig(num_labels=3, **BERT)
    saved(tmp_path / "model", name, config)
    with pytest.raises(UserError, match=name):
        open_model(tmp_path / "model")


def test_second_copies_of_tied_weights_are_left_out_and_counted(tmp_path):
    saved(tmp_path / "roberta", "RobertaForMaskedLM", RobertaConfig(**BERT, pad_token_id=1))

    def add(tensors):
        tensors["lm_head.decoder.weight"] = tensors["roberta.embeddings.word_embeddings.weight"].clone()
        tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"].clone()

    changed_file(tmp_path / "roberta", add)
    source = open_model(tmp_path / "roberta")
    space, masks = dims(source)
    found = prune_to_folder(source, space, masks, tmp_path / "small").account
    assert set(found.duplicates) == {"lm_head.decoder.weight", "lm_head.decoder.bias"} and not found.carried

    # A copy that differs is a weight of its own, as in stock transformers.
    changed_file(tmp_path / "roberta", lambda tensors: tensors["lm_head.decoder.bias"].add_(1))
    source = open_model(tmp_path / "roberta")
    space, masks = dims(source)
    found = prune_to_folder(source, space, {n: torch.ones_like(m) for n, m in masks.items()}, tmp_path / "own").account
    assert not found.duplicates and not found.carried
    before, after = load_file(tmp_path / "roberta" / "model.safetensors"), load_file(tmp_path / "own/model.safetensors")
    assert torch.equal(before["lm_head.decoder.bias"], after["lm_head.decoder.bias"])
    ids = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(1))
    models = [transformers.RobertaForMaskedLM.from_pretrained(tmp_path / name).eval() for name in ("roberta", "own")]
    with torch.no_grad():
        a, b = (model(input_ids=ids).logits for model in models)
    assert torch.equal(a, b)


def test_a_strange_tensor_in_a_layer_is_refused(tmp_path):
    saved(tmp_path / "llama", "LlamaForCausalLM", LlamaConfig(**BERT))
    changed_file(tmp_path / "llama", lambda t: t.update({"model.layers.1.mlp.extra": torch.ones(2)}))
    with pytest.raises(UserError, match=r"'model\.layers\.1\.mlp\.extra' has no place"):
        source = open_model(tmp_path / "llama")
        prune_to_folder(source, *dims(source), tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_tables_of_older_files_are_recomputed(tmp_path):
    saved(tmp_path / "llama", "LlamaForCausalLM", LlamaConfig(**BERT))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    changed_file(tmp_path / "llama", lambda tensors: tensors.update({name: torch.ones(4)}))
    source = open_model(tmp_path / "llama")
    assert prune_to_folder(source, *dims(source), tmp_path / "small").account.recomputed == (name,)


@pytest.mark.parametrize("path", ["model.norm.weight", "model.layers.1.mlp.down_proj.weight"])
@pytest.mark.parametrize("fault", ["lost", "transposed"])
def test_a_weight_that_the_writing_loses_or_turns_is_noticed(tmp_path, monkeypatch, path, fault):
    source = tiny_source("llama")
    space, masks = dims(source)
    real = prune.reshaped

    def broken(*arguments):
        tensors = dict(real(*arguments))
        tensor = tensors.pop(path)
        turned = tensor[None] if tensor.ndim == 1 else tensor.T
        return tensors | ({path: turned} if fault == "transposed" else {})

    monkeypatch.setattr(prune, "reshaped", broken)
    with pytest.raises(UserError, match=path.replace(".", r"\.")):
        prune_to_folder(source, space, masks, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_config_that_builds_other_weights_is_noticed(tmp_path):
    source = tiny_source("llama")
    space, masks = dims(source)

    def wrong(config, space, kept):
        shrunk = source.adapter.shrink(config, space, kept)
        return dataclasses.replace(shrunk, config=shrunk.config | {"intermediate_size": 9})

    broken = dataclasses.replace(source, adapter=dataclasses.replace(source.adapter, shrink=wrong))
    with pytest.raises(UserError, match="another shape"):
        prune_to_folder(broken, space, masks, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_the_report_reads_and_holds_no_weights():
    source = tiny_source("llama")
    shapes = {name: tuple(tensor.shape) for name, tensor in source.tensors.items()}
    config = dict(source.config) | {"architectures": ["LlamaForCausalLM"]}
    report = loading_report(config, shapes)
    assert report is not None
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    shapes["model.norm.weight"] = (5,)
    del shapes["lm_head.weight"]
    report = loading_report(config, shapes | {"x": (1,)})
    assert report is not None
    assert report["missing_keys"] == {"lm_head.weight"} and report["unexpected_keys"] == {"x"}
    assert [entry[0] for entry in report["mismatched_keys"]] == ["model.norm.weight"]


@pytest.mark.parametrize(
    ("model_type", "architecture", "expected"),
    [
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("bert", "BertModel", "AutoModel"),
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("gpt2", "GPT2LMHeadModel", "AutoModelForCausalLM"),
        ("roberta", "RobertaForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("qwen2", "Qwen2ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("bert", "BertForTokenClassification", "AutoModelForTokenClassification"),
    ],
)
def test_the_class_that_loads_a_model(model_type, architecture, expected):
    config = {"model_type": model_type, "architectures": [architecture]}
    assert auto_class(config) == expected
    mapping = getattr(transformers, expected)._model_mapping
    held = mapping[transformers.CONFIG_MAPPING[model_type]]
    assert architecture in [c.__name__ for c in (held if isinstance(held, tuple) else (held,))]
    assert auto_class({"auto_map": {"AutoConfig": "m.C", "AutoModelForMaskedLM": "m.M"}}) == "AutoModelForMaskedLM"


def test_sources_in_memory_are_counted_as_well(tmp_path):
    source = tiny_source("llama")
    tensors = LazyTensors({name: lambda name=name: source.tensors[name] for name in source.tensors})
    space, masks = dims(source)
    found = account(dataclasses.replace(source, tensors=tensors), space)
    assert (found.carried, found.duplicates, found.recomputed) == ((), (), ())
    more = dict(source.tensors) | {"value_head.weight": torch.ones(1, 32)}
    assert account(dataclasses.replace(source, tensors=more), space).carried == ("value_head.weight",)
