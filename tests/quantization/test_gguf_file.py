"""GGUF files, read by gguf, by transformers and by llama.cpp."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cook.base.errors import UserError
from cook.quantization.gguf_file import write_gguf
from cook.quantization.prepare import loaded
from tests.quantization.test_folders import apart, rounded
from tests.quantization.tiny_stock import IDS, save_stock
from tests.text.test_hf import gpt2_like

gguf = pytest.importorskip("gguf")
NAMES = {"mlp.down_proj": "ffn_down", "self_attn.v_proj": "attn_v", "mlp.gate_proj": "ffn_gate"}


def written(tmp_path, scheme: str, name: str = "llama", *, embeddings: bool = False, **changes):
    """The model, the file, and the sentences on what it lacks."""
    model = rounded(save_stock(tmp_path / "model", name, **changes), scheme, embeddings=embeddings)
    notes = write_gguf(model, tmp_path / "model.gguf", tmp_path / "model")
    return model, tmp_path / "model.gguf", notes


@pytest.mark.parametrize(("scheme", "kind"), [("int8_weight", "Q8_0"), ("int8", "Q8_0"), ("int4", "Q4_0")])
def test_the_blocks_hold_the_integers_and_scales(tmp_path, scheme, kind):
    model, file, _ = written(tmp_path, scheme)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for ours, theirs in NAMES.items():
        tensor = tensors[f"blk.1.{theirs}.weight"]
        assert tensor.tensor_type.name == kind
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # Exactly: an integer times a float16 number.
        assert np.array_equal(read, model.weight(f"model.layers.1.{ours}").dequantized().numpy())


@pytest.mark.parametrize("scheme", ["int8_weight", "int4"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_the_token_embedding_has_8_bits_with_the_scale_of_its_row(tmp_path, scheme, is_tied):
    model, file, _ = written(tmp_path, scheme, embeddings=True, tie_word_embeddings=is_tied, hidden_size=64)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    kinds = {name: tensors[name].tensor_type.name for name in ("token_embd.weight", "output.weight") if name in tensors}
    own = {"int8_weight": "Q8_0", "int4": "Q4_0"}[scheme]
    assert kinds == {"token_embd.weight": "Q8_0"} | ({} if is_tied else {"output.weight": own})
    # A block of Q8_0 by hand: a float16 scale and 32 integers.
    blocks = tensors["token_embd.weight"].data.reshape(96, 2, 34)
    scales, integers = blocks[..., :2].copy().view(np.float16), blocks[..., 2:].copy().view(np.int8)
    weight = model.weight("model.embed_tokens")
    assert np.array_equal(integers.reshape(96, 64), weight.values_NK) and weight.scale_NG.shape == (96, 1)
    assert np.array_equal((integers * scales.astype(np.float32)).reshape(96, 64), weight.dequantized().numpy())
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    assert apart(found, loaded(model)) < 1e-6  # the same weights in fp32


def test_a_file_of_a_small_model_with_a_large_embedding_is_small(tmp_path):
    changes = {"vocab_size": 2048, "tie_word_embeddings": True, "hidden_size": 64}
    whole, sizes = save_stock(tmp_path / "model", **changes) / "model.safetensors", []
    for embeddings in (False, True):
        written(tmp_path, "int8", embeddings=embeddings, **changes)
        sizes.append((tmp_path / "model.gguf").stat().st_size / whole.stat().st_size)
    # 34 bytes per 32 weights are 0.266 of fp32; norms and the header are the rest.
    assert sizes[0] > 0.7 and 0.26 < sizes[1] < 0.3


def test_an_embedding_that_fills_no_block_has_its_values_in_fp32(tmp_path):
    model, file, notes = written(tmp_path, "int8_weight", embeddings=True, hidden_size=40, tie_word_embeddings=True)
    table = next(tensor for tensor in gguf.GGUFReader(file).tensors if tensor.name == "token_embd.weight")
    assert table.tensor_type.name == "F32" and "is not a multiple of 32" in notes[-1]
    assert np.array_equal(table.data, model.weight("model.embed_tokens").dequantized().numpy())


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("scheme", ["int8_weight", "int4"])
def test_transformers_reads_the_same_model(tmp_path, name, scheme):
    tied = {"tie_word_embeddings": name == "qwen3"}
    model, file, notes = written(tmp_path, scheme, name, **tied)
    assert "no tokenizer" in notes[0]
    # Its reader does not know the size of a Qwen3's heads.
    config = AutoConfig.from_pretrained(tmp_path / "model") if name == "qwen3" else None
    found = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, config=config)
    assert apart(found, loaded(model)) < 1e-6


@pytest.mark.parametrize(("name", "scheme"), [("llama", "int8_weight"), ("llama", "int4"), ("qwen3", "int8_weight")])
@pytest.mark.parametrize("embeddings", [False, True])
def test_llama_cpp_computes_the_same_to_its_rounding_of_inputs(tmp_path, name, scheme, embeddings):
    llama_cpp = pytest.importorskip("llama_cpp")
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 32
    biases = {"attention_bias": True, "mlp_bias": True}  # as compensation adds them
    changes = {"rope_parameters": rope, **biases} if name == "llama" else {"tie_word_embeddings": True}
    model, file, _ = written(tmp_path, scheme, name, embeddings=embeddings, **changes)
    runs = llama_cpp.Llama(str(file), n_ctx=32, n_threads=1, logits_all=True, verbose=False)
    runs.eval(IDS[0].tolist())
    theirs = np.array(runs.scores[: len(IDS[0])])
    runs.close()
    with torch.no_grad():
        ours = loaded(model)(IDS[:1]).logits[0].numpy()
    # llama.cpp rounds the inputs of every product to 8 bits: 1/254 of the largest of 32, in each of 15 products.
    assert np.abs(ours - theirs).max() < 0.05 * np.abs(ours).max()
    assert (ours.argmax(-1) == theirs.argmax(-1)).mean() > 0.8


def test_a_byte_level_tokenizer_is_part_of_the_file(tmp_path):
    folder = save_stock(tmp_path / "model", vocab_size=304)
    described = json.loads((gpt2_like(folder) / "tokenizer.json").read_text())
    described["model"] |= {"vocab": described["model"]["vocab"] | {"Ġt": 256}, "merges": [["Ġ", "t"]]}
    (folder / "tokenizer.json").write_text(json.dumps(described))
    notes = write_gguf(rounded(folder, "int8"), tmp_path / "model.gguf", folder)
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert notes == [] and len(tokens) == 304 and fields["tokenizer.ggml.model"].contents() == "gpt2"
    assert all(tokens[number] == text for text, number in described["model"]["vocab"].items())
    assert tokens[300] == "<|endoftext|>" and fields["tokenizer.ggml.eos_token_id"].contents() == 300
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert (kinds[10], kinds[280], kinds[300]) == (1, 5, 3), "normal, unused, control"
    assert fields["tokenizer.ggml.merges"].contents() == ["Ġ t"]


def test_inputs_that_fill_no_block_are_stored_in_fp32(tmp_path):
    model, file, notes = written(tmp_path, "int8_weight", intermediate_size=40)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    assert "2 modules, such as model.layers.0.mlp.down_proj" in notes[-1]
    assert tensors["blk.0.ffn_down.weight"].tensor_type.name == "F32"
    assert np.array_equal(
        tensors["blk.0.ffn_down.weight"].data, model.weight("model.layers.0.mlp.down_proj").dequantized().numpy()
    )
    assert apart(AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name), loaded(model)) < 1e-6


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot hold these numbers"):
        written(tmp_path, "fp8")
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(UserError, match="positions of type 'yarn'"):
        written(tmp_path, "int8", rope_parameters=rope)
