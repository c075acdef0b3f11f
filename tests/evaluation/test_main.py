from __future__ import annotations

import json
import math
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from cook.base.errors import UserError, run_entry
from cook.cli import invoke
from cook.export.model_folder import write_model_folder
from cook.export.pruned_folder import prune_to_folder
from cook.families.source import load_model, open_model
from cook.models.cpm_ant import CpmAntForCausalLM
from cook.pruning.mask_file import write_mask_file
from cook.pruning.mask_set import coarse_to_tensors, fine_to_tensors
from tests.evaluation.conftest import IDS, TEXT, write_tokenizer
from tests.models.cpm_ant_tiny import RAGGED, tiny_model
from tests.tiny_families import tiny_source
from tests.tiny_pruning import random_masks
from tests.warm import interpreter

FIELDS = {
    "model",
    "loss",
    "perplexity",
    "bits_per_byte",
    "method",
    "bos",
    "tokens",
    "tokens_per_second",
    "peak_memory_bytes",
    "parameters",
    "dtype",
    "device",
}
SPEED = {"prefill_tokens_per_second", "decode_tokens_per_second", "first_token_ms", "token_ms"}


def numpy_loss(model, window, count):
    losses = []
    for number in range(count):
        row = torch.tensor(IDS[number * window : (number + 1) * window])
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0].numpy().astype(np.float64)
        for place in range(window - 1):
            losses.append(np.log(np.exp(logits[place]).sum()) - logits[place, row[place + 1]])
    return float(np.mean(losses)), len(losses)


@pytest.fixture
def text(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def evaluate(capsys, *options):
    invoke("eval", [str(option) for option in options])
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("window", "limit", "count"), [(16, None, 6), (16, 2, 2), (100, None, 1)])
def test_loss_of_the_windows(folder, text, capsys, window, limit, count):
    options = ["--window", window, "--batch-size", 4, "--no-speed", *(["--max-windows", limit] if limit else [])]
    got = evaluate(capsys, "--model", folder, "--data", text, *options)
    model = tiny_model(**RAGGED)
    loss, tokens = numpy_loss(model, window, count)
    assert set(got) == FIELDS and got["method"] == "windowed"
    assert got["loss"] == pytest.approx(loss, rel=1e-5) and got["tokens"] == tokens
    assert got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert got["bits_per_byte"] == pytest.approx(loss / math.log(2) * len(IDS) / len(TEXT), rel=1e-5)
    assert got["parameters"] == sum(p.numel() for p in model.parameters())
    assert got["tokens_per_second"] > 0 and 0 < got["peak_memory_bytes"] < 1 << 30
    assert (got["dtype"], got["device"]) == ("float32", "cpu")


def test_a_stock_model_strided_and_with_bos(stock_folder, text, capsys):
    got = evaluate(
        capsys,
        "--model",
        stock_folder,
        "--data",
        text,
        "--window",
        16,
        "--stride",
        5,
        "--bos",
        "--prompt-tokens",
        8,
        "--new-tokens",
        2,
        "--repeats",
        1,
    )
    model, losses = AutoModelForCausalLM.from_pretrained(stock_folder), []
    for place, token in enumerate(IDS):
        start = max(0, math.ceil((place + 1 - 15) / 5)) * 5
        with torch.no_grad():
            logits = model(torch.tensor([[61, *IDS[start:place]]])).logits[0, -1].double()
        losses.append(float(torch.logsumexp(logits, 0) - logits[token]))
    assert got["tokens"] == 100 and got["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert set(got) == FIELDS | SPEED and all(got[name] > 0 for name in SPEED) and got["method"] == "strided"


def begin_texts_with_bos(folder):
    """Gives a folder's tokenizer the template that Gemma's and Llama's have."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = template
    tokenizer.save_pretrained(folder)


def test_windows_begin_as_the_tokenizer_begins_texts(stock_folder, text, capsys):
    options = ("--model", stock_folder, "--data", text, "--window", 16, "--no-speed")
    plain, without, with_bos = (evaluate(capsys, *options, *more) for more in ([], ["--no-bos"], ["--bos"]))
    begin_texts_with_bos(stock_folder)
    assert AutoTokenizer.from_pretrained(stock_folder)("w3")["input_ids"] == [61, 3]
    by_default, off = evaluate(capsys, *options), evaluate(capsys, *options, "--no-bos")
    model, losses = AutoModelForCausalLM.from_pretrained(stock_folder), []
    for start in range(0, 90, 15):
        row = torch.tensor([[61, *IDS[start : start + 15]]])
        losses.append(float(model(row, labels=row).loss.detach()))
    assert by_default["loss"] == with_bos["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert plain["loss"] == without["loss"] == off["loss"] != with_bos["loss"]
    assert [got["bos"] for got in (plain, without, off, with_bos, by_default)] == [False, False, False, True, True]


def test_a_stride_that_leaves_no_place_for_the_token_of_the_tokenizer(stock_folder, text):
    begin_texts_with_bos(stock_folder)
    options = ["--model", str(stock_folder), "--data", text, "--no-speed", "--window", "8", "--stride", "8"]
    with pytest.raises(UserError, match="at most 7, since each window begins with the beginning-of-sequence token"):
        invoke("eval", options)
    invoke("eval", [*options, "--no-bos"])


def test_other_precision(folder, text, capsys):
    options = ("--model", folder, "--data", text, "--window", 20, "--no-speed")
    rough, exact = evaluate(capsys, *options, "--dtype", "bfloat16"), evaluate(capsys, *options)
    assert rough["dtype"] == "bfloat16" and rough["loss"] != exact["loss"]
    assert rough["loss"] == pytest.approx(exact["loss"], rel=0.05)  # 8 bits of mantissa


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_a_cpu_that_would_emulate_bf16_computes_in_fp32(stock_folder, text, capsys, monkeypatch, tmp_path, fast, dtype):
    folder = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(stock_folder, dtype=torch.bfloat16).save_pretrained(folder)
    for file in Path(stock_folder).glob("*token*"):
        shutil.copy(file, folder)
    monkeypatch.setattr("cook.evaluation.loading.cpu_has_fast_bf16", lambda: fast)
    got = evaluate(capsys, "--model", folder, "--data", text, "--window", 16, "--no-speed")
    assert got["dtype"] == dtype


def test_a_model_that_has_broken_down_is_still_json(folder, text, capsys, monkeypatch):
    monkeypatch.setattr(CpmAntForCausalLM, "logits", lambda _, x: x.new_full((*x.shape[:2], 61), math.nan))
    got = evaluate(capsys, "--model", folder, "--data", text, "--window", 20, "--no-speed")
    assert got["loss"] is got["perplexity"] is got["bits_per_byte"] is None and got["tokens"] == 95


def test_a_user_s_mistake_is_one_line_and_exit_code_2(folder, tmp_path, capsys):
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")
    with pytest.raises(SystemExit) as stop:
        run_entry(lambda: invoke("eval", ["--model", str(folder), "--data", str(tmp_path / "bad.txt")]))
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and "bad.txt: not UTF-8 at byte 2" in err and out == ""


def test_the_command(folder, text):
    options = ["--data", text, "--window", "20", "--prompt-tokens", "8", "--new-tokens", "2"]
    command = [interpreter(), "-m", "cook", "eval", "--model", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    loss, _ = numpy_loss(tiny_model(**RAGGED), 20, 5)
    assert result["model"] == str(folder) and result["loss"] == pytest.approx(loss) and set(result) == FIELDS | SPEED


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--window", "101"], "fewer than a window"),
        (["--window", "1", "--batch-size", "0"], "--window is out of range.*--batch-size is out of range"),
        (["--window", "8", "--stride", "9"], "at most 8"),
        (["--window", "8", "--stride", "8", "--bos"], "at most 7"),
        (["--window", "20", "--bos"], "no beginning-of-sequence token"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--data", "missing.txt"], "missing.txt: cannot be read"),
        (["--data", "/dev/null"], "nothing to score"),
    ],
)
def test_mistakes(folder, text, options, words):
    with pytest.raises(UserError, match="(?s)" + words):
        data = [] if "--data" in options else ["--data", text]
        invoke("eval", ["--model", str(folder), *data, "--no-speed", *options])


@pytest.mark.parametrize(
    "options", [["--window", "65"], ["--window", "8", "--prompt-tokens", "60", "--new-tokens", "5"]]
)
def test_more_positions_than_the_model_has(stock_folder, text, options):
    with pytest.raises(UserError, match="only 64 positions"):
        invoke("eval", ["--model", str(stock_folder), "--data", text, *options])


@pytest.mark.parametrize("architecture", ["BertForMaskedLM", "BertModel", "BertForSequenceClassification"])
def test_encoders_have_no_perplexity(tmp_path, text, architecture):
    source = tiny_source("bert", architectures=[architecture])
    write_model_folder(tmp_path / "bert", source.adapter, source.config, source.tensors.items())
    write_tokenizer(tmp_path / "bert")
    with pytest.raises(UserError, match="not a causal language model"):
        invoke("eval", ["--model", str(tmp_path / "bert"), "--data", text, "--window", "20"])


@pytest.mark.parametrize("name", ["llama, tied", "gemma2", "gpt2", "gpt_neox", "opt, norms behind"])
def test_decoders_and_their_ragged_exports(tmp_path, text, capsys, name):
    """The dense model with its masks scores as the reshaped one does, and as the loss of transformers."""
    source = tiny_source(name)
    space = source.adapter.space(source.config)
    masks = random_masks(space, 5) if all(g.sections == 1 for g in space.groups) else {}
    write_model_folder(tmp_path / "dense", source.adapter, source.config, source.tensors.items())
    prune_to_folder(open_model(tmp_path / "dense"), space, masks, tmp_path / "small")
    write_mask_file(tmp_path / "coarse.pt", coarse_to_tensors(space, masks))
    write_mask_file(tmp_path / "fine.pt", fine_to_tensors(space, masks))
    for folder in ("dense", "small"):
        write_tokenizer(tmp_path / folder)
    held = ("--coarse-mask", tmp_path / "coarse.pt", "--heads-mask", tmp_path / "fine.pt")
    options = ("--data", text, "--window", 20, "--prompt-tokens", 6, "--new-tokens", 2, "--repeats", 1)
    masked = evaluate(capsys, "--model", tmp_path / "dense", *held, *options)
    small = evaluate(capsys, "--model", tmp_path / "small", *options)
    model = load_model(open_model(tmp_path / "small"))
    rows = torch.tensor(IDS).view(5, 20)
    with torch.no_grad():
        wanted = torch.stack([model(input_ids=row[None], labels=row[None]).loss for row in rows]).mean()
    assert small["loss"] == pytest.approx(float(wanted), rel=1e-5) == pytest.approx(masked["loss"], rel=1e-5)
    assert set(small) == FIELDS | SPEED and small["parameters"] < masked["parameters"]


def test_ids_that_the_model_does_not_know_are_refused(tmp_path):
    source = tiny_source("llama")
    folder = tmp_path / "m"
    prune_to_folder(source, source.adapter.space(source.config), {}, folder)
    text = tmp_path / "t.txt"
    text.write_text("a b <new9> c " * 50)
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    tokenizer.add_tokens([f"<new{number}>" for number in range(60)])  # ids up to 63, where the model has 61
    tokenizer.save_pretrained(folder)
    arguments = ["--model", str(folder), "--data", str(text), "--window", "16", "--no-speed"]
    invoke("eval", arguments)
    text.write_text("a b <new59> c " * 50)
    with pytest.raises(UserError, match=r"the tokenizer gives the id 63, but the model has 61 ids[\s\S]*remedy"):
        invoke("eval", arguments)
