"""Models with fewer tokens, in folders that transformers saved: the logits of the whole model for the kept tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from cook.base.errors import UserError
from cook.cli import invoke
from cook.families.cpm_ant import ADAPTER as CPM_ANT
from cook.pruning.mask_file import write_mask_file
from tests.tiny_families import tiny_source

TEXT = "the model reads a row of text and learns which heads and dims it can do without. " * 20
SMALL = dict(vocab_size=310, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
ENDS = dict(bos_token_id=0, eos_token_id=1, pad_token_id=2)
# The same sums of products; a smaller matrix may take them in another order.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=306, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> type:
    """A model folder, and the class that loads it."""
    torch.manual_seed(0)
    if name == "cpm_ant":
        model = CPM_ANT.build(tiny_source("cpm_ant", vocab_size=310).config)
        for weight in model.parameters():
            torch.nn.init.normal_(weight, std=0.1)
        torch.save(model.state_dict(), folder / "model.pt")
        (folder / "config.json").write_text(json.dumps(tiny_source("cpm_ant", vocab_size=310).config))
    elif name == "bert":
        BertForMaskedLM(BertConfig(**SMALL)).save_pretrained(folder)
    else:
        config = LlamaConfig(**SMALL, **ENDS, tie_word_embeddings=name == "tied")
        model = LlamaForCausalLM(config)
        model.generation_config = GenerationConfig(**ENDS)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM


def count(folder: Path, text: Path, output: Path, *more: str) -> None:
    invoke("data", ["vocabulary", str(text), "--tokenizer", str(folder), "--output", str(output), *more])


@pytest.mark.parametrize("name", ["tied", "untied", "bert"])
def test_its_logits_are_those_of_the_whole_model(name, tokenizer, tmp_path, capsys):
    folder, text = tmp_path / "whole", tmp_path / "text.txt"
    kind = save(name, folder, tokenizer)
    text.write_text("the heads it can do without.\n")
    count(folder, text, tmp_path / "vocabulary.json", "--format", "text")
    masks = tmp_path / "dims.pt"
    write_mask_file(masks, {"dimff_z": (torch.arange(2 * 48).view(2, 48) % 3 > 0).float()})
    invoke(
        "reshape",
        ["--model", str(folder), "--vocabulary", str(tmp_path / "vocabulary.json"), "--verify"]
        + ["--dimff-mask", str(masks), "--output", str(tmp_path / "small")],
    )
    assert "equal to rounding" in capsys.readouterr().out
    invoke("reshape", ["--model", str(folder), "--dimff-mask", str(masks), "--output", str(tmp_path / "pruned")])
    whole, small = (kind.from_pretrained(tmp_path / part).eval() for part in ("pruned", "small"))
    kept = json.loads((tmp_path / "vocabulary.json").read_text())["kept"]
    assert small.config.vocab_size == len(kept) < 306 and small.config.intermediate_size == 32
    before, after = (AutoTokenizer.from_pretrained(tmp_path / part) for part in ("pruned", "small"))
    ids = after("the heads do without it.", return_tensors="pt").input_ids
    old = torch.tensor(kept)[ids]
    assert old.tolist() == before("the heads do without it.", return_tensors="pt").input_ids.tolist()
    with torch.no_grad():
        wanted, got = whole(old).logits[..., kept], small(ids).logits
    assert (got - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    if name != "bert":
        assert kept[small.config.eos_token_id] == 1 and kept[small.generation_config.pad_token_id] == 2
        assert after.decode(small.generate(ids, max_new_tokens=4, do_sample=False)[0])


def test_least_counts_are_proposed(tokenizer, tmp_path, capsys):
    save("tied", tmp_path / "whole", tokenizer)
    (tmp_path / "text.txt").write_text("the heads " * 60 + "it can")
    invoke(
        "data",
        ["vocabulary", str(tmp_path / "text.txt"), "--tokenizer", str(tmp_path / "whole"), "--json"]
        + ["--format", "text", "--min-count", "3"],
    )
    rows = {row["min_count"]: row for row in json.loads(capsys.readouterr().out)}
    ids = tokenizer((tmp_path / "text.txt").read_text()).input_ids
    assert set(rows) == {1, 2, 3, 5, 10, 20, 50, 100}
    assert rows[1]["covered"] == 1.0 and rows[1]["tokens"] >= rows[3]["tokens"] >= 256 + 3
    least = {token for token in set(ids) if ids.count(token) >= 3}
    # Single bytes stay in any case.
    assert rows[3]["covered"] >= sum(ids.count(token) for token in least) / len(ids)


def test_a_vocabulary_of_another_tokenizer_or_file_is_refused(tokenizer, tmp_path):
    save("tied", tmp_path / "whole", tokenizer)
    (tmp_path / "text.txt").write_text(TEXT)
    count(tmp_path / "whole", tmp_path / "text.txt", tmp_path / "vocabulary.json", "--format", "text")
    reshape = ["--model", str(tmp_path / "whole"), "--output", str(tmp_path / "small"), "--vocabulary"]
    for name, words in (
        ("min_count=0", "min_count=N with N at least 1"),
        ("min_count=2", "no run whose texts could be counted"),
        (str(tmp_path / "whole" / "config.json"), "not a vocabulary"),
    ):
        with pytest.raises(UserError, match=words):
            invoke("reshape", [*reshape, name])
    with pytest.raises(UserError, match="already exists"):
        count(tmp_path / "whole", tmp_path / "text.txt", tmp_path / "vocabulary.json", "--format", "text")
    content = json.loads((tmp_path / "vocabulary.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(content | {"tokenizer": "0" * 64}))
    with pytest.raises(UserError, match="another tokenizer"):
        invoke("reshape", [*reshape, str(tmp_path / "other.json")])
    assert not (tmp_path / "small").exists()


def test_a_head_of_another_task_with_a_row_per_token_is_refused(tokenizer, tmp_path):
    model = BertForPreTraining(BertConfig(**SMALL))
    model.save_pretrained(tmp_path / "whole")
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    (tmp_path / "whole" / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    tokenizer.save_pretrained(tmp_path / "whole")
    (tmp_path / "text.txt").write_text(TEXT)
    count(tmp_path / "whole", tmp_path / "text.txt", tmp_path / "vocabulary.json", "--format", "text")
    with pytest.raises(UserError, match="has a row per token"):
        invoke(
            "reshape",
            ["--model", str(tmp_path / "whole"), "--output", str(tmp_path / "small")]
            + ["--vocabulary", str(tmp_path / "vocabulary.json")],
        )
