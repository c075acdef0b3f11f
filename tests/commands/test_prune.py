"""`cook prune`: a model pruned by one command."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import cook
from cook.base.errors import UserError
from cook.cli import invoke
from cook.evaluation import profile
from cook.families.source import open_model
from cook.pruning.block_times import read_block_times
from cook.pruning.counts import forward_flops
from cook.report.tables import human_count
from tests.recipe.tiny_run import REPOSITORY, run

TEXT = "the model reads a row of text and learns which heads and dims it can do without. " * 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with `model/`, as transformers saves it, and `text/`."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    ends = dict(bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends).save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    (folder / "text").mkdir()
    for name in ("a.txt", "b.txt", "c.txt"):
        (folder / "text" / name).write_text(TEXT)
    return folder


def prune(tiny: Path, output: Path, keep: str, *more: str) -> None:
    given = [str(tiny / "model"), "--data", str(tiny / "text"), "--output", str(output), "--keep", keep]
    invoke("prune", [*given, "--steps", "4", "--max-length", "64", *more])


def test_a_model_is_pruned_by_one_command(tiny, tmp_path, capfd):
    more = ("--finetune-steps", "2", "--vocabulary", "min_count=200")
    prune(tiny, tmp_path / "out", "dims=0.5", *more)
    assert "equal to rounding" in capfd.readouterr().out
    recipe = json.loads((tmp_path / "out" / "recipe" / "bmcook.json").read_text())
    assert recipe["distillation"]["teacher"] == "self" and recipe["distillation"]["stages"] == ["ffn_mask"]
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert small.config.intermediate_size == 32 and type(small) is LlamaForCausalLM
    assert small.config.mlp_bias and small.model.layers[1].mlp.down_proj.bias.any(), "means of the removed dims"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    ids = tokenizer("the model")["input_ids"]
    assert small(torch.tensor([ids])).logits.shape == (1, len(ids), len(tokenizer)) and len(tokenizer) < 300
    report, size = (tmp_path / "out" / "report" / "report.md").read_text(), sum(p.numel() for p in small.parameters())
    assert f"with {len(tokenizer)} of the 300 tokens" in report and human_count(size) in report
    assert human_count(size) in (tmp_path / "out" / "model" / "README.md").read_text()
    capfd.readouterr()
    prune(tiny, tmp_path / "out", "dims=0.5", *more)
    assert "already finished" in "".join(capfd.readouterr())
    with pytest.raises(UserError, match=r"(?s)another job.*target_dimff: 32 there, 16 by these options.*remedy"):
        prune(tiny, tmp_path / "out", "dims=0.25", *more)


def test_one_command_makes_several_sizes(tiny, tmp_path, capfd):
    prune(tiny, tmp_path / "out", "params=0.9,0.75", "--finetune-steps", "2")
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny / "model").parameters())
    for size in (0.9, 0.75):
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model" / str(size), trust_remote_code=True)
        assert sum(p.numel() for p in small.parameters()) == pytest.approx(size * whole, rel=0.03)
    out = capfd.readouterr().out
    assert out.count("equal to rounding") == 2 and out.count("| all, finetuned, ") == 2


@pytest.mark.parametrize("off", [False, True])
def test_the_budget_counts_biases_that_are_added(tiny, tmp_path, off):
    more = ("--compensation", "off") if off else ()
    prune(tiny, tmp_path / "out", "params=0.9", "--units", "dims", *more, "--round-to", "1")
    whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny / "model").parameters())
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True)
    # A dim is 96 of 47,072 parameters, and one more with biases of gate and up.
    assert abs(sum(p.numel() for p in small.parameters()) - 0.9 * whole) <= 50
    assert bool(small.config.mlp_bias) is not off


FEWER = ("--vocabulary", "min_count=200", "--units", "dims", "--round-to", "1", "--compensation", "off")


@pytest.mark.parametrize("key", ["params", "flops"])
def test_the_budget_counts_tokens_that_are_removed_first(tiny, tmp_path, capfd, key):
    with pytest.raises(UserError, match=rf"(?s){key}=0.99: as much goes with the tokens alone.*less than 0\.9"):
        prune(tiny, tmp_path / "out", f"{key}=0.99", *FEWER)
    assert not (tmp_path / "out").exists()
    prune(tiny, tmp_path / "out", f"{key}=0.7", *FEWER)
    assert capfd.readouterr().out.count("equal to rounding") == 2, "the tokens were cut once, then the dims"
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / "model")) == small.config.vocab_size < 300
    if key == "params":
        whole = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny / "model").parameters())
        # A dim is 96 of 47,072 parameters.
        assert abs(sum(p.numel() for p in small.parameters()) - 0.7 * whole) <= 48
    else:
        spaces = [s.adapter.space(s.config) for s in map(open_model, (tiny / "model", tmp_path / "out" / "model"))]
        whole, left = (forward_flops(space, context=64) for space in spaces)
        assert abs(left - 0.7 * whole) <= 96  # a dim is 192 FLOPs per token
    for other in (FEWER[2:], ("--vocabulary", "min_count=100", *FEWER[2:])):
        with pytest.raises(UserError, match="has the recipe of another job"):
            prune(tiny, tmp_path / "out", f"{key}=0.7", *other)


def test_a_model_with_fewer_tokens_is_used_again_only_by_its_own_job(tiny, tmp_path, capfd):
    def sizes(least):
        prune(tiny, tmp_path / "out", "params=0.7", "--vocabulary", f"min_count={least}", *FEWER[2:], "--dry-run")
        config = json.loads((tmp_path / "out" / "fewer_tokens" / "config.json").read_text())
        return config["vocab_size"], "equal to rounding" in capfd.readouterr().out

    first = sizes(200)
    assert first[1] and sizes(200) == (first[0], False)
    shutil.rmtree(tmp_path / "out" / "recipe")
    second = sizes(1)
    assert second[1] and second[0] > first[0]


@pytest.mark.parametrize(("search", "steps"), [("layer", 1), ("block", 1), ("none", 4)])
def test_blocks_are_searched_for_unless_gates_are_wanted(tiny, tmp_path, search, steps):
    more = () if search == "layer" else ("--search", search)
    prune(tiny, tmp_path / "out", "blocks=0.67", *more, *(() if search == "layer" else ("--dry-run",)))
    scheme = json.loads((tmp_path / "out" / "recipe" / "l0_pruning.json").read_text())
    stages = json.loads((tmp_path / "out" / "recipe" / "bmcook.json").read_text())["stages"]
    assert [stage["training"]["steps"] for stage in stages] == [steps]
    assert scheme.get("gates") == ({"start": "search", "start_steps": 2} if search != "none" else None)
    if search == "layer":
        small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        assert type(small) is LlamaForCausalLM and small.config.num_hidden_layers == 2


def test_one_budget_takes_from_every_dimension_that_is_not_pinned(tiny, tmp_path, capfd):
    prune(tiny, tmp_path / "out", "params=0.6", "--units", "all", "--pin", "heads")
    out = capfd.readouterr().out
    assert "equal to rounding" in out and "| taken from" in out
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True)
    whole = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(tiny / "model").parameters())
    # A pair of head dims is the largest unit of this tiny model.
    assert sum(p.numel() for p in small.parameters()) == pytest.approx(0.6 * whole, rel=0.04)
    masks = {path.stem for path in (tmp_path / "out" / "run" / "masks").glob("*.pt")}
    assert masks == {"layer_mask", "dimff_mask", "head_dims_mask", "hidden_mask"}
    assert (tmp_path / "out" / "report" / "spending.png").stat().st_size > 5000
    scheme = json.loads((tmp_path / "out" / "recipe" / "l0_pruning.json").read_text())
    assert scheme["joint"]["pin"] == ["heads"] and scheme["joint"]["blocks"] is True
    assert (scheme["fine-grained"]["target_head_dim"], scheme["fine-grained"]["target_hidden"]) == (4, 32)


@pytest.mark.parametrize(
    ("keep", "more", "words"),
    [
        ("dims=0.5", ["--units", "all"], "--units: for one budget of the whole model"),
        ("params=0.5", ["--units", "neurons"], "--units neurons: there are no such units"),
        ("params=0.5", ["--units", "heads,dims"], "repeat --units for several"),
        ("params=0.5", ["--units", "all", "--pin", "all"], "--pin all: there are no such units"),
        ("params=0.5", ["--units", "experts"], "has no experts"),
        ("params=0.5", ["--pin", "heads", "--pin", "dims"], "nothing is left to prune"),
        ("head_dims=3", [], "head_dims=3 cannot be reached"),
    ],
)
def test_units_that_a_budget_cannot_have(tiny, tmp_path, keep, more, words):
    with pytest.raises(UserError, match=words):
        prune(tiny, tmp_path / "out", keep, *more)


@pytest.mark.parametrize("command", ["prune", "moefy"])
def test_outputs_models_and_texts_that_cannot_be_used_are_named_before_anything_is_written(tiny, tmp_path, command):
    def run(model, output, data):
        options = ["--output", output, "--keep", "dims=0.5"] if command == "prune" else [output]
        invoke(command, [str(model), *options, "--data", str(data), "--max-length", "32", "--dry-run"])

    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    shutil.copytree(tiny / "model", tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    before = sorted(tmp_path.rglob("*"))
    for model, output, data, words in (
        ("model", "file", "text", "file: no folder can be made there"),
        ("model", "file/below", "text", "file/below: no folder can be made there"),
        (tmp_path / "mute", "mute", "text", "mute: the folder of the model itself"),
        (tmp_path / "mute", "out", "text", "mute: there is no tokenizer in this folder"),
        ("model", "out", tmp_path / "empty", "empty: there are no files"),
    ):
        with pytest.raises(UserError, match=words):
            run(tiny / model, str(tmp_path / output), tiny / data)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_errors_of_a_recipe_name_no_temporary_file(tiny, tmp_path):
    with pytest.raises(UserError) as error:
        prune(tiny, tmp_path / "out", "dims=0.5", "--text-field", "")
    assert "bmcook.json" in str(error.value) and "cook-plan-" not in str(error.value)


@pytest.mark.parametrize("unit", [None, "kv_group"])
def test_query_heads_of_one_budget_by_one_command(tiny, tmp_path, unit):
    prune(tiny, tmp_path / "out", "params=0.8", *(["--head-unit", unit] if unit else []))
    heads = torch.load(tmp_path / "out" / "run" / "masks" / "heads_mask.pt", weights_only=True)["heads_z"]
    numbers = heads.view(-1, 4, 2).sum(2)
    assert (numbers == 1).any() == (unit is None)
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model", trust_remote_code=True)
    whole = sum(p.numel() for p in LlamaForCausalLM.from_pretrained(tiny / "model").parameters())
    assert sum(p.numel() for p in small.parameters()) == pytest.approx(0.8 * whole, rel=0.02)


@pytest.fixture(scope="module")
def uneven(tiny, tmp_path_factory) -> Path:
    """As `tiny`, with a model whose blocks have different numbers of query heads, as a budget for all leaves them."""
    folder = tmp_path_factory.mktemp("uneven")
    masks = {"layers.0.heads": torch.tensor([1.0, 1, 0, 1, 1, 1, 1, 1]), "layers.0.keys": torch.ones(4)}
    cook.reshape(LlamaForCausalLM.from_pretrained(tiny / "model"), masks).save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(folder / "model")
    shutil.copytree(tiny / "text", folder / "text")
    return folder


@pytest.mark.parametrize("keep", ["params=0.8", "dims=0.5", "hidden=0.75", "blocks=0.7"])
def test_uneven_blocks_are_pruned_again(uneven, keep, tmp_path, capfd):
    prune(uneven, tmp_path / "out", keep)
    assert "equal to rounding" in capfd.readouterr().out
    before, after = (
        sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).parameters())
        for folder in (uneven / "model", tmp_path / "out" / "model")
    )
    assert after < before
    if keep == "params=0.8":
        assert after == pytest.approx(0.8 * before, rel=0.02)


def test_one_number_for_uneven_blocks_is_refused(uneven, tmp_path):
    with pytest.raises(UserError, match="different numbers of heads"):
        prune(uneven, tmp_path / "out", "heads=0.5")


@pytest.mark.parametrize(
    ("keep", "words"), [("params=0.8,0.6", "several sizes"), ("blocks=0.7", "--keep blocks=0.7 of this Llama")]
)
def test_compensation_that_no_bias_can_hold_is_refused(tiny, tmp_path, keep, words):
    with pytest.raises(UserError, match=words):
        prune(tiny, tmp_path / "out", keep, "--compensation", "on")
    assert not (tmp_path / "out").exists()


def test_a_whole_budget_is_planned(tiny, tmp_path, capsys):
    prune(tiny, tmp_path / "out", "params=0.8", "--dry-run", "--teacher", "none")
    assert json.loads((tmp_path / "out" / "recipe" / "bmcook.json").read_text())["distillation"] is None
    capsys.readouterr()
    invoke("plan", ["--config", str(tmp_path / "out" / "recipe" / "bmcook.json"), "--json"])
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    whole = LlamaForCausalLM.from_pretrained(tiny / "model")
    biased = LlamaForCausalLM(LlamaConfig(**whole.config.to_dict() | {"attention_bias": True, "mlp_bias": True}))
    size, with_biases = (sum(p.numel() for p in model.parameters()) for model in (whole, biased))
    assert stage["parameters_before"] == with_biases
    assert stage["parameters_after"] == pytest.approx(0.8 * size, rel=0.02)


def test_a_budget_in_mib_is_planned_and_one_in_milliseconds_is_measured_and_met(tiny, tmp_path, capsys, monkeypatch):
    whole = LlamaForCausalLM.from_pretrained(tiny / "model")
    cache = 2 * 3 * 4 * 4 * 64  # keys and values of 3 layers, 4 heads of 4 features, 64 tokens
    mib = 2 * (sum(p.numel() for p in whole.parameters()) + cache) / 2**20
    prune(tiny, tmp_path / "small", f"memory_mib={0.8 * mib:.5f}", "--teacher", "none")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "small" / "model", trust_remote_code=True)
    ids = torch.zeros(1, 64, dtype=torch.long)
    layers = small(input_ids=ids, use_cache=True).past_key_values.layers
    cached = sum(layer.keys.numel() + layer.values.numel() for layer in layers if layer.keys is not None)
    ended = 2 * (sum(p.numel() for p in small.parameters()) + cached) / 2**20
    one_head = 2 * (32 * 8 * 2 + 32 * 4 * 2 + 2 * 4 * 64) / 2**20
    assert ended == pytest.approx(0.8 * mib, abs=one_head)
    capsys.readouterr()
    # A clock that counts weights: the test machine's own is too noisy for a tiny model.
    monkeypatch.setattr(profile, "median_seconds", lambda actions, *_, **__: {n: a() for n, a in actions.items()})
    monkeypatch.setattr(profile._Passes, "_pass", lambda _, model: lambda: sum(p.numel() for p in model.parameters()))
    with pytest.raises(UserError, match="there is no such file"):
        prune(tiny, tmp_path / "fast", "latency_ms=0.001", "--data", "nowhere.txt")
    assert "units of dimff per block" not in capsys.readouterr().out  # other mistakes are found before the measurement
    with pytest.raises(UserError, match="0.001 ms cannot be reached") as caught:
        prune(tiny, tmp_path / "fast", "latency_ms=0.001")
    assert not (tmp_path / "fast").exists()
    least, most = map(float, re.search(r"above (\S+) and up to (\S+) ms", str(caught.value)).groups())
    budget = 0.3 * least + 0.7 * most
    prune(tiny, tmp_path / "fast", f"latency_ms={budget:.6f}", "--teacher", "none")
    small = AutoModelForCausalLM.from_pretrained(tmp_path / "fast" / "model", trust_remote_code=True)
    times = read_block_times(tmp_path / "fast" / "block_times.json")
    assert "units of dimff per block" in capsys.readouterr().out and times.settings["length"] == 64
    weights = sum(p.numel() for p in small.parameters())
    assert 1000 * weights == pytest.approx(budget, abs=1000 * (32 * 8 * 2 + 32 * 4 * 2))  # to one head's weights
    report = (tmp_path / "fast" / "report" / "report.md").read_text()
    assert f"takes {1000 * weights:.4g} ms" in report and f"the budget is {budget:.4g} ms" in report


@pytest.mark.parametrize(
    ("keep", "more"),
    [
        ("dims", ()),
        ("dims=x", ()),
        ("nothing=0.5", ()),
        ("dims=0", ()),
        ("params=1.5", ()),
        ("params=0.7,0.7", ()),
        ("params=0.7,x", ()),
        ("dims=0.7,0.5", ()),
        ("dims=0.5", ("--keep", "dims=0.6")),
        ("dims=0.5", ("--data", "missing.txt")),
        ("dims=0.5", ("--teacher", "missing")),
    ],
)
def test_a_mistake_leaves_nothing_behind(tiny, tmp_path, keep, more):
    with pytest.raises(UserError):
        prune(tiny, tmp_path / "out", keep, *more)
    assert not (tmp_path / "out").exists()


def test_a_single_text_file_is_enough_and_a_program_can_train_twice(tiny, tmp_path):
    arguments = [str(tiny / "model"), "--data", str(tiny / "text" / "a.txt"), "--steps", "2", "--max-length", "32"]
    lines = ["from cook.cli import invoke"]
    for keep in ("dims=0.5", "heads=0.5"):
        output = str(tmp_path / keep.partition("=")[0])
        lines.append(f"invoke('prune', {[*arguments, '--keep', keep, '--output', output]!r})")
    done = run([sys.executable, "-W", "ignore", "-c", "\n".join(lines)], REPOSITORY)
    assert done.code == 0 and done.out.count("a single text: at least the last") >= 2, done
    assert json.loads((tmp_path / "dims/run/ffn_mask/done.json").read_text())["held_out_loss"] > 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dims" / "model").config.intermediate_size == 32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "heads" / "model").config.num_attention_heads == 4


def test_an_unknown_model_is_told(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    data = ["--data", str(tmp_path / "text.txt"), "--keep", "dims=0.5", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="there is no such model folder"):
        invoke("prune", [str(tmp_path / "missing"), *data])
    assert not (tmp_path / "out").exists()
