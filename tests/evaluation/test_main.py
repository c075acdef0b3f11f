from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cook.adapters.cpm_ant import ADAPTER
from cook.base.errors import UserError
from cook.evaluation.__main__ import evaluate, load, windows
from cook.surgery.export import write_model_folder
from tests.models.cpm_ant_tiny import RAGGED, tiny_model
from tests.tiny_pruning import config_of

WORDS = [f"w{i}" for i in range(61)]
TEXT = " ".join(WORDS[i * i % 61] for i in range(100))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "model"
    write_model_folder(path, ADAPTER, config_of(**RAGGED), tiny_model(**RAGGED).state_dict().items())
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def numpy_loss(model, window, count):
    ids = torch.tensor([i * i % 61 for i in range(100)])
    losses = []
    for number in range(count):
        row = ids[number * window : (number + 1) * window]
        with torch.no_grad():
            logits = model(input_ids=row[None]).logits[0].numpy().astype(np.float64)
        for place in range(window - 1):
            losses.append(np.log(np.exp(logits[place]).sum()) - logits[place, row[place + 1]])
    return float(np.mean(losses)), len(losses)


@pytest.mark.parametrize(("window", "limit", "count"), [(16, None, 6), (16, 2, 2), (100, None, 1)])
def test_loss_of_the_windows(folder, window, limit, count):
    model, tokenizer = load(str(folder), False)
    got = evaluate(model, tokenizer, TEXT, window=window, batch_size=4, limit=limit)
    loss, tokens = numpy_loss(tiny_model(**RAGGED), window, count)
    assert got["loss"] == pytest.approx(loss, rel=1e-5) and got["tokens"] == tokens
    assert got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert got["parameters"] == sum(p.numel() for p in model.parameters()) and got["tokens_per_second"] > 0
    share = len(TEXT) * count * window / 100
    assert got["bits_per_byte"] == pytest.approx(loss * tokens / math.log(2) / share, rel=1e-5)


def test_windows_leave_the_rest_out():
    batches = list(windows(torch.arange(23), 5, 3, None))
    assert [batch.shape for batch in batches] == [(3, 5), (1, 5)] and int(batches[-1][-1, -1]) == 19


def test_the_command(folder, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "bad.txt").write_bytes(b"ab\xff")

    def run(*options):
        command = [sys.executable, "-m", "cook.evaluation", "--model", str(folder), "--window", "20", *options]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    done = run("--data", str(tmp_path / "text.txt"))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    loss, _ = numpy_loss(tiny_model(**RAGGED), 20, 5)
    assert result["model"] == str(folder) and result["loss"] == pytest.approx(loss)
    refused = run("--data", str(tmp_path / "bad.txt"))
    assert refused.returncode == 2 and "bad.txt: not UTF-8 at byte 2" in refused.stderr
    assert refused.stdout == "" and "Traceback" not in refused.stderr


@pytest.mark.parametrize("change", ["no config", "list", "weights"])
def test_folders_that_cannot_be_loaded(folder, change):
    config = folder / "config.json"
    if change == "no config":
        config.unlink()
    elif change == "list":
        config.write_text("[]")
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dim_model": 30}))
    with pytest.raises(UserError):
        load(str(folder), False)


def test_a_text_shorter_than_a_window_is_refused(folder):
    model, tokenizer = load(str(folder), False)
    with pytest.raises(UserError, match="less than a window"):
        evaluate(model, tokenizer, TEXT, window=101, batch_size=4, limit=None)
