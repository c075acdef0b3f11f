"""Google's folders: the same model as the stock one whose weights were written under TensorFlow's names."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from cook.base.errors import UserError
from cook.families.encoder import open_encoder
from tests.models.tf_writer import write_checkpoint
from tests.recipe.benchmarks.tiny_task import CONFIG, SPECIAL, WORDS

LEAVES = {"LayerNorm.weight": "LayerNorm/gamma", "LayerNorm.bias": "LayerNorm/beta"}


def tensorflow_name(name: str) -> str:
    """The original's name of a stock parameter: the other way round than the reader's rules, and written apart."""
    for old, new in LEAVES.items():
        name = name.replace(old, new)
    if name.startswith("classifier"):
        return {"classifier.weight": "output_weights", "classifier.bias": "output_bias"}[name]
    if name.endswith("_embeddings.weight"):
        return name.removesuffix(".weight").replace(".", "/")
    if name.endswith(".weight"):
        name = name.removesuffix("weight") + "kernel"
    return name.replace("layer.", "layer_").replace(".", "/")


def google_folder(folder: Path, model: torch.nn.Module, *, cased: bool = False) -> Path:
    folder.mkdir()
    tensors = {}
    for name, parameter in model.named_parameters():
        array = parameter.detach().numpy()
        mine = tensorflow_name(name)
        tensors[mine] = np.ascontiguousarray(array.T) if mine.endswith("/kernel") else array
    tensors |= {"cls/predictions/output_bias": np.zeros(3, np.float32), "global_step": np.array(5)}
    write_checkpoint(folder / "bert_model.ckpt", tensors)
    (folder / "bert_config.json").write_text(json.dumps(CONFIG | {"type_vocab_size": 2}))
    words = [*WORDS[:-1], "Town"] if cased else WORDS
    (folder / "vocab.txt").write_text("\n".join((*SPECIAL, *words)) + "\n")
    return folder


@pytest.fixture(scope="module")
def stock() -> BertForSequenceClassification:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = BertForSequenceClassification(BertConfig(**CONFIG, num_labels=3)).eval()
        for parameter in model.parameters():  # biases and norms that differ too
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def test_the_same_model(tmp_path, stock):
    found = open_encoder(str(google_folder(tmp_path / "g", stock)), "classes", ("a", "b", "c"), seed=0)
    assert found.fresh == ()
    model = found.build().eval()
    model.load_state_dict(found.weights, strict=False)
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, stock(ids).logits)


def test_another_head_is_fresh_and_the_encoder_is_not(tmp_path, stock):
    folder = google_folder(tmp_path / "g", stock)
    assert open_encoder(str(folder), "span", (), seed=0).fresh == ("qa_outputs.weight", "qa_outputs.bias")
    two = open_encoder(str(folder), "classes", ("a", "b"), seed=0)
    assert two.fresh == ("classifier.weight", "classifier.bias")
    assert two.config.id2label == {0: "a", 1: "b"}


@pytest.mark.parametrize("cased", [False, True])
def test_the_vocabulary_tells_whether_case_counts(tmp_path, stock, cased):
    found = open_encoder(str(google_folder(tmp_path / "g", stock, cased=cased)), "classes", ("a", "b"), seed=0)
    ids = found.tokenizer("Town", add_special_tokens=False)["input_ids"]
    assert ids == [len(SPECIAL) + WORDS.index("town")]
    if cased:
        assert found.tokenizer("town", add_special_tokens=False)["input_ids"] == [1]  # not in the vocabulary


def test_what_is_refused(tmp_path, stock):
    folder = google_folder(tmp_path / "g", stock)
    (folder / "vocab.txt").rename(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="vocab.txt"):
        open_encoder(str(folder), "classes", ("a", "b"), seed=0)
    (tmp_path / "vocab.txt").rename(folder / "vocab.txt")
    (folder / "bert_config.json").write_text('{"hidden": 3}')
    with pytest.raises(UserError, match="hidden_size"):
        open_encoder(str(folder), "classes", ("a", "b"), seed=0)
    (folder / "bert_config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    with pytest.raises(UserError, match=r"lack bert\.encoder\.layer\.2"):
        open_encoder(str(folder), "classes", ("a", "b"), seed=0)
    write_checkpoint(folder / "other.ckpt", {"x": np.ones(2, np.float32)})
    with pytest.raises(UserError, match="exactly one TensorFlow checkpoint"):
        open_encoder(str(folder), "classes", ("a", "b"), seed=0)
