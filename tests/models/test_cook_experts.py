"""Blocks with experts against the dense blocks of stock models, and against a sum over experts written with numpy."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from cook.export.model_folder import write_model_folder
from cook.export.pruned_folder import reshaped_source
from cook.families.registry import by_config
from cook.families.source import load_model, open_model
from cook.models.cook_experts import Router, routers
from cook.pruning.family import ModelSource
from tests.models.cpm_ant_tiny import SIZES, tiny_model
from tests.tiny_experts import random_carvings, with_experts
from tests.tiny_families import tiny_source

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
ROUNDING = {"rtol": 1e-4, "atol": 5e-5}
"""Sums over dims in another order, in fp32; logits are of order 1 to 10."""
RAGGED = {"layers.1.dimff": (torch.arange(20) % 3 > 0).float(), "layers.2.ffn": torch.zeros(1)}
SOURCES = ("llama", "phi3", "gpt2", "gpt_neox", "opt", "gemma2", "cpm_ant", "cpm_ant, older", "ragged")
"""Gated and fused products, Conv1D, biases, parallel blocks, no module for the FFN, norms behind it, CPM-Ant's scaling
and both of its FFNs, and a model whose blocks already differ."""


def source_of(name: str) -> ModelSource:
    if name.startswith("cpm_ant"):
        gated = name == "cpm_ant"
        model = tiny_model(0, gated_ffn=gated)
        config = {"model_type": "cook_cpm_ant", **SIZES, "gated_ffn": gated}
        return ModelSource(adapter=by_config(config), config=config, tensors=dict(model.state_dict()), path=None)
    source = tiny_source("llama" if name == "ragged" else name)
    if name == "ragged":
        return reshaped_source(source, source.adapter.space(source.config), RAGGED)
    return source


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("name", SOURCES)
def test_the_passes_agree_and_all_experts_equal_the_dense_model(name):
    source = source_of(name)
    dense = logits_of(load_model(source))
    model = load_model(with_experts(source, random_carvings(source)))
    sparse = logits_of(model)
    assert not torch.allclose(sparse, dense, rtol=1e-2, atol=1e-2)
    masked = model(input_ids=IDS).logits
    assert masked.requires_grad
    torch.testing.assert_close(masked.detach(), sparse, **ROUNDING)
    if not name.startswith("cpm_ant"):  # a single token, whose experts are not sorted; CPM-Ant's prompt is never alone
        one = IDS[:1, :1]
        with torch.no_grad():
            single = model(input_ids=one).logits
        torch.testing.assert_close(single, model(input_ids=one).logits.detach(), **ROUNDING)
    for router in routers(model):
        router.active = router.routed
    torch.testing.assert_close(logits_of(model), dense, **ROUNDING)


def test_a_block_is_the_sum_of_its_chosen_experts():
    source = source_of("llama")
    carvings = random_carvings(source)
    group, carving = carvings[0]
    model = load_model(with_experts(source, carvings))
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = model.model.layers[0].mlp(x)
    gate, up, down = (
        source.tensors[f"model.layers.0.mlp.{n}_proj.weight"].detach().double().numpy() for n in ("gate", "up", "down")
    )
    biases = [
        source.tensors[f"model.layers.0.mlp.{n}_proj.bias"].detach().double().numpy() for n in ("gate", "up", "down")
    ]
    order, sizes = carving.order.numpy(), carving.sizes
    scores = 1 / (1 + np.exp(-x.double().numpy() @ carving.weight.double().numpy().T)) + carving.bias.double().numpy()
    for number, row in enumerate(x.double().numpy()):
        dims = list(order[: sizes.shared])
        for expert in np.argsort(-scores[number])[: sizes.active]:
            start = sizes.shared + expert * sizes.size
            dims += list(order[start : start + sizes.size])
        assert len(dims) == sizes.active_dims == 11
        inner = gate[dims] @ row + biases[0][dims]
        inner = inner / (1 + np.exp(-inner)) * (up[dims] @ row + biases[1][dims])
        wanted = down[:, dims] @ inner + biases[2]
        np.testing.assert_allclose(found[number].numpy(), wanted, rtol=1e-3, atol=1e-5)  # fp32 against fp64


def test_the_router_learns_from_experts_that_were_not_chosen():
    """The gradient of a score is what the loss would change by if the expert had that much more weight."""
    router = Router(hidden=4, shared=1, size=2, routed=3, active=1)
    torch.manual_seed(0)
    x, inner = torch.randn(5, 4), torch.randn(5, 7)
    router.choose(x)
    masked = router.masked(inner)
    assert set((masked / inner).round(decimals=6).flatten().tolist()) == {0.0, 1.0}
    masked.sum().backward()
    slope = torch.sigmoid(x @ router.weight.T)
    slope = (slope * (1 - slope)).detach()
    per_expert = inner[:, 1:].view(5, 3, 2).sum(-1)
    torch.testing.assert_close(router.weight.grad, (per_expert * slope).T @ x)
    torch.testing.assert_close(router.bias.grad, per_expert.sum(0))


def test_a_model_with_experts_can_be_copied_and_pickled():
    source = source_of("llama")
    model = load_model(with_experts(source, random_carvings(source)))
    wanted = logits_of(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for router in routers(model):
            router.active = 1
        assert torch.equal(logits_of(other), wanted)


@pytest.mark.slow
def test_exports_load_where_cook_is_not(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes)).save_pretrained(tmp_path / "dense")
    torch.save(IDS, tmp_path / "ids.pt")
    wanted = {}
    for name, source in {"llama": open_model(tmp_path / "dense"), "cpm_ant": source_of("cpm_ant")}.items():
        made = with_experts(source, random_carvings(source))
        write_model_folder(tmp_path / name, made.adapter, made.config, made.tensors.items())
        read = open_model(tmp_path / name)
        assert read.adapter.experts(read.config) == made.adapter.experts(made.config)
        wanted[name] = logits_of(load_model(read))
        torch.testing.assert_close(wanted[name], logits_of(load_model(made)))
        torch.save(wanted[name], tmp_path / f"{name}.pt")
    script = """
        import importlib.util, torch
        assert importlib.util.find_spec("cook") is None
        from transformers import AutoModelForCausalLM
        ids = torch.load("ids.pt")
        for name in ("llama", "cpm_ant"):
            model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
            with torch.no_grad():
                torch.testing.assert_close(model(input_ids=ids).logits, torch.load(f"{name}.pt"))
            assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (2, 12)
            model.save_pretrained(f"{name} again")
        print("same")
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip().endswith("same"), done.stderr
    for name, logits in wanted.items():
        assert (tmp_path / f"{name} again" / "cook_experts.py").is_file()
        again = open_model(tmp_path / f"{name} again")
        torch.testing.assert_close(logits_of(load_model(again)), logits)
