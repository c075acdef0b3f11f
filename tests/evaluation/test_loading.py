from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cook.base.errors import UserError
from cook.evaluation.loading import Entry, load, parse_entry
from cook.export.model_folder import write_model_folder
from cook.export.pruned_folder import prune_to_folder
from cook.families.cpm_ant import ADAPTER
from cook.families.source import open_model
from cook.pruning.mask_file import write_mask_file
from cook.pruning.mask_set import coarse_to_tensors, fine_to_tensors
from tests.evaluation.conftest import write_tokenizer
from tests.models.cpm_ant_tiny import tiny_model
from tests.tiny_pruning import config_of, random_masks, tiny_space

IDS = torch.arange(12)[None]


def entry(folder, **masks):
    return Entry(name="m", folder=str(folder), masks=masks)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a/b", Entry(name="b", folder="a/b")),
        ("dense=a/b", Entry(name="dense", folder="a/b")),
        ("a/x=1/b", Entry(name="b", folder="a/x=1/b")),
        ("m=a,b,coarse=c.pt,dimff=d=e.pt", Entry(name="m", folder="a,b", masks={"coarse": "c.pt", "dimff": "d=e.pt"})),
        (".", Entry(name=".", folder=".")),
    ],
)
def test_entries(text, wanted):
    assert parse_entry(text) == wanted


@pytest.mark.parametrize("text", ["", "m=", "a,coarse=", "a,coarse=x,coarse=y", ",heads=x"])
def test_entries_that_name_no_model(text):
    with pytest.raises(UserError, match="not a model"):
        parse_entry(text)


def test_a_mask_of_an_unknown_kind_is_named():
    with pytest.raises(UserError, match="there is no mask 'layer'"):
        parse_entry("x=a/b,layer=c.pt")


def test_a_quantized_model_without_the_package_that_reads_it(stock_folder, monkeypatch):
    config = stock_folder / "config.json"
    quantized = {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}
    config.write_text(json.dumps(json.loads(config.read_text()) | quantized))
    monkeypatch.setattr("transformers.utils.quantization_config.is_compressed_tensors_available", lambda: False)
    with pytest.raises(UserError, match=r"(?s)compressed-tensors.*remedy: pip install 'cook\[quantization\]'"):
        load(entry(stock_folder), trust_remote_code=False)


def test_a_dense_model_with_its_masks_is_the_reshaped_one(tmp_path):
    write_model_folder(tmp_path / "dense", ADAPTER, config_of(), tiny_model().state_dict().items())
    space, masks = tiny_space(), random_masks(tiny_space(), 2)
    write_mask_file(tmp_path / "coarse.pt", coarse_to_tensors(space, masks))
    write_mask_file(tmp_path / "fine.pt", fine_to_tensors(space, masks))
    prune_to_folder(open_model(tmp_path / "dense"), space, masks, tmp_path / "small")
    for name in ("dense", "small"):
        write_tokenizer(tmp_path / name)
    files = dict(coarse=str(tmp_path / "coarse.pt"), heads=str(tmp_path / "fine.pt"))
    masked = load(entry(tmp_path / "dense", **files), trust_remote_code=False).model
    small = load(entry(tmp_path / "small"), trust_remote_code=False).model
    dense = load(entry(tmp_path / "dense"), trust_remote_code=False).model
    with torch.no_grad():
        one, other, whole = (model(input_ids=IDS).logits for model in (masked, small, dense))
    # Sums in another order, in float32.
    assert (one - other).abs().max() <= 1e-5 * one.abs().max() < 1e-2 * (one - whole).abs().max()


@pytest.mark.parametrize("change", ["no config", "list", "sizes", "weights"])
def test_folders_that_cannot_be_loaded(folder, change):
    config = folder / "config.json"
    if change == "no config":
        config.unlink()
    elif change == "list":
        config.write_text("[]")
    elif change == "sizes":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dim_model": 30}))
    else:
        weights = load_file(folder / "model.safetensors")
        weights.pop("input_embedding.weight")
        save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError):
        load(entry(folder), trust_remote_code=False)


def test_masks_of_a_family_that_cook_does_not_know(stock_folder, tmp_path):
    config = stock_folder / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"persimmon"'))
    with pytest.raises(UserError, match="a family that cook knows"):
        load(entry(stock_folder, coarse="x.pt"), trust_remote_code=False)


def test_a_modeling_file_of_others_runs_only_when_the_user_says_so(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}
    config |= {"model_type": "strange", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nraise OSError('strange')\n")
    for trust in (False, True):
        with pytest.raises(UserError, match="cannot be loaded"):
            load(entry(folder), trust_remote_code=trust)
        assert (tmp_path / "ran").exists() == trust
