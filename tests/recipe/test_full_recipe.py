"""All four methods in one recipe: pruning, distillation, a mixture of experts and quantization, as in the file of
`config/`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from cook.base.errors import UserError
from cook.base.files import read_json
from cook.config.load import load_config
from cook.export.check import quiet
from cook.models.cook_experts import routers
from cook.recipe.plan import MaskPaths, plan_stage
from cook.recipe.quantize_run import QuantizeOptions, quantize_run, run_model
from tests.recipe.test_quantize import evaluated
from tests.recipe.test_stock import write_stock_run
from tests.recipe.tiny_run import REPOSITORY, do_prune, train, write_run

pytest.importorskip("torchao")
FULL = read_json(REPOSITORY / "config" / "bmcook_full.json")
SECTIONS = {
    "MoEfication": FULL["MoEfication"] | {"experts": 5, "shared": 1, "active": 0.6, "calibration_steps": 2},
    "quantization": FULL["quantization"] | {"embeddings": True},
    "training__steps": 3,
    "training__save_every": 2,
}


def run_of(kind: str, folder: Path) -> None:
    names = [entry["name"] for entry in FULL["stages"]]
    if kind == "cpm_ant":
        teacher = FULL["distillation"] | {"teacher": "out/pretrain/model"}
        write_run(folder, names, distillation=teacher, **SECTIONS)
    else:
        own = {"distillation": FULL["distillation"] | {"teacher": "model"}}
        own |= {"MoEfication": SECTIONS["MoEfication"] | {"first_FFN_module": ["mlp.gate_proj"]}}
        stages = [name for name in names if name.startswith(("ffn", "moefy", "quantize"))]
        write_stock_run(folder, stages, **SECTIONS | own, fine__target_num_heads=8, fine__target_dimff=10)


@pytest.mark.parametrize("kind", ["cpm_ant", "llama"])
def test_the_whole_recipe_ends_in_the_model_that_was_trained(kind, tmp_path, monkeypatch):
    run_of(kind, tmp_path)
    done = train(tmp_path, "--stage", "all")
    assert done.code == 0 and "modules as int8" in done.out and "trains a mixture of experts" in done.out, done
    assert "the optimizer resumes from moefy" in done.out and "You are using a model of type" not in done.err
    monkeypatch.chdir(tmp_path)
    config = load_config("bmcook.json")
    stage = plan_stage(config, "quantize")
    assert stage.after == "moefy" and stage.fixed == MaskPaths()
    loss = json.loads(stage.done.read_text())["held_out_loss"]
    model = run_model(stage)
    assert not any("router" in path for path in model.matrices) and any(
        "ff" in path or "mlp" in path for path in model.matrices
    )
    quantize_run(QuantizeOptions(config="bmcook.json"))
    with pytest.raises(UserError, match="carved into experts" if kind == "llama" else "torch.nn.Linear"):
        quantize_run(QuantizeOptions(config="bmcook.json", output="other", format="compressed-tensors"))
    with quiet():
        small = AutoModelForCausalLM.from_pretrained("out/quantized/transformers", trust_remote_code=True).eval()
    found = routers(small) or [module for module in small.modules() if type(module).__name__ == "Router"]
    assert found and all(router.active < router.routed for router in found)
    # A quantized product sums in another order, so that a few inputs of the next are rounded to the number beside.
    assert evaluated(small, config, model.source.adapter) == pytest.approx(loss, rel=1e-4)
    for router in found:
        router.active = router.routed
    assert evaluated(small, config, model.source.adapter) != pytest.approx(loss, rel=1e-4), "the routers choose"
    pruned = do_prune(tmp_path, "--config", "bmcook.json", "--verify")
    assert pruned.code == 0 and "equal to rounding" in pruned.out, pruned
