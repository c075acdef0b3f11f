"""Encoders from Hugging Face folders: heads, tokenizers, and folders that stock transformers loads."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from cook.base.errors import UserError
from cook.families.encoder import open_encoder, write_encoder
from tests.recipe.benchmarks.tiny_task import SPECIAL, WORDS, write_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder") / "model"
    write_model(folder)
    return folder


def test_a_fresh_head_depends_on_the_seed_alone(folder):
    first, again, other = (open_encoder(str(folder), "classes", ("no", "yes"), seed) for seed in (1, 1, 2))
    assert first.fresh == ("classifier.weight", "classifier.bias")
    assert torch.equal(first.weights["classifier.weight"], again.weights["classifier.weight"])
    assert not torch.equal(first.weights["classifier.weight"], other.weights["classifier.weight"])
    name = "bert.encoder.layer.1.output.dense.weight"
    assert torch.equal(first.weights[name], other.weights[name])


def test_what_is_written_loads_in_stock_transformers(folder, tmp_path):
    made = open_encoder(str(folder), "score", ("score",), seed=1)
    write_encoder(tmp_path / "out", made.config, made.weights.items(), made.tokenizer)
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert stock.config.num_labels == 1
    for name, parameter in stock.named_parameters():
        assert torch.equal(parameter, made.weights[name])
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("good film")["input_ids"] == [2, 5, 7, 3]
    again = open_encoder(str(tmp_path / "out"), "score", ("score",), seed=9)
    assert again.fresh == ()


def test_a_vocabulary_alone_is_a_tokenizer(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        (copy / name).write_bytes((folder / name).read_bytes())
    found = open_encoder(str(copy), "classes", ("a", "b"), seed=0).tokenizer
    good, film = (len(SPECIAL) + WORDS.index(word) for word in ("good", "film"))
    assert found("GOOD film")["input_ids"] == [2, good, film, 3]


@pytest.mark.parametrize("source", ["nothing/here", ""])
def test_no_model(tmp_path, monkeypatch, source):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no model to open"):
        open_encoder(source or str(tmp_path), "classes", ("a", "b"), seed=0)
