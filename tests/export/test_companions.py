"""Oracle: the tokenizers and folders that transformers itself saves."""

from __future__ import annotations

import json
import os

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cook.export import companions
from cook.export.companions import copy_companions, name_tokenizer_class

TEXT = ["a small boat goes down the river", "the old man sees a red bird"] * 20


def fast_tokenizer(folder):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(special_tokens=["<s>", "</s>"], show_progress=False))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.add_tokens(["<tool>"])
    made.chat_template = {"default": "{{ messages }}", "rag": "{{ documents }}"}
    made.save_pretrained(folder)


def slow_tokenizer(folder):
    folder.mkdir(parents=True)
    (folder / "text").write_text("\n".join(TEXT))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=60,
        hard_vocab_limit=False,
        model_type="bpe",
        minloglevel=2,
    )
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "added_tokens.json").write_text(json.dumps({"<tool>": 60}))


def assert_same_tokenizer(source, folder):
    ours, theirs = (AutoTokenizer.from_pretrained(path, trust_remote_code=False) for path in (folder, source))
    assert type(ours) is type(theirs) and len(ours) == len(theirs) and ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template and ours.special_tokens_map == theirs.special_tokens_map
    text = "<s>the old boat <tool> sees a bird"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]


@pytest.mark.parametrize("save", [fast_tokenizer, slow_tokenizer])
def test_the_tokenizer_of_the_result_is_that_of_the_source(tmp_path, save):
    source, folder = tmp_path / "a", tmp_path / "b"
    save(source)
    config = json.dumps({"model_type": "llama"})
    for path in (source, folder):
        path.mkdir(exist_ok=True)
        (path / "config.json").write_text(config)
    assert copy_companions(source, folder).has_tokenizer
    assert_same_tokenizer(source, folder)


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "phi3", "gpt2"])
@pytest.mark.parametrize("named", [True, False])
def test_a_type_of_model_that_transformers_does_not_know_keeps_its_tokenizer(tmp_path, model_type, named):
    source, folder = tmp_path / "a", tmp_path / "b"
    fast_tokenizer(source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizerFast"}
    (source / "tokenizer_config.json").write_text(
        json.dumps({k: v for k, v in settings.items() if named or k != "tokenizer_class"})
    )
    (source / "config.json").write_text(json.dumps({"model_type": model_type}))
    folder.mkdir()
    own = {"model_type": "cook_ragged", "stock_type": model_type, "auto_map": {"AutoConfig": "modeling_x.Config"}}
    (folder / "config.json").write_text(json.dumps(own))
    (folder / "modeling_x.py").write_text("raise SystemExit('the code of the folder ran')")
    copy_companions(source, folder)
    name_tokenizer_class(folder, model_type)
    assert_same_tokenizer(source, folder)


def test_all_goes_along_but_what_is_excluded(tmp_path):
    source, folder = tmp_path / "a", tmp_path / "b"
    goes = [
        "1_Pooling/config.json",
        "2_Dense/config.json",
        "2_Dense/model.safetensors",
        "LICENSE",
        "additional_chat_templates/rag.jinja",
        "added_tokens.json",
        "config_sentence_transformers.json",
        "generation_config.json",
        "merges.txt",
        "modules.json",
        "sentence_bert_config.json",
        "spiece.model",
        "tokenization_own.py",
        "tokenizer.json",
        "vocab.bpe",
    ]
    own = [
        "README.md",
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "modeling_cook_ragged.py",
        "cook_experts.py",
        "masks/fine.pt",
        ".git/config",
        ".cache/x",
        "__pycache__/x.pyc",
    ]
    left = [
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoint-5/model.safetensors",
        "model.gguf",
        "onnx/model.onnx",
        "optimizer.pt",
        "other/config.json",
        "pytorch_model.bin",
        "trainer_state.json",
        "training_args.bin",
    ]
    for name in (*goes, *own, *left):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense")]
    (source / "modules.json").write_text(json.dumps(modules))
    folder.mkdir()
    found = copy_companions(source, folder)
    assert sorted(found.copied) == sorted(goes) and found.has_tokenizer
    assert {name.split("/")[0] for name in left} == {name for name, _ in found.left}
    assert sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()) == sorted(goes)
    assert all((folder / name).read_bytes() == (source / name).read_bytes() for name in goes)


def test_what_the_new_model_has_is_not_replaced(tmp_path):
    source, folder = tmp_path / "a", tmp_path / "b"
    for path in (source, folder):
        path.mkdir()
        (path / "generation_config.json").write_text(path.name)
    assert copy_companions(source, folder).copied == ()
    assert (folder / "generation_config.json").read_text() == "b"


def test_links_huge_files_and_special_files_stay_behind_by_name(tmp_path, monkeypatch):
    source, folder = tmp_path / "a", tmp_path / "b"
    source.mkdir()
    folder.mkdir()
    (tmp_path / "secret.json").write_text("of somebody else")
    (source / "vocab.json").write_text("{}")
    (source / "alias.json").symlink_to("vocab.json")
    (source / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    (source / "templates").symlink_to(tmp_path)
    (source / "gone.json").symlink_to("nowhere.json")
    os.mkfifo(source / "pipe.json")
    (source / "big.txt").write_text("x" * 2000)
    monkeypatch.setattr(companions, "LARGEST", 1000)
    found = copy_companions(source, folder)
    assert found.copied == ("alias.json", "vocab.json")
    assert dict(found.left) == {
        "big.txt": "larger than 0 MiB",
        "gone.json": "a broken link",
        "pipe.json": "not a regular file",
        "templates": "a link to a file outside the folder",
        "tokenizer.json": "a link to a file outside the folder",
    }
    assert not (folder / "alias.json").is_symlink() and (folder / "alias.json").read_text() == "{}"


def test_the_layout_of_a_hubs_cache_is_followed(tmp_path):
    source, folder = tmp_path / "models--x" / "snapshots" / "abc", tmp_path / "b"
    source.mkdir(parents=True)
    folder.mkdir()
    (tmp_path / "models--x" / "blobs").mkdir()
    (tmp_path / "models--x" / "blobs" / "123").write_text("{}")
    (source / "tokenizer.json").symlink_to("../../blobs/123")
    assert copy_companions(source, folder).copied == ("tokenizer.json",)
    assert copy_companions(source / "tokenizer.json", folder).copied == ()  # a file has no companions
