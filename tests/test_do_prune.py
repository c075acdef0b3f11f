"""The command, on folders that stock transformers saves."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import weakref

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import BertConfig, GemmaConfig, GPT2Config, LlamaConfig, RobertaConfig

from cook.base.errors import RunFailed, UserError
from cook.export.model_folder import write_model_folder
from cook.families.cpm_ant import ADAPTER
from cook.families.source import open_model
from cook.models.cpm_ant import CpmAntConfig, CpmAntForCausalLM
from cook.pruning.family import Stored
from cook.pruning.mask_file import write_mask_file
from cook.recipe import reshape_run
from do_prune import main
from tests.models.cpm_ant_tiny import SIZES as SMALL
from tests.models.cpm_ant_tiny import tiny_model
from tests.tiny_pruning import config_of

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=20, vocab_size=300)
EVEN, UNEVEN = [[1.0] * 7 + [0] * 13] * 3, [[1.0] * (5 + n) + [0] * (15 - n) for n in range(3)]


def saved(folder, name="LlamaForCausalLM", config=None, **changes):
    torch.manual_seed(0)
    made = getattr(transformers, name)(config or LlamaConfig(**SIZES, **changes))
    made.save_pretrained(folder)
    return folder


def prune(monkeypatch, model, *options, dims=EVEN, output=None):
    mask = model.parent / "dims.pt"
    write_mask_file(mask, {"dimff_z": torch.tensor(dims)})
    output = output or model.parent / "small"
    monkeypatch.setattr(
        "sys.argv", ["do_prune.py", "--model", str(model), "--dimff-mask", str(mask), "--output", str(output), *options]
    )
    return main()


def beside(path):
    return sorted(name for name in os.listdir(path) if name.startswith((".", "small")))


@pytest.mark.parametrize(
    ("name", "config", "auto_class", "pipeline"),
    [
        ("BertModel", BertConfig(**SIZES, max_position_embeddings=40), "AutoModel", "feature-extraction"),
        ("RobertaForMaskedLM", RobertaConfig(**SIZES, max_position_embeddings=50), "AutoModelForMaskedLM", "fill-mask"),
        ("BertForQuestionAnswering", BertConfig(**SIZES), "AutoModelForQuestionAnswering", "question-answering"),
        (
            "BertForSequenceClassification",
            BertConfig(**SIZES, num_labels=3),
            "AutoModelForSequenceClassification",
            "text-classification",
        ),
        (
            "GPT2LMHeadModel",
            GPT2Config(n_embd=32, n_layer=3, n_head=4, n_inner=20, n_positions=30, vocab_size=300),
            "AutoModelForCausalLM",
            "text-generation",
        ),
        (
            "LlamaForCausalLM",
            LlamaConfig(**SIZES, max_position_embeddings=4),
            "AutoModelForCausalLM",
            "text-generation",
        ),
    ],
)
@pytest.mark.parametrize("dims", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_every_kind_of_model_is_verified_and_named_right(
    tmp_path, monkeypatch, capsys, name, config, auto_class, pipeline, dims
):
    model = saved(tmp_path / "model", name, config)
    assert prune(monkeypatch, model, "--verify", dims=dims) is None
    out = capsys.readouterr().out
    assert "equal to rounding" in out and f"{name} of transformers with the masked units set to zero" in out
    assert f"({auto_class}.from_pretrained(" in out.splitlines()[-1]
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"pipeline_tag: {pipeline}\n" in card and f"model = {auto_class}.from_pretrained(" in card
    _, report = getattr(transformers, auto_class).from_pretrained(
        tmp_path / "small", trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values())


@pytest.mark.parametrize("dims", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_what_is_not_equal_is_not_published(tmp_path, monkeypatch, dims):
    model = saved(tmp_path / "model")
    real = reshape_run.write_pruned

    def wrong(source, *arguments, **options):
        tensors = {
            name: tensor * 1.01 if name == "model.norm.weight" else tensor for name, tensor in source.tensors.items()
        }
        return real(dataclasses.replace(source, tensors=tensors, stored=Stored({})), *arguments, **options)

    monkeypatch.setattr(reshape_run, "write_pruned", wrong)
    with pytest.raises(RunFailed, match=r"NOT EQUAL(.|\n)*Nothing was written"):
        prune(monkeypatch, model, "--verify", dims=dims)
    assert beside(tmp_path) == []
    monkeypatch.setattr(reshape_run, "write_pruned", real)
    assert prune(monkeypatch, model, "--verify", dims=dims) is None


@pytest.mark.parametrize("dims", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_a_model_larger_than_memory_is_verified_layer_by_layer(tmp_path, monkeypatch, capsys, name, dims):
    model = saved(tmp_path / "model", name, BertConfig(**SIZES) if name.startswith("Bert") else None)
    monkeypatch.setattr("cook.families.streamed.free_memory", lambda device: 1000)
    prune(monkeypatch, model, "--verify", dims=dims)
    assert "as read and masked by cook, layer by layer: largest relative difference" in capsys.readouterr().out
    real = reshape_run.masked_model

    def misread(source, *arguments, **options):
        ends = (".1.mlp.up_proj.weight", ".1.intermediate.dense.weight")
        wrong = {n: tensor * 1.1 if n.endswith(ends) else tensor for n, tensor in source.tensors.items()}
        return real(dataclasses.replace(source, tensors=wrong), *arguments, **options)

    monkeypatch.setattr(reshape_run, "masked_model", misread)
    with pytest.raises(RunFailed, match="NOT EQUAL"):
        prune(monkeypatch, model, "--verify", dims=dims)


MULTIPLIED = [
    ("LlamaForCausalLM", LlamaConfig(**SIZES), "head_dims", "q_proj"),
    ("GemmaForCausalLM", GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=8), "hidden", "embed_tokens"),
]


@pytest.mark.parametrize("fits", [True, False], ids=["in memory", "layer by layer"])
@pytest.mark.parametrize(("name", "config", "kind", "weight"), MULTIPLIED)
def test_weights_in_16_bits_are_compared_before_they_are_rounded_again(
    tmp_path, monkeypatch, capsys, name, config, kind, weight, fits
):
    torch.manual_seed(0)
    model = tmp_path / "model"
    getattr(transformers, name)(config).bfloat16().save_pretrained(model)
    if not fits:
        monkeypatch.setattr("cook.families.streamed.free_memory", lambda device: 1000)
    source = open_model(model)
    (group,) = [group for group in source.adapter.space(source.config).every if group.kind == kind]
    kept = (torch.arange(group.size) % 4 > 0).float()
    write_mask_file(tmp_path / "wide.pt", {f"{kind}_z": kept})
    options = ["--verify", f"--{kind.replace('_', '-')}-mask", str(tmp_path / "wide.pt")]
    prune(monkeypatch, model, *options, dims=UNEVEN)
    assert re.search(r"\d weights before they were rounded to 16 bits again: .* equal", capsys.readouterr().out)
    written = open_model(tmp_path / "small").tensors
    assert all(tensor.dtype == torch.bfloat16 for tensor in written.values())
    real = reshape_run.write_pruned

    def wrong(source, *arguments, **options):
        tensors = {name: tensor * 1.01 if weight in name else tensor for name, tensor in source.tensors.items()}
        return real(dataclasses.replace(source, tensors=tensors, stored=Stored({})), *arguments, **options)

    monkeypatch.setattr(reshape_run, "write_pruned", wrong)
    with pytest.raises(RunFailed, match="is not the one that the masks leave"):
        prune(monkeypatch, model, *options, dims=UNEVEN)


def test_cpm_ant_in_16_bits_keeps_its_weights(tmp_path, monkeypatch, capsys):
    tensors = {name: tensor.bfloat16() for name, tensor in tiny_model(1).state_dict().items()}
    write_model_folder(tmp_path / "model", ADAPTER, config_of(), tensors.items())
    write_mask_file(tmp_path / "hidden.pt", {"hidden_z": (torch.arange(24) % 3 > 0).float()})
    prune(monkeypatch, tmp_path / "model", "--verify", "--hidden-mask", str(tmp_path / "hidden.pt"), dims=UNEVEN)
    assert re.search(r"as read and masked by cook: .* equal to rounding", capsys.readouterr().out)
    written = load_file(tmp_path / "small" / "model.safetensors")
    values = {name: set(tensor.flatten().tolist()) for name, tensor in tensors.items()}
    assert all(set(tensor.flatten().tolist()) <= values[name] for name, tensor in written.items())


def test_sizes_that_a_cpm_ant_leaves_out_have_their_defaults(tmp_path, monkeypatch, capsys):
    config = CpmAntConfig(**SMALL | {"prompt_length": 32, "vocab_size": 300})
    CpmAntForCausalLM(config).save_pretrained(tmp_path / "model")
    written = json.loads((tmp_path / "model/config.json").read_text())
    assert written.pop("prompt_length") == 32  # the default
    (tmp_path / "model/config.json").write_text(json.dumps(written))
    source = open_model(tmp_path / "model")
    assert source.config["prompt_length"] == 32 and source.config["dim_model"] == SMALL["dim_model"]
    assert prune(monkeypatch, tmp_path / "model", "--verify", dims=UNEVEN) is None
    assert "equal to rounding" in capsys.readouterr().out


def test_an_earlier_export_survives_a_failure(tmp_path, monkeypatch):
    model = saved(tmp_path / "model")
    prune(monkeypatch, model)
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir() if path.is_file()}
    monkeypatch.setattr(reshape_run, "model_card", lambda card: (_ for _ in ()).throw(UserError("no")))
    with pytest.raises(UserError):
        prune(monkeypatch, model, dims=UNEVEN)
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir() if path.is_file()} == before
    assert beside(tmp_path) == ["small"]


@pytest.mark.parametrize("limit", [900, 1500, 3000, 50_000])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_a_file_that_cannot_grow_is_one_message_and_no_half_result(tmp_path, monkeypatch, name, limit):
    """Each limit stops another of the files: mask, config, modeling file, weights."""
    model = saved(tmp_path / "model", name, BertConfig(**SIZES) if name.startswith("Bert") else None)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    write_mask_file(tmp_path / "dims.pt", {"dimff_z": torch.tensor(UNEVEN)})
    monkeypatch.setattr(
        "sys.argv",
        [
            "do_prune.py",
            "--model",
            str(model),
            "--dimff-mask",
            str(tmp_path / "dims.pt"),
            "--output",
            str(tmp_path / "small"),
        ],
    )
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(RunFailed, match=r"small: the model cannot be written: (.|\n)*run the same command again"):
            main()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert beside(tmp_path) == []
    assert main() is None and load_file(tmp_path / "small" / "model.safetensors")


def test_a_link_as_output(tmp_path, monkeypatch, capsys):
    model = saved(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    prune(monkeypatch, model, output=tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "config.json").exists()
    assert (tmp_path / "disk" / "README.md").read_text().split("\n# ")[1].startswith("disk")
    assert str(tmp_path / "link") in capsys.readouterr().out.splitlines()[-1]


def test_files_of_sentence_transformers_and_heads_of_other_tasks_go_along(tmp_path, monkeypatch, capsys):
    model = saved(tmp_path / "model", "BertForPreTraining", BertConfig(**SIZES))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}))
    (model / "1_Pooling").mkdir()
    (model / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (model / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}]))
    (model / "optimizer.pt").write_bytes(b"x")
    prune(monkeypatch, model, "--verify")
    out = capsys.readouterr().out
    assert "1_Pooling/config.json, " in out and "optimizer.pt (training state)" in out
    assert "does not use them: " in out and "cls.seq_relationship.weight" in out
    assert (tmp_path / "small" / "1_Pooling" / "config.json").read_text() == '{"pooling_mode_mean_tokens": true}'


def test_speed_is_measured_when_asked_for_with_one_model_in_memory(tmp_path, monkeypatch, capsys):
    model = saved(tmp_path / "model")
    prune(monkeypatch, model)
    assert "tokens/s" not in capsys.readouterr().out
    alive: list[weakref.ref] = []

    def watched(build):
        def make(*arguments, **options):
            assert not [ref for ref in alive if ref() is not None], "another model is still in memory"
            made = build(*arguments, **options)
            alive.append(weakref.ref(made))
            return made

        return make

    monkeypatch.setattr(reshape_run, "load_model", watched(reshape_run.load_model))
    monkeypatch.setattr(reshape_run, "written_model", watched(reshape_run.written_model))
    real = reshape_run.masked_model
    monkeypatch.setattr(
        reshape_run, "masked_model", lambda *args, **named: (watched(lambda: real(*args, **named)[0])(), "the witness")
    )
    prune(monkeypatch, model, "--verify", "--time")
    assert "tokens/s forward" in capsys.readouterr().out and len(alive) == 4
