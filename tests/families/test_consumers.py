"""What other programs make of exported folders: the table of misreadings against the programs themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cook.export.pruned_folder import prune_to_folder, reshaped_source
from cook.families.consumers import MISREADINGS, RAGGED, misread_by
from cook.families.source import load_model
from tests.tiny_families import tiny_source

IDS = [5, 7, 11, 13, 2, 9, 8, 30]
EXACT = 1e-5
GEMMA = {
    "query_pre_attn_scalar": 4,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 64,
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
}
PUBLISHED = {
    "llama": {"attention_bias": False, "mlp_bias": False},
    "mistral": {"sliding_window": 64},
    "qwen2": {"use_sliding_window": False, "layer_types": ["full_attention"] * 3, "vocab_size": 62},
    "qwen3": {},
    "gemma3": GEMMA,
    "gpt2": {"head_dim": None},
    "opt": {"head_dim": None, "word_embed_proj_dim": 32, "activation_function": "relu", "vocab_size": 64},
}
"""The traits that models of the family have on a hub, so that every program can read the model before pruning.

CTranslate2 4.8 does not read Phi-3 and GPT-NeoX as transformers 5 loads them, and lacks Gemma 2's soft-capping."""


def shaped_like_published(name):
    return tiny_source(name, **{"head_dim": 4, **PUBLISHED[name]})


def masks_of(space, kind):
    """Half of the heads, dims or layers."""
    if kind == "layers":
        return {g.name: torch.tensor([float(g.layer != 1)]) for g in space.of("layer")}
    groups = space.of({"heads": "heads", "dims": "dimff", "nothing": "heads"}[kind]) if kind != "nothing" else ()
    return {g.name: (torch.arange(g.section_size) < g.section_size // 2).float().repeat(g.sections) for g in groups}


def write_tokenizer(folder, size):
    words = ["<unk>", "<s>", "</s>", "<pad>", *(f"w{n}" for n in range(size - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)


def ctranslate2_logits(folder):
    """None where it fails."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(folder)).convert(str(folder / "ct2"))
    generator = ctranslate2.Generator(str(folder / "ct2"), device="cpu", compute_type="float32")
    ids = ctranslate2.StorageView.from_array(np.array([IDS], dtype=np.int32))
    lengths = ctranslate2.StorageView.from_array(np.array([len(IDS)], dtype=np.int32))
    try:
        return np.array(generator.forward_batch(ids, lengths))[0]
    except ValueError:
        return None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["nothing", "heads", "query heads", "dims", "layers"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_ctranslate2_misreads_what_the_table_says(tmp_path, name, kind):
    pytest.importorskip("ctranslate2")
    source = shaped_like_published(name)
    unit, kind = ("query_head", "heads") if kind == "query heads" else ("kv_group", kind)
    space = source.adapter.space(source.config, unit)
    pruned = prune_to_folder(source, space, masks_of(space, kind), tmp_path / "m")
    if pruned.needs_remote_code:
        assert kind == "heads" and name in ("gpt2", "opt")
        return
    write_tokenizer(tmp_path / "m", pruned.config["vocab_size"])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "m")(torch.tensor([IDS])).logits[0].numpy()
    found = ctranslate2_logits(tmp_path / "m")
    is_right = found is not None and abs(found[:, : expected.shape[1]] - expected).max() <= EXACT * abs(expected).max()
    warned = any(sentence.startswith("CTranslate2") for sentence in misread_by(pruned.config))
    assert is_right != warned, (is_right, misread_by(pruned.config))
    assert warned == (kind == "heads" and name in ("llama", "qwen2"))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["heads", "a block"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "gemma3", "gpt2", "bert"])
def test_onnx_runtime_runs_what_torch_exports(tmp_path, name, kind):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    source = tiny_source(name)
    space = source.adapter.space(source.config)
    masks = masks_of(space, "heads") if kind == "heads" else {"layers.1.att": torch.zeros(1)}
    model = load_model(reshaped_source(source, space, masks)).eval()
    model.config.use_cache = False

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids=input_ids).logits

    ids = torch.tensor([IDS])
    torch.onnx.export(Logits(), (ids,), str(tmp_path / "m.onnx"), input_names=["input_ids"], dynamo=True)
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = model(input_ids=ids).logits.numpy()
    found = session.run(None, {"input_ids": ids.numpy()})[0]
    assert abs(found - expected).max() <= EXACT * abs(expected).max()


@pytest.mark.parametrize(
    "name, changes, kind, consumers",
    [
        ("llama", {}, "heads", ["CTranslate2 4.8"]),
        ("qwen2", {}, "heads", ["CTranslate2 4.8", "vLLM"]),
        ("phi3", {}, "heads", ["llama.cpp"]),
        ("phi3", {}, "dims", []),
        ("mistral", {}, "heads", []),
        ("gemma2", {}, "heads", []),
        ("gemma2", {"layer_types": None}, "layers", ["llama.cpp"]),
        ("gemma3", {"layer_types": None, "num_hidden_layers": 7}, "layers", ["llama.cpp"]),
        ("gemma3", {"layer_types": None, "num_hidden_layers": 7}, "dims", []),
        ("gpt2", {"head_dim": None}, "dims", []),
        ("bert", {"head_dim": None}, "dims", []),
    ],
)
def test_every_misreading_is_named(name, changes, kind, consumers):
    source = tiny_source(name, **{"head_dim": 4, **changes})
    space = source.adapter.space(source.config)
    config = reshaped_source(source, space, masks_of(space, kind)).config
    assert [sentence.split(" assumes")[0] for sentence in misread_by(config)] == consumers
    assert misread_by(source.config) == []


def test_an_uneven_model_is_for_transformers_alone():
    source = tiny_source("llama")
    config = reshaped_source(source, source.adapter.space(source.config), {"layers.1.att": torch.zeros(1)}).config
    assert misread_by(config) == [RAGGED]


def test_what_a_test_runs_is_told_from_what_was_read():
    assert {m.consumer for m in MISREADINGS if m.was_run} == {"CTranslate2 4.8"}
