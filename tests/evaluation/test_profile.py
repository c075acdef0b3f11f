from __future__ import annotations

import json

import pytest
import torch

from cook.base.errors import UserError
from cook.evaluation import profile
from cook.evaluation.settings import ProfileSettings
from cook.pruning.block_times import read_block_times
from tests.tiny_families import tiny_source


def test_times_that_add_up_are_found_again(monkeypatch):
    """With a clock that counts weights, the table is the number of weights."""
    passes = {}

    def counted(actions, device, *, repeats):
        return {name: passes[name] / 1000 for name in actions}

    real = profile._Passes._pass

    def noted(self, model):
        name = "small" if "whole" in passes and model is not self._model else "whole"
        passes[name] = sum(p.numel() for p in model.parameters())
        return real(self, model)

    monkeypatch.setattr(profile, "median_seconds", counted)
    monkeypatch.setattr(profile._Passes, "_pass", noted)
    source = tiny_source("llama")
    space = source.adapter.space(source.config)
    times = profile.measure_block_times(source, ProfileSettings(length=8))
    whole = sum(t.numel() for t in space.shapes and source.tensors.values())
    assert times.total(space, {}) == pytest.approx(whole)
    shapes = {path: torch.Size(shape).numel() for path, shape in space.shapes.items()}
    block = space.block(space.of("dimff")[0])
    assert times.dimff.ms[-1] == pytest.approx(sum(shapes[s.path] for s in block.slices))
    # Half the dims are half the products' weights; the norm stays.
    products = sum(shapes[s.path] for s in space.of("dimff")[0].slices)
    half = times.dimff.ms[times.dimff.shares.index(0.5)]
    assert times.dimff.ms[-1] - half == pytest.approx(products / 2)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_both_phases_run_real_models_and_noise_gives_no_negative_times(monkeypatch, phase):
    # Half of the heads seem faster than none. Then two thirds of the head dims, and half of the hidden dims.
    shares = iter([0.6, 0.5, 0.9, 0.8, 0.95, 0.7])

    def timed(actions, device, *, repeats):
        for action in actions.values():
            action()
        return {"whole": 0.1, "small": 0.1 * next(shares)}

    monkeypatch.setattr(profile, "median_seconds", timed)
    source = tiny_source("llama")
    space = source.adapter.space(source.config)
    said: list[str] = []
    settings = ProfileSettings(length=16, batch_size=2, phase=phase, points=2)
    times = profile.measure_block_times(source, settings, on_point=said.append)
    assert len(said) == 6 and times.total(space, {}) == pytest.approx(100)
    assert times.rest == pytest.approx(10) and times.heads.ms[-1] * 3 == pytest.approx(40)
    assert times.dimff.ms == pytest.approx((0, 10, 100 / 6)) and list(times.heads.ms) == sorted(times.heads.ms)
    assert times.wide["head_dims"].ms == pytest.approx((95, 100)) and times.wide["hidden"].ms == pytest.approx(
        (70, 100)
    )
    assert times.wide["head_dims"].shares == pytest.approx((2 / 3, 1)) and times.wide["hidden"].shares == (0.5, 1)
    # Attention takes 40 of 100 ms, of which 5 go; then everything takes 70%.
    both = times.total(space, {"head_dims": 2, "hidden": 16})
    assert times.total(space, {"head_dims": 2}) == pytest.approx(95) and both == pytest.approx(0.7 * 95)
    assert times.settings["phase"] == phase and "whole model 100.00 ms" in profile.table(times)
    monkeypatch.setattr(profile, "median_seconds", lambda *_, **__: {"whole": 0.1, "small": 0.11})
    with pytest.raises(UserError, match="no time that can be measured"):
        profile.measure_block_times(source, settings)


def test_the_command_writes_the_table(tmp_path, capsys, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    from cook.cli import invoke

    ratios = iter([0.6, 0.5, 0.9, 0.8, 0.95, 0.7])
    monkeypatch.setattr(profile, "median_seconds", lambda *_, **__: {"whole": 0.1, "small": 0.1 * next(ratios)})
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "model")
    options = ["--length", "64", "--points", "2", "--repeats", "5", "--output", str(tmp_path / "times.json")]
    invoke("profile", [str(tmp_path / "model"), *options])
    assert "| whole model, hidden" in capsys.readouterr().out
    assert read_block_times(tmp_path / "times.json").settings["length"] == 64
    assert json.loads((tmp_path / "times.json").read_text())["num_layers"] == 2
