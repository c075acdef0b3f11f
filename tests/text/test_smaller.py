"""Tokenizers with fewer tokens, against the whole tokenizers of the tokenizers library, sentencepiece and jieba."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, CpmAntTokenizer, PreTrainedTokenizerFast

from cook.base.errors import UserError
from cook.text.jieba import SPECIAL, JiebaTokenizer
from cook.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from cook.text.smaller import completed, shrink_tokenizer

TEXT = (Path(__file__).parents[2] / "docs" / "explanation" / "gates_and_budgets.md").read_text()
LINES = TEXT.split("\n") + [line[cut : cut + 9] for line in TEXT.split("\n") for cut in range(0, len(line), 11)]
STRANGE = "naïve façade — 中文分词 😀 \t\u00a0 <s> 0x1F"
KINDS = ("byte-level", "fallback to bytes", "unigram", "word pieces")


def library(kind: str) -> Tokenizer:
    """A tokenizer that the tokenizers library trains on TEXT."""
    if kind == "byte-level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=700,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=500, special_tokens=["<s>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        )
    else:
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(
            vocab_size=600, special_tokens=["<pad>", "<unk>", "<s>", "</s>"], show_progress=False
        )
    made.train_from_iterator(LINES, trainer)
    if kind == "word pieces":
        made.post_processor = processors.BertProcessing(("</s>", 3), ("<s>", 2))
    return made


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    """A tokenizer's folder, and a generation config that names an ordinary token."""
    path = tmp_path_factory.mktemp("whole")
    if request.param == "fallback to bytes":
        train_sentencepiece(LINES, path / "sentencepiece.model", vocab_size=700, seed=0)
        SentencePieceTokenizer.load(path / "sentencepiece.model").save(path)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=library(request.param), bos_token="<s>", eos_token="</s>")
        tokenizer.add_tokens(["<tool_call>"])
        tokenizer.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 401], "max_length": 401}))
    return path


def smaller(folder: Path, target: Path, chosen: list[int]) -> tuple[int, ...]:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    kept = completed(folder, chosen)
    shrink_tokenizer(target, kept)
    return kept


@pytest.mark.parametrize("seed", range(3))
def test_a_text_whose_tokens_stay_is_encoded_as_before_and_any_other_can_be(folder, tmp_path, seed):
    whole, draw = AutoTokenizer.from_pretrained(folder), random.Random(seed)
    size = max(whole.get_vocab().values()) + 1
    kept = smaller(folder, tmp_path / "small", [n for n in range(size) if draw.random() < (0.3, 0.6, 0.9)[seed]])
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    number = {old: new for new, old in enumerate(kept)}
    assert len(kept) < size and sorted(small.get_vocab().values()) == list(range(len(kept)))
    as_before = 0
    for line in LINES:
        before, after = whole(line)["input_ids"], small(line)["input_ids"]
        if all(token in number for token in before):
            assert after == [number[token] for token in before], line
            as_before += 1
        assert set(after) <= set(range(len(kept)))
        if whole.decode(before, skip_special_tokens=True) == line:
            assert small.decode(after, skip_special_tokens=True) == line
    assert as_before >= 20
    assert small.decode(small(STRANGE)["input_ids"]) == whole.decode(whole(STRANGE)["input_ids"])


def test_special_and_added_tokens_and_ids_in_configs_follow(folder, tmp_path):
    whole = AutoTokenizer.from_pretrained(folder)
    kept = smaller(folder, tmp_path / "small", [5])
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert (small.bos_token, small.eos_token) == (whole.bos_token, whole.eos_token)
    assert kept[small.bos_token_id] == whole.bos_token_id and kept[small.eos_token_id] == whole.eos_token_id
    if "<tool_call>" in whole.get_vocab():
        text = "<tool_call></s>"
        assert [kept[n] for n in small(text)["input_ids"]] == whole(text)["input_ids"]
    generation = json.loads((tmp_path / "small" / "generation_config.json").read_text())
    assert [kept[n] for n in generation["eos_token_id"]] == [1, 401] and generation["max_length"] == 401


def test_a_sentencepiece_model_gives_the_ids_of_the_smaller_tokenizer(tmp_path):
    train_sentencepiece(LINES, tmp_path / "whole" / "sentencepiece.model", vocab_size=700, seed=0)
    SentencePieceTokenizer.load(tmp_path / "whole" / "sentencepiece.model").save(tmp_path / "whole")
    smaller(tmp_path / "whole", tmp_path / "small", list(range(0, 700, 2)))
    reader = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "small" / "sentencepiece.model"))
    files = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert all([reader.bos_id(), *reader.encode(line)] == files(line)["input_ids"] for line in (*LINES, STRANGE))
    assert reader.bos_id() == files.bos_token_id and reader.eos_id() == files.eos_token_id


def test_a_vocabulary_of_cpm_ant_keeps_its_special_lines_and_characters(tmp_path):
    pieces = ["中", "国", "中国", "中国人", "人", "北京", "大学", "北京大学", "a", "ab", "abc", "b", "c"]
    whole = tmp_path / "whole"
    JiebaTokenizer([*SPECIAL, *pieces], "test", cut=lambda text: [text]).save(whole)
    kept = smaller(
        whole, tmp_path / "small", [len(SPECIAL) + pieces.index(piece) for piece in ("中国", "中国人", "ab")]
    )
    lines = (tmp_path / "small" / "vocab.txt").read_text().splitlines()
    assert lines == [*SPECIAL, "中", "国", "中国", "中国人", "人", "a", "ab", "b", "c"]
    theirs, before = CpmAntTokenizer(str(tmp_path / "small" / "vocab.txt")), CpmAntTokenizer(str(whole / "vocab.txt"))
    for text in ("中国人ab", "ab 中", "人"):
        assert [kept[n] for n in theirs(text)["input_ids"]] == before(text)["input_ids"]


def test_what_cannot_be_made_smaller_is_refused(tmp_path):
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trainer = trainers.BpeTrainer(vocab_size=99, special_tokens=["<s>"], end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator(["some words"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<s>").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="neither a prefix nor a suffix"):
        completed(tmp_path, [1])
