from __future__ import annotations

import gc
import json
import weakref

import pytest

from cook.base.errors import UserError
from cook.cli import invoke
from cook.evaluation import measure as room
from cook.export.model_folder import write_model_folder
from cook.export.pruned_folder import prune_to_folder
from cook.families.cpm_ant import ADAPTER
from cook.families.source import open_model
from cook.pruning.mask_file import write_mask_file
from cook.pruning.mask_set import coarse_to_tensors, fine_to_tensors
from tests.evaluation.conftest import TEXT, WORDS, write_tokenizer
from tests.models.cpm_ant_tiny import tiny_model
from tests.tiny_pruning import config_of, random_masks, tiny_space

SPEED = {"prefill_tokens_per_second", "decode_tokens_per_second", "first_token_ms", "token_ms"}
QUICK = ("--window", "10", "--prompt-tokens", "6", "--new-tokens", "2", "--repeats", "1")


@pytest.fixture
def ladder(tmp_path):
    """A dense model, its masks, and the reshaped model, as `compare` takes them."""
    space, masks = tiny_space(), random_masks(tiny_space(), 2)
    write_model_folder(tmp_path / "dense", ADAPTER, config_of(), tiny_model().state_dict().items())
    write_mask_file(tmp_path / "coarse.pt", coarse_to_tensors(space, masks))
    write_mask_file(tmp_path / "fine.pt", fine_to_tensors(space, masks))
    prune_to_folder(open_model(tmp_path / "dense"), space, masks, tmp_path / "small")
    for name in ("dense", "small"):
        write_tokenizer(tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    masked = f"masked={tmp_path}/dense,coarse={tmp_path}/coarse.pt,heads={tmp_path}/fine.pt"
    return [f"{tmp_path}/dense", masked, f"{tmp_path}/small"]


def compare(tmp_path, *options):
    invoke("compare", [*options, "--data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out")])
    return json.loads((tmp_path / "out" / "comparison.json").read_text())


def test_dense_masked_reshaped_and_somebody_elses(tmp_path, ladder, stock_folder, capsys):
    got = compare(tmp_path, *ladder, f"theirs={stock_folder}", *QUICK)
    dense, masked, small, theirs = got["models"]
    assert [m["name"] for m in got["models"]] == ["dense", "masked", "small", "theirs"] and got["same_tokens"]
    assert masked["loss"] == pytest.approx(small["loss"], rel=1e-5) and abs(masked["loss"] - dense["loss"]) > 1e-3
    assert masked["parameters"] == dense["parameters"] > small["parameters"]
    assert small["ratio_to_first"]["parameters"] == small["parameters"] / dense["parameters"]
    assert small["ratio_to_first"]["decode_tokens_per_second"] == pytest.approx(
        small["decode_tokens_per_second"] / dense["decode_tokens_per_second"]
    )
    assert set(masked["masks"]) == {"coarse", "heads"} and "masks" not in theirs
    # The single command measures the same.
    capsys.readouterr()
    invoke("eval", ["--model", str(stock_folder), "--data", str(tmp_path / "text.txt"), "--window", "10", "--no-speed"])
    single = json.loads(capsys.readouterr().out)
    assert single["loss"] == theirs["loss"] and single["tokens"] == theirs["tokens"]
    assert (tmp_path / "out" / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_layers_on_the_disk_give_the_same_losses_and_no_speed(tmp_path, ladder, stock_folder, capsys):
    models = [*ladder, f"theirs={stock_folder}"]
    memory = compare(tmp_path, *models, *QUICK, "--no-speed")["models"]
    disk = compare(tmp_path, *models, *QUICK, "--weights", "disk")["models"]
    for whole, streamed in zip(memory, disk, strict=True):
        assert streamed["loss"] == whole["loss"] and streamed["parameters"] == whole["parameters"]
        assert streamed["weights"] == "disk" and "weights" not in whole and not streamed.keys() & SPEED
    invoke("eval", ["--model", ladder[2], "--data", str(tmp_path / "text.txt"), "--window", "10", "--weights", "disk"])
    single = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert single["loss"] == disk[2]["loss"] and not single.keys() & SPEED


def test_a_model_that_does_not_fit_into_memory_is_streamed(tmp_path, ladder, monkeypatch):
    monkeypatch.setattr("cook.families.streamed.free_memory", lambda device: 1000)
    (found,) = compare(tmp_path, ladder[0], *QUICK)["models"]
    assert found["weights"] == "disk"


def test_the_table(tmp_path, ladder, capsys):
    got = compare(tmp_path, *ladder, *QUICK, "--no-speed")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("|")[1:-1][0].strip() == "model" and len(lines) == 6 and lines[-1].startswith("written: ")
    small = got["models"][2]
    assert f"{small['perplexity']:.2f}" in lines[4] and f"({small['ratio_to_first']['parameters']:.2f}×)" in lines[4]
    assert "prefill" not in lines[0] and "prefill_tokens_per_second" not in small


def test_other_tokens_are_compared_by_bytes(tmp_path, ladder, stock_folder, capsys):
    write_tokenizer(stock_folder, ("w0", *WORDS[2:], "w1"))
    got = compare(tmp_path, ladder[0], str(stock_folder), *QUICK, "--no-speed")
    out = capsys.readouterr().out
    assert (
        not got["same_tokens"] and "bits per byte" in out and "tokenizers differ" in out and "perplexity |" not in out
    )


def test_one_model_is_let_go_before_the_next_when_nothing_is_timed(tmp_path, ladder, monkeypatch):
    models, alive, measure = [], [], room.measure_loss

    def watched(*arguments):
        gc.collect()
        alive.append(sum(model() is not None for model in models))
        loaded, record = measure(*arguments)
        models.append(weakref.ref(loaded.model))
        return loaded, record

    monkeypatch.setattr(room, "measure_loss", watched)
    compare(tmp_path, *ladder, *QUICK, "--no-speed")
    assert alive == [0, 0, 0]
    compare(tmp_path, *ladder[1:], *QUICK)
    assert alive[3:] == [0, 1]


def test_mistakes(tmp_path, ladder):
    with pytest.raises(UserError, match="two models are called 'dense'"):
        compare(tmp_path, ladder[0], ladder[0], *QUICK)
    with pytest.raises(UserError, match="not a model folder"):
        compare(tmp_path, ladder[0], str(tmp_path / "nowhere"), *QUICK)
    assert not (tmp_path / "out").exists()
