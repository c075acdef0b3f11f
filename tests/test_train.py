"""`cook/train.py` as a user starts it: launchers, mistakes, one stage after the other by hand, a loss that explodes."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch

from cook.base.errors import run_entry
from cook.base.tensor_files import ShardWriter
from cook.families.source import open_model
from cook.train import main
from tests.recipe.tiny_run import ATT_FIRST, REPOSITORY, Result, contents, read_log, run, train, write_run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A run whose pretraining is done, and so its corpus prepared."""
    folder = tmp_path_factory.mktemp("prepared")
    write_run(folder, pruning__is_pruning=False, training__steps=3, training__eval_rows=2)
    (folder / "l0_pruning.json").unlink()
    result = train(folder)
    assert result.code == 0 and "pretrain: 3 steps" in result.out, "is_pruning: false alone is plain pretraining"
    write_run(folder, ("pretrain", "layer_mask", "layer_finetune"), training__steps=3, training__eval_rows=2)
    return folder


@pytest.fixture
def own(prepared, tmp_path) -> Path:
    folder = tmp_path / "run"
    shutil.copytree(prepared, folder)
    pointer = folder / "out" / "data.json"  # holds whole paths
    pointer.write_text(pointer.read_text().replace(str(prepared), str(folder)))
    return folder


def launched(folder: Path, launcher: str, *options: str, **variables: Any) -> Result:
    if launcher == "deepspeed":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = ["deepspeed", "--num_gpus", "2", "--master_port", str(port), str(REPOSITORY / "cook" / "train.py")]
        return run([*command, "--config", "bmcook.json", *options], folder, **variables)
    return train(folder, *options, ranks=2 if launcher == "torchrun" else 0, **variables)


def test_every_launcher_trains_the_same(prepared, tmp_path):
    """Two ranks of two rows and one rank of two micro-batches: the same losses, the same mask."""
    losses, masks = {}, {}
    for launcher in ("plain", "deepspeed", "torchrun"):
        folder = tmp_path / launcher
        shutil.copytree(prepared, folder)
        options = ["--local_rank=0"] if launcher == "plain" else []
        result = launched(folder, launcher, "--stage", "layer_mask", *options)
        assert result.code == 0 and f"{1 if launcher == 'plain' else 2} rank(s)" in result.out, result
        records = read_log(folder, "layer_mask")
        assert [record["step"] for record in records if "loss" in record] == [1, 2, 3]
        losses[launcher] = [record[key] for record in records for key in ("loss", "held_out_loss") if key in record]
        masks[launcher] = (folder / "out" / "masks" / "layer.pt").read_bytes()
        assert "FutureWarning" not in result.err, result
    assert losses["deepspeed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["torchrun"] == losses["deepspeed"]
    assert masks["deepspeed"] == masks["plain"] == masks["torchrun"]


def test_a_mistake_in_the_data_stops_all_ranks(own):
    (own / "docs" / "json.txt").write_bytes(b"\xff\xfe not text")
    shutil.rmtree(own / "out")
    result = launched(own, "deepspeed", "--stage", "pretrain", timeout=60)
    assert result.code == 2 and "json.txt" in result.err and "Traceback" not in result.err, result
    assert not (own / "out" / "pretrain").exists()


def test_a_mask_of_another_model_stops_all_ranks(own):
    (own / "out" / "masks").mkdir()
    wrong = {"self_att_layer_z": torch.ones(5), "cross_att_layer_z": torch.zeros(0), "ffn_layer_z": torch.ones(5)}
    torch.save(wrong, own / "out" / "masks" / "layer.pt")
    write_run(own, training__steps=3, coarse__train_mask=False, model__path="out/pretrain/model")
    before = contents(own)
    result = launched(own, "torchrun", timeout=60)
    assert result.code == 1 and "3 layers" in result.err and "exitcode  : 2" in result.err, result
    assert contents(own) == before


MISTAKES = {
    "no such file": (["--config", "gone.json"], "gone.json: there is no such file"),
    "unknown option": (["--nope"], "No such option: --nope"),
    "unknown key": (["--set", "training.stpes=3"], "did you mean 'steps'"),
    "wrong type": (["--set", "training.steps=many"], "training.steps"),
    "batch": (["--set", "training.train_batch_size=7"], "a multiple of micro_batch_size 2"),
    "all without a recipe": (["--stage", "all"], "no stages to run"),
    "all from one checkpoint": (["--stage", "all", "--resume", "x"], "--resume PATH applies to a single stage"),
    "missing predecessor": (["--stage", "att_mask"], "att_mask has no weights to start from"),
    "missing mask": (
        ["--set", "model.path=out/pretrain/model", "--set", "coarse-grained.train_mask=false"],
        "out/masks/layer.pt: there is no such mask file",
    ),
    "mask that is none": (
        [
            "--set",
            "model.path=out/pretrain/model",
            "--set",
            "coarse-grained.train_mask=false",
            "--set",
            "coarse-grained.coarse_mask=docs/none.pt",
        ],
        "docs/none.pt: not a readable .pt file",
    ),
    "auto": (["--set", "model.path=out/pretrain/model", "--set", "deepspeed.comms_logger.x=auto"], "comms_logger.x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_end_with_code_2_and_write_nothing(own, mistake, monkeypatch, capsys):
    options, message = MISTAKES[mistake]
    write_run(own, training__steps=3)
    (own / "docs" / "none.pt").write_text("no mask")
    refused_here(own, monkeypatch, capsys, options, message)


def test_a_recipe_does_not_leave_out_a_stage(own, monkeypatch, capsys):
    write_run(own, ATT_FIRST, model__path="out/pretrain/model")
    refused_here(own, monkeypatch, capsys, ["--stage", "layer_finetune"], "layer_mask, which has not finished")


def refused_here(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, options: list[str], message: str) -> None:
    """The command in this process, which is far quicker; `run_entry` lets no traceback of a user's mistake through."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", ["cook/train.py", "--config", "bmcook.json", *options])
    monkeypatch.setattr("cook.training.engine.initialise_processes", lambda *_: None)
    before = contents(folder)
    with pytest.raises(SystemExit) as ended:
        run_entry(main)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert contents(folder) == before


def test_a_program_of_ones_own_continues_after_a_command_and_ends_with_130_at_ctrl_c(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["own.py", "--help"])
    main()
    assert "--resume" in capsys.readouterr().out

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["own.py"])
    monkeypatch.setattr("cook.recipe.start.start", interrupted)
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130


def test_a_dry_run_prints_the_plan_and_writes_nothing(own):
    before = contents(own)
    # A launcher's variables without a launcher: a process group would wait for the second rank for ever.
    result = train(own, "--stage", "all", "--dry-run", RANK="0", WORLD_SIZE="2", MASTER_PORT="1", timeout=60)
    assert result.code == 0 and "ranks:  2" in result.out and "layer_finetune" in result.out, result
    assert contents(own) == before


def test_the_guides_way_one_stage_after_the_other_by_hand(own):
    """Four edits of the switches, plain starts without --stage; the model of each comes from the one before."""
    masks = {}
    edits: list[tuple[str, dict[str, Any]]] = [
        ("layer_mask", {}),
        ("att_mask", {"pruning__mask_method": "fine-grained"}),
        ("att_finetune", {"pruning__mask_method": "fine-grained", "fine__train_mask": False}),
        ("ffn_mask", {"pruning__mask_method": "fine-grained", "fine__prune_mode": "ffn"}),
    ]
    before = "pretrain"
    for stage, changes in edits:
        write_run(own, model__path=f"out/{before}/model", training__steps=3, training__eval_rows=2, **changes)
        result = train(own)
        assert result.code == 0 and f"\n{stage}: 3 steps" in result.out and f"from out/{before}/model" in result.out
        before = stage
        for name in ("layer", "heads", "dimff"):
            path = own / "out" / "masks" / f"{name}.pt"
            if path.exists():
                assert path.read_bytes() == masks.setdefault(name, path.read_bytes()), "a fixed mask changed"
    dims = torch.load(own / "out" / "masks" / "dimff.pt")
    assert set(dims) == {"heads_z", "dimff_z"} and set(dims["dimff_z"].sum(1).tolist()) == {10.0}
    done = json.loads((own / "out" / "ffn_mask" / "done.json").read_text())
    assert {layer["att"].count("1") for layer in done["structure"]["layers"] if layer["att"]} == {2}


def test_only_what_pruned_module_names_is_pruned(own):
    write_run(
        own,
        model__path="out/pretrain/model",
        training__steps=3,
        training__eval_rows=0,
        pruning__pruned_module=["ffn.ffn.w_in.w.weight", "ffn.ffn.w_out.weight"],
    )
    assert train(own).code == 0
    mask = torch.load(own / "out" / "masks" / "layer.pt")
    assert mask["self_att_layer_z"].tolist() == [1.0] * 3 and mask["ffn_layer_z"].sum() == 2
    done = json.loads((own / "out" / "layer_mask" / "done.json").read_text())
    assert all(layer["att"] == "1111" for layer in done["structure"]["layers"])


def test_a_loss_that_is_not_finite_stops_plainly_and_keeps_the_last_checkpoint(own):
    """A learning rate that blows the model up: the same end as a bad sample."""
    (own / "out" / "broken").mkdir()
    source = open_model(own / "out" / "pretrain" / "model")
    shutil.copy(own / "out" / "pretrain" / "model" / "config.json", own / "out" / "broken")
    with ShardWriter(own / "out" / "broken") as writer:
        for name, tensor in source.tensors.items():
            writer.add(name, tensor * float("nan") if "output_layernorm" in name else tensor)
    write_run(own, model__path="out/broken", training__steps=3)
    result = train(own)
    assert result.code == 1 and "step 1: the loss on rank 0 is not finite" in result.err, result
    assert "failed: step 3" in result.err, "training.max_bad_steps is 3"
    assert json.loads((own / "out" / "outcome.json").read_text())["message"] in result.err
    assert "Traceback" not in result.err
    assert not (own / "out" / "layer_mask" / "checkpoints").exists()
    assert not (own / "out" / "layer_mask" / "done.json").exists()
