from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from cook.export.model_folder import write_model_folder, write_tokenizer
from cook.families.cpm_ant import ADAPTER
from tests.models.cpm_ant_tiny import tiny_model
from tests.tiny_pruning import config_of


class Tokenizer:
    bos_id, eos_id, pad_id = 6, 7, 0

    def save(self, folder):
        (folder / "tokenizer.json").write_text("{}")


def test_config_modeling_file_and_weights(tmp_path):
    model = tiny_model().bfloat16()
    write_model_folder(tmp_path, ADAPTER, config_of(), model.state_dict().items())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["model_type"] == "cook_cpm_ant" and config["dim_model"] == 24
    for target in config["auto_map"].values():
        module, name = target.split(".")
        assert f"class {name}" in (tmp_path / f"{module}.py").read_text()
    weights = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_tensors_are_taken_as_they_come(tmp_path):
    # A generator that would hold two models is noticed: each tensor is dropped before the next shard is filled.
    alive = []

    def tensors():
        for number in range(6):
            alive.append(number)
            yield f"w{number}", torch.full((10,), float(number))

    write_model_folder(tmp_path, ADAPTER, config_of(), tensors(), shard_bytes=40)
    assert alive == list(range(6)) and len(list(tmp_path.glob("model-*.safetensors"))) == 6


def test_a_tokenizer_and_its_ids(tmp_path):
    write_tokenizer(tmp_path, Tokenizer())
    ids = json.loads((tmp_path / "generation_config.json").read_text())
    assert ids == {"bos_token_id": 6, "eos_token_id": 7, "pad_token_id": 0}
