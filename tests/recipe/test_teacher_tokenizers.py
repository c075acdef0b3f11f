"""A teacher's tokenizer gives the run's ids, or is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cook.base.errors import UserError
from cook.recipe.distillation import check_teacher_tokenizer
from cook.text.hf import HuggingFaceTokenizer
from tests.recipe.tiny_run import train, write_run

TEXT = ["the river goes down to the green hill and the old man sees a red bird over the water"] * 20
DATED = [*TEXT, *["in 1998 and 2007"] * 60]


def write_tokenizer(folder: Path, *, text=TEXT, size=300, special=("<s>", "</s>"), later=()) -> Path:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        text,
        trainers.BpeTrainer(
            vocab_size=size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        ),
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    fast.add_tokens(list(later), special_tokens=True)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture
def own(tmp_path) -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer.load(write_tokenizer(tmp_path / "own", text=DATED))


def teacher(folder: Path, **changes) -> Path:
    return write_tokenizer(folder, **({"text": DATED} | changes))


def test_the_same_tokenizer_passes_also_with_chat_tokens_of_its_own(own, tmp_path):
    check_teacher_tokenizer(teacher(tmp_path / "a"), own)
    check_teacher_tokenizer(teacher(tmp_path / "b", later=("<|user|>", "<|end|>")), own)


@pytest.mark.parametrize(
    "changes",
    [
        {"text": TEXT[:1] + ["a stone house by a long road, and the wind at night"] * 20},
        {"size": 290},
        {"special": ("</s>", "<s>")},
        {"special": ("<pad>", "<s>", "</s>"), "size": 301},
    ],
    ids=["other words", "a smaller one", "special ids swapped", "moved by one"],
)
def test_another_vocabulary_is_refused(own, tmp_path, changes):
    with pytest.raises(UserError, match="gives other ids than the run's"):
        check_teacher_tokenizer(teacher(tmp_path / "t", **changes), own)


def test_the_same_vocabulary_cut_otherwise_is_refused(own, tmp_path):
    folder = teacher(tmp_path / "t")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Digits", "individual_digits": True},
            content["pre_tokenizer"],
        ],
    }
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="begins with the ids"):
        check_teacher_tokenizer(folder, own)


def test_without_a_tokenizer_it_is_said_and_an_unreadable_one_is_refused(own, tmp_path, capsys):
    (tmp_path / "none").mkdir()
    check_teacher_tokenizer(tmp_path / "none", own)
    assert "no tokenizer beside the teacher" in capsys.readouterr().out
    (tmp_path / "none" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be compared"):
        check_teacher_tokenizer(tmp_path / "none", own)


def test_a_run_that_makes_its_own_tokenizer_takes_its_own_model_as_teacher_and_no_strangers(tmp_path):
    stages = ("pretrain", "layer_mask")
    given = {"teacher": "out/pretrain/model", "ce_scale": 1.0, "stages": ["layer_mask"]}
    write_run(tmp_path, stages, training__steps=2, distillation=given)
    result = train(tmp_path, "--stage", "all")
    assert result.code == 0, result
    strange = tmp_path / "out" / "pretrain" / "model"
    for path in strange.glob("tokenizer*"):
        path.unlink()
    write_tokenizer(strange)
    result = train(tmp_path, "--stage", "layer_mask", "--resume", "never")
    assert result.code == 2 and "gives other ids than the run's" in result.err, result
