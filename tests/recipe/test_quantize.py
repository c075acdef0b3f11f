"""The stage `quantize` after a recipe: on CPM-Ant and on a Llama with a teacher; its mistakes; what it exports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cook.base.errors import UserError, UserErrors
from cook.base.files import sha256
from cook.config.load import load_config
from cook.data.loader import held_out_batches
from cook.data.training_data import load_rows
from cook.evaluation.all_ranks import held_out_loss
from cook.export.check import quiet
from cook.quantization.prepare import loaded
from cook.recipe import quantize
from cook.recipe.inputs import open_inputs
from cook.recipe.plan import MaskPaths, plan_stage
from cook.recipe.quantize_run import QuantizeOptions, quantize_run, run_model
from cook.recipe.start import make_plan
from tests.recipe.test_stock import write_stock_run
from tests.recipe.tiny_run import SITES, train, write_run

pytest.importorskip("torchao")
STAGES = ("pretrain", "layer_mask", "ffn_mask", "quantize")
SAVED = "training.save_every=2"


@pytest.fixture(scope="module")
def cpm_run(tmp_path_factory) -> Path:
    """A CPM-Ant whose FFN and hidden dims, and perhaps blocks, are removed; 8-bit weights, embedding and inputs."""
    folder = tmp_path_factory.mktemp("cpm")
    hidden = "out/masks/hidden.pt"
    tables = [f"{kind}_embedding" for kind in ("input", "prompt", "segment")]
    write_run(
        folder,
        STAGES,
        quantization={"is_quant": True, "embeddings": True, "steps": 4},
        fine__hidden_mask=hidden,
        pruning__pruned_module=[f"{site}.weight" for site in (*SITES, *tables)],
    )
    (folder / hidden).parent.mkdir(parents=True)
    torch.save({"hidden_z": (torch.arange(32) % 4 != 1).float()}, folder / hidden)
    done = train(folder, "--stage", "all", "--set", SAVED)
    assert done.code == 0 and "modules as int8, the token embedding in 8 bits" in done.out, done
    assert "Failed to load" not in done.err and "Skipping import" not in done.err, "torchao is quiet"
    return folder


def evaluated(model: torch.nn.Module, config, adapter) -> float:
    """The loss on the run's held-out rows."""
    prompt = config.model.config["prompt_length"] if config.model.config else 0
    data = load_rows(config.data, config.tokenizer, prompt_length=prompt, output_dir=config.output_dir, build=False)
    batches = list(held_out_batches(data.held_out, 2, config.training.eval_rows, 0, 1))
    return held_out_loss(lambda **inputs: model(**adapter.inputs(inputs)), batches, torch.device("cpu"))


def test_the_reshaped_model_has_the_loss_of_the_one_that_was_trained(cpm_run, monkeypatch):
    monkeypatch.chdir(cpm_run)
    config = load_config("bmcook.json")
    stage = plan_stage(config, "quantize")
    assert stage.after == "ffn_mask" and stage.fixed == MaskPaths(
        layer="out/masks/layer.pt", dimff="out/masks/dimff.pt", hidden="out/masks/hidden.pt"
    )
    record = json.loads(stage.done.read_text())
    model = run_model(stage)
    assert record["steps"] == 4 and len(model.matrices) == len(record["quantization"]["modules"]) + 1 > 5
    assert record["quantization"]["embeddings"] == ["input_embedding"] and model.embedding.inputs == 24
    assert model.source.config["unpruned"]["dim_model"] == 32  # CPM-Ant divides by the sizes before the cut
    # The same integers; the inputs of a module are rounded after sums in another order, so that a few differ by one.
    found = evaluated(loaded(model), config, model.source.adapter)
    assert found == pytest.approx(record["held_out_loss"], rel=1e-5)
    # Without the rounding it is another number.
    plain = evaluated(loaded(type(model)(**vars(model) | {"matrices": {}})), config, model.source.adapter)
    assert plain != pytest.approx(record["held_out_loss"], rel=2e-5)
    linear = {path: matrix for path, matrix in model.matrices.items() if not matrix.is_embedding}
    floats = evaluated(loaded(type(model)(**vars(model) | {"matrices": linear})), config, model.source.adapter)
    assert abs(floats - found) > 4 * abs(found - record["held_out_loss"])


def test_a_record_of_an_older_run_has_no_embedding(cpm_run, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(cpm_run, tmp_path / "run"))
    stage = plan_stage(load_config("bmcook.json"), "quantize")
    record = json.loads(stage.done.read_text())
    record["quantization"].pop("embeddings")
    stage.done.write_text(json.dumps(record))
    assert run_model(stage).embedding is None


def test_transformers_loads_the_quantized_cpm_ant(cpm_run, monkeypatch, capsys):
    monkeypatch.chdir(cpm_run)
    quantize_run(QuantizeOptions(config="bmcook.json"))
    said = capsys.readouterr().out
    assert (
        "no CPM-Live .pt was written" in said
        and "the token embedding in 8 bits" in said
        and "trust_remote_code=True" in said
        and "int8" in said
    )
    with quiet():
        small = AutoModelForCausalLM.from_pretrained("out/quantized/transformers", trust_remote_code=True)
    assert type(small.input_embedding.weight).__name__ == "IntxUnpackedToInt8Tensor"
    config = load_config("bmcook.json")
    stage = plan_stage(config, "quantize")
    found = evaluated(small.eval(), config, run_model(stage).source.adapter)
    assert found == pytest.approx(json.loads(stage.done.read_text())["held_out_loss"], rel=1e-5)


def test_a_resumed_stage_is_the_uninterrupted_one(cpm_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(cpm_run, folder)
    stage = folder / "out" / "quantize"
    before = sha256(stage / "model" / "model.safetensors")
    (stage / "done.json").unlink()
    shutil.rmtree(stage / "model")
    shutil.rmtree(stage / "checkpoints" / "step-4")
    done = train(folder, "--stage", "quantize", "--set", SAVED)
    assert done.code == 0 and "quantize: resuming from step 2" in done.out, done
    assert sha256(stage / "model" / "model.safetensors") == before


def test_a_llama_with_a_teacher_on_two_ranks_under_zero_3(tmp_path):
    losses = []
    for zero, ranks in ((3, 2), (0, 0)):
        folder = tmp_path / str(zero)
        write_stock_run(
            folder,
            ("ffn_mask", "headdim_mask", "quantize"),
            deepspeed={"zero_optimization": {"stage": zero}},
            distillation={"teacher": "model", "ce_scale": 1.0, "stages": ["quantize"]},
            quantization={"is_quant": True, "scheme": "int4", "group_size": 8, "steps": 3, "embeddings": True},
            name="llama, tied",
            training__steps=3,
            fine__target_dimff=16,
            fine__round_to=8,
            fine__target_head_dim=4,
            fine__head_dims_mask="out/masks/head_dims.pt",
            fine__allow_remote_code=True,
        )
        done = train(folder, "--stage", "all", ranks=ranks)
        assert done.code == 0, done
        record = json.loads((folder / "out/quantize/done.json").read_text())
        losses.append(record["held_out_loss"])
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            config = load_config("bmcook.json")
            quantize_run(QuantizeOptions(config="bmcook.json", output="small"))
            small = AutoModelForCausalLM.from_pretrained("small").eval()
            assert small.lm_head.weight is small.model.embed_tokens.weight
            assert small.lm_head.weight.target_dtype == torch.int8
            adapter = run_model(plan_stage(config, "quantize")).source.adapter
            assert (small.config.intermediate_size, small.config.head_dim) == (16, 4)
            assert evaluated(small, config, adapter) == pytest.approx(record["held_out_loss"], rel=1e-5)
    # Sums in another order, and the few weights that they round to another of the 16 numbers.
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)


def test_mistakes_are_found_before_the_first_stage(tmp_path, monkeypatch):
    write_run(tmp_path, STAGES, quantization={"is_quant": True, "quantized_module": ["ffn.w_uot"]})
    monkeypatch.chdir(tmp_path)
    stage = plan_stage(load_config("bmcook.json"), "quantize")
    with pytest.raises(UserErrors, match="did you mean 'ffn.ffn.w_out'"):
        quantize.check_early(stage)
    with pytest.raises(UserErrors, match="did you mean 'ffn.ffn.w_out'"):
        make_plan("bmcook.json")
    good = load_config("bmcook.json", ['quantization={"is_quant": true, "quantized_module": ["ffn.ffn.w_in.w"]}'])
    found = quantize._chosen(
        plan_stage(good, "quantize"), open_inputs(stage, must_exist=False), quantize.scheme_of("int8")
    )
    assert len(found) == 6, "the alias stands for both input products, as in pruned_module"
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match="needs the package torchao"):
        quantize.check_early(stage)


def test_the_whole_model_with_masks_is_refused(cpm_run, monkeypatch):
    monkeypatch.chdir(cpm_run)
    stage = plan_stage(load_config("bmcook.json"), "quantize")
    monkeypatch.setattr(quantize, "compact_inputs", lambda *_: (None, "the teacher is compared head by head"))
    with pytest.raises(UserError, match="compared head by head"):
        quantize.quantized_modules(stage, open_inputs(stage), None)
