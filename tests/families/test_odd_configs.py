"""Odd values in a config.json: the model works all the same, or is refused in plain words; nothing else is raised."""

from __future__ import annotations

import json
import resource

import pytest
import torch

from cook.base.errors import UserError
from cook.families.source import load_model, open_model
from tests.families.test_opening import stock

HUGE = 10**9
IDS = torch.tensor([[3, 4, 5, 6]])
SIZES = {
    "layers": ("num_hidden_layers", "n_layer"),
    "heads": ("num_attention_heads", "n_head"),
    "hidden": ("hidden_size", "n_embd"),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim"),
    "vocab": ("vocab_size",),
    "kv": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "positions": ("max_position_embeddings", "n_positions"),
}
VALUES = [0, -1, -HUGE, HUGE, 10**19, 3, 2.5, "4", "", None, True, [], [1, [2, [3]]], {}, {"a": 1}]
OTHERS = [
    {"hidden_act": "no_such_act", "activation_function": "no_such_act", "hidden_activation": "no_such_act"},
    {"hidden_act": None, "activation_function": None, "hidden_activation": None},
    {"hidden_act": 7, "activation_function": 7, "hidden_activation": ["x"]},
    {"rope_scaling": {"type": "no_such_rope", "factor": 2.0}},
    {"rope_scaling": {"rope_type": "linear"}},
    {"rope_scaling": {"rope_type": "linear", "factor": 0.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": "x"}},
    {"rope_scaling": {"rope_type": "longrope", "short_factor": [], "long_factor": [1]}},
    {"rope_scaling": {"rope_type": "llama3"}},
    {"rope_scaling": [1, 2]},
    {"rope_scaling": "linear"},
    {"rope_parameters": None},
    {"rope_parameters": {"rope_theta": 0}},
    {"rope_parameters": {"rope_theta": "x", "rope_type": "default"}},
    {"rope_theta": None},
    {"partial_rotary_factor": 0.0},
    {"rotary_pct": -1.0},
    {"layer_types": ["no_such_attention"] * 3},
    {"layer_types": []},
    {"layer_types": "full_attention"},
    {"layer_types": [None, None, None]},
    {"sliding_window": -5},
    {"sliding_window": "x"},
    {"pad_token_id": HUGE},
    {"pad_token_id": -7},
    {"pad_token_id": "x"},
    {"eos_token_id": {"a": 1}},
    {"rms_norm_eps": "x", "layer_norm_eps": "x", "layer_norm_epsilon": "x"},
    {"rms_norm_eps": None, "layer_norm_eps": None, "layer_norm_epsilon": None},
    {"attention_bias": "yes", "mlp_bias": []},
    {"tie_word_embeddings": "no"},
    {"tie_word_embeddings": None},
    {"id2label": 3},
    {"id2label": {"x": "y"}},
    {"num_labels": HUGE},
    {"num_labels": "x"},
    {"num_labels": -1},
    {"type_vocab_size": 0},
    {"word_embed_proj_dim": 0},
    {"architectures": "LlamaForCausalLM"},
    {"architectures": {"a": 1}},
    {"architectures": [7]},
    {"architectures": []},
    {"model_type": ["llama"]},
    {"model_type": "cook_ragged"},
    {"stock_type": "llama"},
    {"stock_type": ["llama"], "model_type": "cook_ragged"},
    {"quantization_config": 7},
    {"quantization_config": {}},
    {"attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation": "kernels-community/flash-attn", "_attn_implementation_internal": "kernels-community/x"},
    {"attn_implementation": {"": "no_such_thing"}},
    {"experts_implementation": "kernels-community/x"},
    {"return_dict": False},
    {"torchscript": True},
    {"output_attentions": True},
    {"dtype": "no_such_type"},
    {"torch_dtype": 7},
    {"is_decoder": True},
    {"pruned_heads": {"0": [1]}},
    {"origin_layers": "x"},
    {"fusion_config": {"a": 1}},
    {"initializer_range": "x"},
    {"attention_dropout": "x", "attn_pdrop": "x", "attention_probs_dropout_prob": "x"},
    {"query_pre_attn_scalar": 0},
    {"query_pre_attn_scalar": "x"},
    {"final_logit_softcapping": "x"},
    {"self": 1},
    {"num_hidden_layers": HUGE, "n_layer": HUGE, "layer_types": None},
]
FAMILIES = ["llama", "qwen2", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "opt", "bert", "roberta"]
ODD = [{name: value for name in names} for names in SIZES.values() for value in VALUES] + OTHERS


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "m"
    stock(request.param).save_pretrained(folder)
    return folder


def use(folder):
    source = open_model(folder)
    for unit in source.adapter.head_units(source.config):
        space = source.adapter.space(source.config, unit)
    source.adapter.shrink(source.config, space, {})
    return load_model(source)(input_ids=IDS).logits


@torch.no_grad()
def test_an_odd_config_is_refused_or_harmless(folder, monkeypatch):
    downloads: list[object] = []
    for name in ("load_and_register_attn_kernel", "get_kernel"):
        monkeypatch.setattr(f"transformers.integrations.hub_kernels.{name}", lambda *a, **_: downloads.append(a))
    file = folder / "config.json"
    plain = json.loads(file.read_text())
    expected = use(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    strange = []
    for change in [*ODD, *({name: "ABSENT"} for name in plain)]:
        known = {name: value for name, value in change.items() if name in plain or change in OTHERS}
        if not known:
            continue
        config = {name: value for name, value in {**plain, **known}.items() if value != "ABSENT"}
        file.write_text(json.dumps(config))
        try:
            logits = use(folder)
        except UserError as error:
            if str(folder) not in str(error) and "no adapter" not in str(error):
                strange.append((known, f"the folder is not named: {error}"))
        except Exception as error:
            strange.append((known, f"{type(error).__name__}: {error}"))
        else:
            if logits.shape != expected.shape:
                strange.append((known, logits.shape))
    file.write_text(json.dumps(plain))
    assert not downloads
    assert not strange, "\n".join(f"{change} → {what}" for change, what in strange)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes that a config took"


@pytest.mark.parametrize("content", ["[]", "7", '"x"', "null", "{", "", "\ufeff{}", '{"model_type": null}', "{}"])
def test_a_config_that_is_none(folder, content):
    file = folder / "config.json"
    plain = file.read_text()
    file.write_text(content)
    try:
        with pytest.raises(UserError):
            use(folder)
    finally:
        file.write_text(plain)
