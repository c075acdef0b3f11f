"""`cook quantize` on a model folder, without training: formats, the table, mistakes."""

from __future__ import annotations

import shutil

import pytest
from transformers import AutoModelForCausalLM

from cook.base.errors import UserError, UserErrors
from cook.evaluation.loading import Entry
from cook.evaluation.measure import measure_loss
from cook.evaluation.settings import Settings
from cook.recipe.quantize_run import QuantizeOptions, quantize_run
from tests.quantization.tiny_stock import save_stock
from tests.text.test_hf import gpt2_like

pytest.importorskip("torchao")
TEXT = "The quick brown fox jumps over the lazy dog.\n" * 6


@pytest.fixture
def folder(tmp_path, monkeypatch):
    save_stock(tmp_path / "model", vocab_size=304)
    gpt2_like(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("scheme", "embeddings"), [("int8", True), ("int4", False)])
def test_the_table_has_sizes_and_losses(folder, capsys, scheme, embeddings):
    options = {"model": "model", "output": "small", "scheme": scheme, "data": ["text.txt"], "window": 32}
    options["embeddings"] = embeddings
    quantize_run(QuantizeOptions(**options))
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    before, after = ([cell.strip() for cell in row[1:-1]] for row in rows[-2:])
    assert before[0] == "before" and after[0] == scheme and float(before[2]) == 32.0 and float(after[2]) < 20
    assert float(before[3]) != float(after[3]) and float(after[3]) == pytest.approx(float(before[3]), rel=0.2)
    assert (folder / "small" / "tokenizer.json").exists()
    settings = Settings(window=32, device="cpu")
    _, record = measure_loss(Entry(name="small", folder="small"), TEXT, settings)
    assert record["loss"] == pytest.approx(float(after[3]), abs=1e-4), "cook eval measures the folder itself"
    quantize_run(QuantizeOptions(**options))  # replaces its own folder


def test_the_other_formats(folder, capsys):
    pytest.importorskip("compressed_tensors"), pytest.importorskip("gguf")
    quantize_run(QuantizeOptions(model="model", output="ct", scheme="int4", format="compressed-tensors"))
    quantize_run(
        QuantizeOptions(model="model", output="gguf", scheme="int8_weight", format="gguf", modules=["down_proj"])
    )
    assert "2 modules as int8_weight" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("gguf", gguf_file="model.gguf").config.vocab_size == 304
    assert AutoModelForCausalLM.from_pretrained("ct").config.quantization_config


def test_the_token_embedding_is_rounded_on_request(folder, capsys):
    pytest.importorskip("compressed_tensors"), pytest.importorskip("gguf")
    save_stock(folder / "tied", vocab_size=304, tie_word_embeddings=True)
    bits = {}
    for format in ("transformers", "gguf", "compressed-tensors"):
        for embeddings in (False, True):
            options = {"model": "tied", "output": "small", "format": format, "embeddings": embeddings}
            quantize_run(QuantizeOptions(**options))
            said = capsys.readouterr().out
            assert (", the token embedding in 8 bits" in said) == embeddings and "14 modules as int8" in said
            bits[format, embeddings] = float(said.splitlines()[6].split("|")[3])
            assert ("vLLM reads no quantized one" in said) == (embeddings and format == "compressed-tensors")
    # 9,728 of 34,464 weights are the embedding's: 8.5 bits in place of 32 in the file; in the folder 9.25 and names.
    saved = {format: bits[format, False] - bits[format, True] for format in ("transformers", "gguf")}
    assert saved["gguf"] == pytest.approx(23.5 * 9728 / 34464, abs=0.02) and 6 < saved["transformers"] < 6.5
    assert bits["compressed-tensors", False] == bits["compressed-tensors", True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "model"}, "needs a model and a folder to write"),
        ({"model": "model", "output": "model"}, "would overwrite the original"),
        ({"model": "model", "output": "small", "group_size": 12, "scheme": "int4"}, "--group-size: not usable"),
        ({"model": "model", "output": "small", "group_size": 64}, "only int4 has groups"),
        ({"model": "model", "output": "small", "data": ["text.txt"], "window": 1}, "--window is out of range"),
        ({"model": "model", "output": "small", "format": "onnx"}, "there is no such format"),
        ({"config": "bmcook.json", "scheme": "int4"}, "--scheme: the run has been trained with its own"),
        ({"config": "bmcook.json", "embeddings": True}, "--embeddings: the run has been trained with its own"),
        ({"model": "model", "output": "small", "modules": ["q_prj"]}, "did you mean"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(folder, options, message):
    with pytest.raises((UserError, UserErrors), match=message):
        quantize_run(QuantizeOptions(**options))
    assert sorted(path.name for path in folder.iterdir()) == ["model", "text.txt"]


def test_a_quantized_model_is_not_quantized_again(folder):
    quantize_run(QuantizeOptions(model="model", output="small"))
    with pytest.raises(UserError, match="is quantized"):
        quantize_run(QuantizeOptions(model="small", output="smaller"))
    shutil.rmtree("small")
