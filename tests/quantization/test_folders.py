"""Folders that stock transformers loads, with torchao and with compressed-tensors: names, integers, logits."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GPT2Config, GPT2LMHeadModel

from cook.base.errors import UserError
from cook.families.source import open_model
from cook.quantization.folders import write_compressed_tensors, write_torchao_folder
from cook.quantization.model import QuantizedModel
from cook.quantization.prepare import loaded
from cook.quantization.schemes import chosen_modules, quantized, scheme_of
from tests.quantization.tiny_stock import IDS, save_stock

pytest.importorskip("torchao")
SCHEMES = ("int8", "int8_weight", "int4")


def rounded(folder, name: str, modules=(), others=(), embeddings=False) -> QuantizedModel:
    source, scheme = open_model(folder), scheme_of(name)
    with torch.device("meta"):
        whole = source.adapter.build(source.config)
    matrices = chosen_modules(whole, scheme, modules, embeddings=embeddings)
    return QuantizedModel(source=source, scheme=scheme, matrices=matrices, others=tuple(others))


def apart(model: torch.nn.Module, reference: torch.nn.Module) -> float:
    with torch.no_grad():
        ours, theirs = reference(IDS).logits.float(), model.eval()(IDS).logits.float()
    return float((ours - theirs).abs().max() / ours.abs().max())


@pytest.mark.parametrize("name", SCHEMES)
def test_transformers_loads_torchao_tensors_with_the_same_logits(tmp_path, name):
    model = rounded(save_stock(tmp_path / "model"), name)
    write_torchao_folder(model, tmp_path / "small")
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(report.values()), report
    weight = found.model.layers[1].mlp.down_proj.weight
    assert type(weight).__name__ == "IntxUnpackedToInt8Tensor"
    assert torch.equal(weight.qdata, model.weight("model.layers.1.mlp.down_proj").values_NK)
    # The same operations in the same order.
    assert apart(found, loaded(model)) < 1e-6


@pytest.mark.parametrize(
    ("family", "name", "changes"),
    [
        ("llama", "int8", {"tie_word_embeddings": True}),
        ("llama", "int8", {}),
        ("llama", "int4", {"tie_word_embeddings": True}),
        ("xlm-roberta", "int8_weight", {"pad_token_id": 1}),
    ],
)
def test_transformers_loads_the_token_embedding_in_8_bits(tmp_path, family, name, changes):
    model = rounded(save_stock(tmp_path / "model", family, **changes), name, embeddings=True)
    assert write_torchao_folder(model, tmp_path / "small") == []
    loads = AutoModelForCausalLM if family == "llama" else AutoModelForMaskedLM
    found, report = loads.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(report.values()), report
    table, head = found.get_input_embeddings().weight, found.get_output_embeddings().weight
    assert (type(table).__name__, table.target_dtype) == ("IntxUnpackedToInt8Tensor", torch.int8)
    [path] = [path for path, matrix in model.matrices.items() if matrix.is_embedding]
    assert torch.equal(table.qdata, model.weight(path).values_NK)
    assert (head is table) == found.config.tie_word_embeddings
    # The same operations in the same order.
    assert apart(found, loaded(model)) < 1e-6


def test_an_output_projection_that_is_not_chosen_stays_next_to_a_rounded_embedding(tmp_path):
    model = rounded(save_stock(tmp_path / "model"), "int8", ("mlp.up_proj",), ["lm_head"], embeddings=True)
    write_torchao_folder(model, tmp_path / "small")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert type(found.lm_head.weight) is torch.nn.Parameter
    assert apart(found, loaded(model)) < 1e-6  # the same operations in the same order


@pytest.mark.parametrize(("kind", "family"), [("transformers", "gemma"), ("compressed-tensors", "llama")])
def test_an_embedding_that_the_reader_cannot_take_in_8_bits_has_the_rounded_values(tmp_path, kind, family):
    pytest.importorskip("compressed_tensors")
    writes = write_torchao_folder if kind == "transformers" else write_compressed_tensors
    folder = save_stock(tmp_path / "model", family, tie_word_embeddings=True)
    model = rounded(folder, "int8_weight", others=["lm_head"], embeddings=True)
    [note] = writes(model, tmp_path / "small")
    assert note.startswith("the token embedding has the rounded values in float32")
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(report.values()), report
    table = found.model.embed_tokens.weight
    assert type(table) is torch.nn.Parameter and found.lm_head.weight is table
    assert torch.equal(table, model.weight("model.embed_tokens").dequantized())
    assert apart(found, loaded(model)) < 1e-6  # the same operations in the same order


def test_modules_that_are_not_chosen_stay_in_floating_point(tmp_path):
    folder = save_stock(tmp_path / "model", "qwen3", torch.bfloat16, tie_word_embeddings=True)
    model = rounded(folder, "int8_weight", ("mlp.up_proj", "mlp.down_proj"), others=["lm_head"])
    write_torchao_folder(model, tmp_path / "small")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype="auto")
    assert type(found.model.layers[0].self_attn.q_proj.weight) is torch.nn.Parameter
    assert found.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    # In bf16 the scales may be rounded once more when they are loaded: 2^-9 per weight.
    assert apart(found, loaded(model)) < 2e-2


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_has_the_names_and_integers_of_its_own_reader(tmp_path, name):
    pytest.importorskip("compressed_tensors")
    model = rounded(save_stock(tmp_path / "model"), name)
    write_compressed_tensors(model, tmp_path / "small")
    settings = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    (group,) = settings["config_groups"].values()
    assert settings["quant_method"] == "compressed-tensors" and group["targets"] == ["Linear"]
    assert settings["format"] == ("int-quantized" if name == "int8" else "pack-quantized")
    # What vLLM's reader asks of int8 inputs: dynamic, per token; of weights: symmetric, static.
    inputs, weights = group.get("input_activations"), group["weights"]
    assert (inputs is not None) == (name == "int8") and weights["symmetric"] and not weights["dynamic"]
    assert inputs is None or (inputs["dynamic"] is True and inputs["strategy"] == "token" and inputs["num_bits"] == 8)
    files = load_file(tmp_path / "small" / "model.safetensors")
    own = {key.rpartition(".")[2] for key in files if ".down_proj." in key}
    packed = {"weight_packed", "weight_scale", "weight_shape"}
    assert own == ({"weight", "weight_scale"} if name == "int8" else packed)
    found, report = AutoModelForCausalLM.from_pretrained(tmp_path / "small", output_loading_info=True)
    assert not any(report.values()), report
    # Inputs are divided by their scale there and multiplied by its reciprocal here: some of the 8-bit integers differ
    # by one, which is 1/255 of a token's range.
    assert apart(found, loaded(model)) < (1e-2 if name == "int8" else 1e-6)
    values = found.model.layers[0].mlp.up_proj.weight.detach()
    assert torch.equal(values.float(), model.weight("model.layers.0.mlp.up_proj").dequantized())


def test_float8_weights_are_those_of_compressed_tensors(tmp_path):
    pytest.importorskip("compressed_tensors")
    model = rounded(save_stock(tmp_path / "model"), "fp8", embeddings=True)
    write_compressed_tensors(model, tmp_path / "small")
    files = load_file(tmp_path / "small" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert files[f"{name}.weight"].dtype == torch.float8_e4m3fn
    assert torch.equal(files[f"{name}.weight"].float(), model.weight(name).values_NK.float())
    table = model.source.tensors["model.embed_tokens.weight"]
    assert torch.equal(files["model.embed_tokens.weight"], quantized(table, scheme_of("int8_weight")).dequantized())
    with pytest.raises(UserError, match="fp8 is not written in this format"):
        write_torchao_folder(model, tmp_path / "other")


def test_a_folder_of_several_files_loads(tmp_path, monkeypatch):
    model = rounded(save_stock(tmp_path / "model"), "int8_weight")
    monkeypatch.setattr("cook.export.model_folder.ShardWriter", small_shards)
    write_torchao_folder(model, tmp_path / "small")
    assert len(list((tmp_path / "small").glob("model-*"))) > 2
    assert apart(AutoModelForCausalLM.from_pretrained(tmp_path / "small"), loaded(model)) < 1e-6


def small_shards(folder, _shard_bytes, metadata):
    from cook.base.tensor_files import ShardWriter

    return ShardWriter(folder, 20_000, metadata)


def test_modules_of_other_classes_are_refused(tmp_path):
    GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=96, bos_token_id=1, eos_token_id=2)
    ).save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"c_attn: this format holds modules of the class torch.nn.Linear alone"):
        write_torchao_folder(rounded(tmp_path / "model", "int8"), tmp_path / "small")


def test_weights_are_rounded_from_the_type_of_the_training():
    torch.manual_seed(0)
    weight = torch.randn(8, 32)
    scheme = scheme_of("int8")
    with torch.device("meta"):
        matrices = chosen_modules(torch.nn.Sequential(torch.nn.Linear(32, 8)), scheme)
    parts = {"source": SimpleNamespace(tensors={"0.weight": weight}), "scheme": scheme, "matrices": matrices}
    model = QuantizedModel(**parts, others=())
    assert torch.equal(model.weight("0").values_NK, quantized(weight, scheme).values_NK)
    half = QuantizedModel(**parts, others=(), precision=torch.bfloat16)
    assert torch.equal(half.weight("0").values_NK, quantized(weight.bfloat16(), scheme).values_NK)
