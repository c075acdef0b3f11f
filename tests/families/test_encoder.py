"""Encoders from Hugging Face folders: heads, tokenizers, and folders that stock transformers loads."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from cook.base.errors import UserError
from cook.families.encoder import _longest_row, open_encoder, write_encoder
from tests.recipe.benchmarks.tiny_task import CONFIG, SPECIAL, WORDS, write_model


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


MNLI = ("contradiction", "entailment", "neutral")
FAMILIES = {
    "bert": (BertConfig, BertForSequenceClassification),
    "roberta": (RobertaConfig, RobertaForSequenceClassification),
}


def fine_tuned(folder, names, family="bert"):
    """A stock classifier that calls its classes by these names."""
    config, model = FAMILIES[family]
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: row for row, name in enumerate(names)}}
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made = model(config(**CONFIG, **labels)).eval()
        for parameter in made.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    made.save_pretrained(folder)
    write_model(folder / "words")
    for path in (folder / "words").glob("*token*"):
        path.rename(folder / path.name)
    return made


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("names", "labels", "words"),
    [
        (("CONTRADICTION", "NEUTRAL", "ENTAILMENT"), MNLI, None),  # roberta-large-mnli
        (("entailment", "neutral", "contradiction"), MNLI, None),
        (MNLI, MNLI, None),
        (("Not Entailment", "Entailment"), ("entailment", "not_entailment"), None),
        (("POSITIVE", "NEGATIVE"), ("0", "1"), ("negative", "positive")),
        (("1", "0"), ("0", "1"), ("negative", "positive")),
    ],
)
def test_a_trained_head_keeps_the_meaning_of_its_classes(tmp_path, family, names, labels, words):
    stock = fine_tuned(tmp_path / "m", names, family)
    found = open_encoder(str(tmp_path / "m"), "classes", labels, seed=0, words=words)
    assert found.fresh == ()
    write_encoder(tmp_path / "out", found.config, found.weights.items(), found.tokenizer)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(5, 20, (32, 8), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, ours = stock(ids).logits, again(ids).logits
    assert not torch.equal(theirs[:, 0], theirs[:, 1])

    def spoken(name: str) -> str:
        return "".join(filter(str.isalnum, name)).lower()

    ids_of = {spoken(name): number for options in (labels, words or ()) for number, name in enumerate(options)}
    wanted = [ids_of[spoken(name)] for name in names]
    for row, name in stock.config.id2label.items():
        assert again.config.id2label[wanted[row]] == name, "the export calls its classes what the source called them"
        assert torch.equal(ours[:, wanted[row]], theirs[:, row]), "and a class's id is the task's"
    assert bool(found.notes) == (wanted != sorted(wanted))


def test_a_head_whose_classes_have_no_names_is_taken_as_it_is_and_said_so(tmp_path):
    stock = fine_tuned(tmp_path / "m", ("LABEL_0", "LABEL_1"))
    found = open_encoder(str(tmp_path / "m"), "classes", ("entailment", "not_entailment"), seed=0)
    assert torch.equal(found.weights["classifier.weight"], stock.classifier.weight) and not found.fresh
    assert "no names (LABEL_0, LABEL_1)" in found.notes[0] and "entailment, not_entailment" in found.notes[0]


@pytest.mark.parametrize("names", [("toxic", "fine"), ("entailment", "entailment"), ("0", "1"), ("a", "b", "c")])
def test_the_head_of_another_task_does_not_fit(tmp_path, names):
    fine_tuned(tmp_path / "m", names)
    found = open_encoder(str(tmp_path / "m"), "classes", ("entailment", "not_entailment"), seed=0)
    assert found.fresh == ("classifier.weight", "classifier.bias")
    assert f"classes are {', '.join(names)}, not entailment" in found.notes[0]
    assert found.config.id2label == {0: "entailment", 1: "not_entailment"}


def test_an_encoder_without_a_head_has_nothing_to_say_of_classes(folder):
    assert open_encoder(str(folder), "classes", MNLI, seed=0).notes == ()


@pytest.mark.parametrize("source", ["nothing/here", ""])
def test_no_model(tmp_path, monkeypatch, source):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="no model to open"):
        open_encoder(source or str(tmp_path), "classes", ("a", "b"), seed=0)


HUGE = 10**9
ODD = [
    {"hidden_size": HUGE},
    {"vocab_size": HUGE},
    {"intermediate_size": HUGE},
    {"num_hidden_layers": HUGE},
    {"num_attention_heads": HUGE},
    {"num_attention_heads": 0},
    {"num_attention_heads": -2},
    {"num_attention_heads": 7},
    {"hidden_size": 0},
    {"hidden_size": -4},
    {"hidden_size": "x"},
    {"hidden_size": None},
    {"hidden_size": [1]},
    {"vocab_size": 0},
    {"vocab_size": -1},
    {"vocab_size": "9"},
    {"num_hidden_layers": "2"},
    {"num_hidden_layers": 9},
    {"intermediate_size": -1},
    {"intermediate_size": None},
    {"hidden_act": "none"},
    {"hidden_act": 3},
    {"max_position_embeddings": HUGE},
    {"max_position_embeddings": -1},
    {"type_vocab_size": HUGE},
    {"layer_norm_eps": "x"},
    {"hidden_dropout_prob": 3.0},
    {"pad_token_id": HUGE},
    {"num_labels": HUGE},
    {"num_labels": -1},
    {"id2label": 7},
    {"model_type": "none"},
    {"model_type": [1]},
    {"quantization_config": {"quant_method": "gptq"}},
    {"quantization_config": 7},
    {"auto_map": {"AutoConfig": "a.B"}},
    {"model_type": "gpt2"},
    {"attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation": "kernels-community/flash-attn"},
    {"dtype": "none"},
    {"chunk_size_feed_forward": "x"},
]


@pytest.mark.parametrize("change", ODD, ids=str)
def test_an_odd_config_is_refused_or_harmless(folder, tmp_path, monkeypatch, change):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    downloads = []
    for name in ("load_and_register_attn_kernel", "get_kernel"):
        monkeypatch.setattr(f"transformers.integrations.hub_kernels.{name}", lambda *a, **_: downloads.append(a))
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text()) | change
    (copy / "config.json").write_text(json.dumps(config))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        made = open_encoder(str(copy), "classes", ("a", "b"), seed=0)
    except UserError as error:
        assert str(copy) in str(error) or "the model's config" in str(error)
    else:
        made.build()
    assert not downloads
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_positions_of_roberta_begin_behind_the_padding(tmp_path):
    config = RobertaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=34,
        pad_token_id=1,
    )
    model = RobertaForSequenceClassification(config).eval()
    assert _longest_row(model, config) == 32
    ids = torch.full((1, 33), 5)
    model(ids[:, :32])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)
