from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from cook.base.errors import UserError
from cook.export.model_folder import write_model_folder
from cook.families.cpm_ant import ADAPTER
from cook.families.cpm_ant_formats import to_native_config, to_stock
from cook.families.source import load_model, open_model, placed
from tests.models.cpm_ant_tiny import RAGGED, tiny_config, tiny_model
from tests.tiny_families import tiny_source
from tests.tiny_pruning import config_of


def same_model(source, model):
    assert {name: tuple(t.shape) for name, t in source.tensors.items()} == source.adapter.space(source.config).shapes
    return all(torch.allclose(source.tensors[name], t, atol=1e-6) for name, t in model.state_dict().items())


def live_files(folder, model, name="m"):
    folder.mkdir(exist_ok=True)
    torch.save(model.state_dict(), folder / f"{name}.pt")
    (folder / f"{name}.json").write_text(json.dumps(to_native_config(model.config)))
    return folder / f"{name}.pt"


@pytest.mark.parametrize("changes", [{}, RAGGED])
@pytest.mark.parametrize("shard_bytes", [4000, 1 << 30])
def test_a_model_folder(tmp_path, changes, shard_bytes):
    model = tiny_model(**changes)
    tensors = model.state_dict().items()
    write_model_folder(tmp_path / "m", ADAPTER, config_of(**changes), tensors, shard_bytes=shard_bytes)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard_bytes == 4000)
    source = open_model(tmp_path / "m")
    assert same_model(source, model) and source.config.get("layer_heads") == changes.get("layer_heads")


def test_cpm_lives_files_and_what_is_exported_from_them(tmp_path):
    model = tiny_model(mask_modules=[[True, False], [False, True], [False, False]])
    source = open_model(live_files(tmp_path, model))
    assert same_model(source, model)
    # The exported folder must say what it is, though the JSON did not.
    write_model_folder(tmp_path / "out", source.adapter, source.config, source.tensors.items())
    assert same_model(open_model(tmp_path / "out"), model)


def test_the_older_ffn_is_known_by_its_weights(tmp_path):
    model = tiny_model(gated_ffn=False)
    path = live_files(tmp_path, model)
    assert "gated_ffn" not in json.loads(path.with_suffix(".json").read_text())
    source = open_model(path)
    assert source.config["gated_ffn"] is False and same_model(source, model)


def test_a_stock_folder(tmp_path):
    model = tiny_model()
    config, tensors = to_stock(tiny_config(), model.state_dict())
    write_model_folder(tmp_path / "stock", ADAPTER, config, tensors.items())
    source = open_model(tmp_path / "stock")
    assert same_model(source, model)
    write_model_folder(tmp_path / "ours", source.adapter, source.config, source.tensors.items())
    assert same_model(open_model(tmp_path / "ours"), model)


def test_a_config_given_by_hand(tmp_path):
    path = live_files(tmp_path, tiny_model())
    path.with_suffix(".json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match="no model config beside it"):
        open_model(path)
    assert open_model(path, config=json.loads((tmp_path / "elsewhere.json").read_text())).config["num_layers"] == 3


def test_a_checkpoint_is_read_through_the_training_room(tmp_path):
    stage, inner = tmp_path / "checkpoints", tmp_path / "checkpoints" / "step-7"
    inner.mkdir(parents=True)
    (stage / "latest").write_text("step-7\n")
    (inner / "latest").write_text("engine")
    (inner / "config.json").write_text(json.dumps(config_of()))
    seen = []
    source = open_model(stage, read_checkpoint=lambda path: (seen.append(path), {})[1])
    assert seen == [inner] and source.config["num_layers"] == 3
    with pytest.raises(UserError, match="cannot be used here"):
        open_model(stage)


@pytest.mark.parametrize("latest", [b"", b"../../x", b"/etc", b"\xff\xfe", b"step-9"])
def test_a_damaged_pointer_leads_nowhere_else(tmp_path, latest):
    (tmp_path / "latest").write_bytes(latest)
    (tmp_path / "config.json").write_text(json.dumps(config_of()))
    seen = []
    open_model(tmp_path, read_checkpoint=lambda path: (seen.append(path), {})[1])
    assert seen == [tmp_path]


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("[1]", "JSON object"),
        ('{"model_type": "none"}', "no adapter"),
        ('{"num_layers": 2, "colour": 1}', "colour"),
        ('{"model_type": "cook_cpm_ant", "num_layers": 0}', "contradicts itself"),
        ('{"model_type": "cook_cpm_ant", "num_layers": 3, "mask_modules": [[true, false]]}', "contradicts itself"),
    ],
)
def test_bad_configs_are_refused(tmp_path, config, word):
    live_files(tmp_path, tiny_model())
    (tmp_path / "m.json").write_text(config)
    with pytest.raises(UserError, match=word):
        source = open_model(tmp_path / "m.pt")
        source.adapter.space(source.config)


def test_nothing_to_open(tmp_path):
    with pytest.raises(UserError, match="no such model"):
        open_model(tmp_path / "absent")
    with pytest.raises(UserError, match="an empty folder"):
        open_model(tmp_path)


def test_half_precision_leaves_buffers_and_ties_as_they_are():
    model = load_model(tiny_source("llama, tied"))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    placed(model, "cpu", torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_that_do_not_fit_a_stock_model_are_refused():
    source = tiny_source("llama")
    name = "model.layers.1.mlp.up_proj.weight"
    short = {n: t for n, t in source.tensors.items() if n != name}
    for tensors, word in (
        (short, f"'{name}' is missing"),
        ({**source.tensors, "extra": torch.ones(1)}, "'extra' has no place"),
        ({**source.tensors, name: torch.ones(3, 32)}, "do not fit the model's config"),
    ):
        with pytest.raises(UserError, match=word):
            load_model(dataclasses.replace(source, tensors=tensors))
