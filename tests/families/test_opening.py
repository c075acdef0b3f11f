"""Opening a folder agrees with `from_pretrained` of stock transformers in every detail, or is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cook.base.errors import UserError
from cook.export.check import account
from cook.export.pruned_folder import mask_model, prune_to_folder
from cook.families.layout import Attention, Family, FeedForward
from cook.families.registry import OWN, register, unregister
from cook.families.source import load_model, open_model
from cook.families.stock import stock_adapter
from cook.families.stock_models import config_object
from cook.pruning.counts import unit_parameters
from cook.pruning.mask_set import Masks
from cook.pruning.units import PruningSpace
from tests.families.test_images import CONFIGS as WITH_IMAGES
from tests.tiny_families import CAUSAL, FAMILIES, MOE, MORE, MORE_ENCODERS, tiny_config

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
SHARD = "20KB"


def auto_class(name: str):
    return transformers.AutoModelForCausalLM if name in (*CAUSAL, *MORE) else transformers.AutoModelForMaskedLM


def stock(name: str, *, seed: int = 0, cls=None, **changes) -> torch.nn.Module:
    """A stock model whose every weight and persistent buffer matters."""
    torch.manual_seed(seed)
    made = config_object(tiny_config(name, **changes))
    model = getattr(transformers, cls)(made) if isinstance(cls, str) else (cls or auto_class(name)).from_config(made)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor.data = tensor.data + 0.2 * torch.randn(tensor.shape)
    model.tie_weights()
    return model.eval()


def loaded(folder: Path, name: str, **options) -> torch.nn.Module:
    return auto_class(name).from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def full_masks(space: PruningSpace) -> Masks:
    return {group.name: torch.ones(group.size) for group in space.groups}


def assert_opened_as_stock_does(folder: Path, name: str, out: Path) -> None:
    expected = logits(loaded(folder, name))
    source = open_model(folder)
    assert torch.equal(logits(load_model(source)), expected)
    space = source.adapter.space(source.config)
    prune_to_folder(source, space, full_masks(space), out)
    again, report = auto_class(name).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(again.eval()), expected)


def resave(folder: Path, change) -> None:
    """Changes the tensors of a single-file folder."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **fields) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_every_family_of_the_table_is_tried():
    here, elsewhere = FAMILIES | MORE | MORE_ENCODERS, MOE  # tests/families/test_experts.py
    tried = {fields["model_type"] for fields in (here | elsewhere).values()} | set(WITH_IMAGES)
    assert {t for adapter in OWN if adapter.abilities.is_stock for t in adapter.model_types} == tried


@pytest.mark.parametrize("name", [*MORE, *MORE_ENCODERS])
def test_a_folder_of_a_further_family(tmp_path, name):
    for tied in (False, True):
        folder, out = tmp_path / f"m{tied}", tmp_path / f"out{tied}"
        stock(name, tie_word_embeddings=tied).save_pretrained(folder)
        assert_opened_as_stock_does(folder, name, out)
        before, after = stored(folder), stored(out)
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_folder_that_save_pretrained_wrote(tmp_path, name, shards, tied):
    model = stock(name, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "m", **({"max_shard_size": SHARD} if shards else {}))
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == shards
    assert torch.equal(logits(loaded(tmp_path / "m", name)), logits(model))
    assert_opened_as_stock_does(tmp_path / "m", name, tmp_path / "out")
    before, after = stored(tmp_path / "m"), stored(tmp_path / "out")
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", CAUSAL)
def test_the_bare_model_of_a_tied_one(tmp_path, name):
    model = stock(name, tie_word_embeddings=True)
    model.base_model.save_pretrained(tmp_path / "m")
    assert torch.equal(logits(loaded(tmp_path / "m", name)), logits(model))
    assert_opened_as_stock_does(tmp_path / "m", name, tmp_path / "out")


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_a_bare_encoder(tmp_path, name):
    model = stock(name, cls=transformers.AutoModel, architectures=None)
    model.save_pretrained(tmp_path / "m")
    source = open_model(tmp_path / "m")
    prune_to_folder(source, source.adapter.space(source.config), {}, tmp_path / "out")
    with torch.no_grad():
        expected = model(input_ids=IDS).pooler_output
        assert torch.equal(load_model(source)(input_ids=IDS).pooler_output, expected)
        again = transformers.AutoModel.from_pretrained(tmp_path / "out")
        assert torch.equal(again(input_ids=IDS).pooler_output, expected)
    assert stored(tmp_path / "out").keys() == stored(tmp_path / "m").keys()


@pytest.mark.parametrize("name", CAUSAL)
def test_the_bare_model_of_an_untied_one_lacks_a_head(tmp_path, name):
    stock(name, tie_word_embeddings=False).base_model.save_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match="'lm_head.weight' is missing"):
        open_model(tmp_path / "m")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_of_its_own_beside_a_tied_table_is_kept(tmp_path, name):
    stock(name, tie_word_embeddings=False).save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", tie_word_embeddings=True)
    assert_opened_as_stock_does(tmp_path / "m", name, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert stored(tmp_path / "out").keys() == stored(tmp_path / "m").keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_that_repeats_the_tied_table_is_one_with_it(tmp_path, name):
    tied = stock(name, tie_word_embeddings=True)
    untied = stock(name, tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    untied.save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", tie_word_embeddings=True)
    assert_opened_as_stock_does(tmp_path / "m", name, tmp_path / "out")
    tied.save_pretrained(tmp_path / "tied")
    assert stored(tmp_path / "out").keys() == stored(tmp_path / "tied").keys()


@pytest.mark.parametrize("name", [name for name in CAUSAL if "tied" in name])
def test_a_tied_file_that_holds_the_head_alone(tmp_path, name):
    stock(name, tie_word_embeddings=True).save_pretrained(tmp_path / "m")
    resave(tmp_path / "m", lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    assert_opened_as_stock_does(tmp_path / "m", name, tmp_path / "out")


def test_the_head_of_gpt_neox_has_the_name_that_its_files_have(tmp_path):
    stock("gpt_neox").save_pretrained(tmp_path / "m")
    assert "embed_out.weight" in stored(tmp_path / "m")
    source = open_model(tmp_path / "m")
    space = source.adapter.space(source.config)
    assert space.logits_weight == "lm_head.weight"
    masks = {g.name: (torch.arange(g.size) % 2).float() for g in space.of("dimff")}
    prune_to_folder(source, space, masks, tmp_path / "small")
    assert "embed_out.weight" in stored(tmp_path / "small")
    # Files of the ragged class are read without that table of names.
    prune_to_folder(source, space, {"layers.0.att": torch.zeros(1)}, tmp_path / "ragged")
    assert "lm_head.weight" in stored(tmp_path / "ragged")
    _, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ragged", trust_remote_code=True, output_loading_info=True
    )
    assert not any(report.values()), report
    reopened = open_model(tmp_path / "ragged")
    assert torch.equal(reopened.tensors["lm_head.weight"], source.tensors["lm_head.weight"])


@pytest.mark.parametrize("with_shards", [False, True])
def test_one_file_goes_before_an_index(tmp_path, with_shards):
    folder = tmp_path / "m"
    stock("llama", seed=1).save_pretrained(folder, max_shard_size=SHARD)
    stock("llama", seed=2).save_pretrained(tmp_path / "new")
    shutil.copy(tmp_path / "new" / "model.safetensors", folder)
    if not with_shards:
        for shard in folder.glob("model-*"):
            shard.unlink()
    assert_opened_as_stock_does(folder, "llama", tmp_path / "out")


def test_a_tensor_that_the_index_forgot_is_read_and_a_shard_that_is_gone_is_missed(tmp_path):
    folder = tmp_path / "m"
    stock("llama").save_pretrained(folder, max_shard_size=SHARD)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_opened_as_stock_does(folder, "llama", tmp_path / "out")
    index["weight_map"]["model.extra.weight"] = index["weight_map"]["lm_head.weight"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="lists 'model.extra.weight', which none of the shards contains"):
        open_model(folder)
    shutil.copy(sorted(folder.glob("model-*"))[0], folder / "model-again.safetensors")
    index["weight_map"]["model.extra.weight"] = "model-again.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="another shard also contains"):
        open_model(folder)
    sorted(folder.glob("model-0*"))[0].unlink()
    with pytest.raises(UserError, match="there is no such file"):
        open_model(folder)


@pytest.mark.parametrize(
    ("cls", "word"),
    [
        ("LlamaForSequenceClassification", "score"),
        ("LlamaForTokenClassification", "score"),
        ("LlamaForQuestionAnswering", "qa_outputs|transformer"),
        ("Qwen2ForSequenceClassification", "score"),
        ("Qwen3ForSequenceClassification", "score"),
        ("GPT2ForSequenceClassification", "score"),
        ("GPT2DoubleHeadsModel", "multiple_choice_head"),
        ("GPT2ForQuestionAnswering", "qa_outputs"),
        ("OPTForSequenceClassification", "score"),
        ("GPTNeoXForTokenClassification", "classifier"),
        ("BertLMHeadModel", "BertLMHeadModel"),
        ("RobertaForCausalLM", "RobertaForCausalLM"),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_another_tasks_head_is_refused_by_name(tmp_path, cls, word, tied):
    name = next(name for name in FAMILIES if cls.lower().startswith(name.replace("_", "")))
    stock(name, cls=cls, tie_word_embeddings=tied, architectures=None).save_pretrained(tmp_path / "m")
    with pytest.raises(UserError) as error:
        open_model(tmp_path / "m")
    assert cls in str(error.value), error.value


@pytest.mark.parametrize("name", ["v_head.summary.weight", "score.weight", "mtp.layers.0.weight", "lm_head.bias"])
def test_a_weight_of_another_head_is_not_dropped(tmp_path, name):
    stock("llama").save_pretrained(tmp_path / "m")
    resave(tmp_path / "m", lambda t: t.update({name: torch.ones(1, 32)}))
    with pytest.raises(UserError, match=f"'{name}' has no place"):
        open_model(tmp_path / "m")


@pytest.mark.parametrize("cls", ["BertForPreTraining", "BertForMaskedLM", "RobertaForMaskedLM"])
def test_heads_of_other_tasks_go_along_with_an_encoder(tmp_path, cls):
    """The pooler and the head for pairs of sentences, which the published files of masked-language models hold."""
    name = "bert" if cls.startswith("Bert") else "roberta"
    model = stock(name, cls=cls, architectures=None)
    model.save_pretrained(tmp_path / "m")
    if cls != "BertForPreTraining":
        resave(tmp_path / "m", lambda t: t.update({f"{name}.pooler.dense.weight": torch.ones(32, 32)}))
    source = open_model(tmp_path / "m")
    space = source.adapter.space(source.config)
    prune_to_folder(source, space, full_masks(space), tmp_path / "out")
    before, after = stored(tmp_path / "m"), stored(tmp_path / "out")
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
    carried, masks = set(account(source, space).carried), {"layers.1.dimff": torch.zeros(20)}
    if cls == "BertForPreTraining":  # the ragged class has no second head, so its weights would be lost
        with pytest.raises(UserError, match="nothing was written"):
            prune_to_folder(source, space, masks, tmp_path / "ragged")
        return
    prune_to_folder(source, space, masks, tmp_path / "ragged")
    assert stored(tmp_path / "ragged").keys() >= carried != set()
    ragged = open_model(tmp_path / "ragged")
    assert set(account(ragged, ragged.adapter.space(ragged.config)).carried) == carried


def test_the_decoder_of_a_roberta_head_is_tied_to_its_table(tmp_path):
    model = stock("roberta", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "m")
    table = load_file(tmp_path / "m" / "model.safetensors")["roberta.embeddings.word_embeddings.weight"]
    resave(tmp_path / "m", lambda t: t.update({"lm_head.decoder.weight": table.clone()}))
    assert_opened_as_stock_does(tmp_path / "m", "roberta", tmp_path / "out")
    resave(tmp_path / "m", lambda t: t.update({"lm_head.decoder.weight": table + 1}))
    assert_opened_as_stock_does(tmp_path / "m", "roberta", tmp_path / "out")


def quantized_tensors(kind):
    def change(tensors):
        for name in [name for name in tensors if "proj.weight" in name]:
            value = tensors.pop(name)
            if kind == "gptq":
                tensors[name.replace("weight", "qweight")] = torch.zeros(4, len(value), dtype=torch.int32)
            elif kind == "bitsandbytes":
                tensors[name] = torch.zeros(value.numel() // 2, 1, dtype=torch.uint8)
                tensors[f"{name}.absmax"] = torch.zeros(8)
            else:
                tensors[name] = value.to(torch.float8_e4m3fn)

    return change


@pytest.mark.parametrize(
    ("kind", "is_said"),
    # Without quantization_config, nothing in a folder shows that its weights are fp8 or AWQ.
    [*((kind, True) for kind in ("gptq", "bitsandbytes", "fp8", "awq")), ("gptq", False), ("bitsandbytes", False)],
)
def test_a_quantized_folder_is_called_so(tmp_path, kind, is_said):
    stock("llama").save_pretrained(tmp_path / "m")
    resave(tmp_path / "m", quantized_tensors(kind))
    if is_said:
        edit_config(tmp_path / "m", quantization_config={"quant_method": kind})
    with pytest.raises(UserError, match="quantized") as error:
        open_model(tmp_path / "m")
    assert "dequantize" in str(error.value) and (kind in str(error.value) or not is_said)


def test_an_adapter_beside_the_weights_is_refused(tmp_path):
    stock("llama").save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"adapter_config.json[\s\S]*merge"):
        open_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="an adapter is not a model"):
        open_model(tmp_path / "m")


def test_weights_as_torch_saved_them(tmp_path):
    folder = tmp_path / "m"
    model = stock("llama, tied")
    model.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")  # tied weights twice
    with pytest.raises(UserError, match=r"remedy: save the model as safetensors: .*also reads pytorch_model.bin"):
        open_model(folder)
    source = open_model(folder / "pytorch_model.bin")
    assert source.folder == folder and torch.equal(logits(load_model(source)), logits(model))
    assert torch.equal(logits(loaded(folder, "llama, tied")), logits(model))
    torch.save(model.state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before PyTorch 1.6[\s\S]*remedy"):
        open_model(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").rename(folder / "pytorch_model-00001-of-00001.bin")
    with pytest.raises(UserError, match="remedy: save the model as safetensors"):
        open_model(folder)


APERTUS = Family(
    family="Apertus",
    model_types=frozenset({"apertus"}),
    attention=Attention(norms_before=("attention_layernorm",)),
    ffn=FeedForward(ins=("mlp.up_proj",), norms_before=("feedforward_layernorm",)),
)


def test_persistent_buffers_are_weights(tmp_path):
    """Those of Apertus' activation, of which its files hold other values than the class begins with."""
    config = transformers.ApertusConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    model = transformers.ApertusForCausalLM(config)
    betas = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("beta")]
    assert len(betas) == 3 and all(name in model.state_dict() for name, _ in betas)
    for number, (_, buffer) in enumerate(betas):
        buffer.fill_(0.25 + number)
    model.save_pretrained(tmp_path / "m")
    adapter = stock_adapter(APERTUS)
    register(adapter)
    try:
        assert_opened_as_stock_does(tmp_path / "m", "llama", tmp_path / "out")
        before, after = stored(tmp_path / "m"), stored(tmp_path / "out")
        assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)
        source = open_model(tmp_path / "m")
        space = source.adapter.space(source.config)
        masks = {"layers.0.ffn": torch.zeros(1), "layers.2.dimff": (torch.arange(20) % 2).float()}
        assert unit_parameters(space, space.of("layer")[1]) == sum(
            t.numel() for name, t in model.model.layers[0].state_dict().items() if name.startswith(("mlp", "feedf"))
        )
        prune_to_folder(source, space, masks, tmp_path / "small")
        small = load_model(open_model(tmp_path / "small"))
        assert float(small.model.layers[2].mlp.act_fn.beta) == 2.25
        mask_model(model, space, masks)
        expected = logits(model.eval())
        assert (logits(small) - expected).abs().max() <= 1e-5 * expected.abs().max()
    finally:
        unregister(adapter)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"torch_dtype": "float16"}, {}])
def test_weights_keep_the_type_that_they_are_stored_in(tmp_path, change):
    model = stock("qwen3").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", **change)
    assert_opened_as_stock_does(tmp_path / "m", "qwen3", tmp_path / "out")
    assert {t.dtype for t in stored(tmp_path / "out").values()} == {torch.bfloat16}


def test_variants_and_lone_shards_are_no_model(tmp_path):
    stock("llama").save_pretrained(tmp_path / "m", variant="fp16")
    with pytest.raises(OSError):
        loaded(tmp_path / "m", "llama")
    with pytest.raises(UserError, match="remedy: transformers reads model.safetensors"):
        open_model(tmp_path / "m")


def test_other_files_that_transformers_would_load_are_refused(tmp_path):
    stock("llama").save_pretrained(tmp_path / "m")
    edit_config(tmp_path / "m", transformers_weights="other.safetensors")
    with pytest.raises(UserError, match="names its own file of weights"):
        open_model(tmp_path / "m")
    edit_config(tmp_path / "m", transformers_weights=None)
    shutil.copy(tmp_path / "m/model.safetensors", tmp_path / "m/shard-00001-model-00001-of-00001.safetensors")
    with pytest.raises(UserError, match="distributed checkpoint"):
        open_model(tmp_path / "m")
