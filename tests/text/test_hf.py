import json
import resource

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cook.base.errors import UserError
from cook.text.hf import HuggingFaceTokenizer
from cook.text.tokenizer import load_tokenizer


def gpt2_like(folder, *, eos="<|endoftext|>", settings=()):
    """A byte-level tokenizer without merges: the ids are the bytes' places in GPT-2's alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)} | {"<|endoftext|>": 300}
    rust = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(exist_ok=True)
    rust.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **({"eos_token": eos} if eos else {}), **dict(settings)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_ids_size_and_substitutes_for_missing_special_tokens(tmp_path):
    tokenizer = load_tokenizer("hf", str(gpt2_like(tmp_path)))
    # 256 bytes and one token whose id leaves a hole: the size covers the largest id.
    assert tokenizer.vocab_size == 301
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.unk_id) == (300, 300, 300, None)
    assert tokenizer.start_id is None


@pytest.mark.parametrize(
    ("template", "begins"),
    [("<s> $A", True), ("<s> $A </s>", True), ("$A </s>", False), ("[CLS] $A [SEP]", False), (None, False)],
)
def test_samples_begin_as_the_tokenizer_begins_texts(tmp_path, template, begins):
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>", "[CLS]", "[SEP]"]
    rust = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = {"<s>": 256, "</s>": 257, "[CLS]": 258, "[SEP]": 259}
    rust.add_special_tokens(list(special))
    if template:
        rust.post_processor = TemplateProcessing(single=template, special_tokens=list(special.items()))
    backend = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>")
    backend.save_pretrained(tmp_path / "folder")
    tokenizer = HuggingFaceTokenizer.load(tmp_path / "folder")
    assert tokenizer.bos_id == 256
    assert tokenizer.start_id == (256 if begins else None)


def test_text_is_text_even_where_it_spells_a_special_token(tmp_path):
    tokenizer = HuggingFaceTokenizer.load(gpt2_like(tmp_path))
    text = "a  b\n\té😀<|endoftext|>"
    ids = tokenizer.encode(text)
    assert len(ids) == len(text.encode()) and 300 not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([300]) == "<|endoftext|>"
    batch = tokenizer.encode_batch([text, ""])
    assert batch[0].tolist() == ids and batch[1].tolist() == []
    assert batch[0].dtype == batch[1].dtype == np.int32
    assert tokenizer.encode_batch([]) == []


def test_the_export_of_a_trained_model_reads_back(tokenizer, exported):
    again = load_tokenizer("hf", str(exported))
    text = "def f(x):\n    return '</s> é'\n"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    for name in ("vocab_size", "bos_id", "eos_id", "pad_id", "unk_id"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_saved_folder_gives_the_same_ids(tmp_path):
    tokenizer = HuggingFaceTokenizer.load(gpt2_like(tmp_path / "in"))
    tokenizer.save(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(str(tmp_path / "out"))("x é")["input_ids"] == tokenizer.encode("x é")
    assert HuggingFaceTokenizer.load(tmp_path / "out").encode("x é") == tokenizer.encode("x é")


def test_fingerprint_follows_the_vocabulary(tmp_path, exported):
    first = HuggingFaceTokenizer.load(gpt2_like(tmp_path / "a"))
    assert first.fingerprint == HuggingFaceTokenizer.load(gpt2_like(tmp_path / "b")).fingerprint
    assert first.fingerprint != HuggingFaceTokenizer.load(exported).fingerprint


def test_code_in_the_folder_is_not_run(tmp_path):
    folder = gpt2_like(
        tmp_path / "tok",
        settings={"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}}.items(),
    )
    canary = tmp_path / "canary"
    (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
    try:
        HuggingFaceTokenizer.load(folder)
    except UserError:
        pass  # refusing the folder is as good as ignoring its code
    assert not canary.exists()


def test_unusable_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="no end-of-text token"):
        HuggingFaceTokenizer.load(gpt2_like(tmp_path / "no_eos", eos=None))
    with pytest.raises(UserError, match="not a folder"):
        HuggingFaceTokenizer.load(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="there is no tokenizer in this folder"):
        HuggingFaceTokenizer.load(tmp_path / "empty")


def a_tokenizer(folder, **changes):
    """A valid tokenizer.json but for some of its parts."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<eos>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
BAD_PARTS = [
    {"normalizer": {"type": "Sequence", "normalizers": [GROWS] * 4}},
    {"normalizer": {"type": "Replace", "pattern": {"Regex": "(" * 100}, "content": ""}},
    {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    {"normalizer": {"type": "none"}},
    {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
    {"model": {"type": "Unigram", "vocab": [], "unk_id": 7}},
    {"model": {"type": "WordPiece", "vocab": {}, "unk_token": "[UNK]"}},
    {"model": None},
    {"added_tokens": [{"id": -1}]},
    {"added_tokens": 7},
    {"version": "9"},
    {"post_processor": {"type": "TemplateProcessing", "single": ["$Z"], "pair": [], "special_tokens": {}}},
    {"decoder": []},
]


@pytest.mark.parametrize("parts", BAD_PARTS, ids=str)
def test_a_tokenizer_that_cannot_be_used_is_refused_by_its_folder(tmp_path, parts):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=str(tmp_path)):
        HuggingFaceTokenizer.load(a_tokenizer(tmp_path, **parts)).encode("a")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000


def test_a_good_tokenizer_passes(tmp_path):
    assert HuggingFaceTokenizer.load(a_tokenizer(tmp_path)).encode("a") == [1]


class Panic(BaseException):
    """As pyo3's PanicException."""


@pytest.mark.parametrize("error", [Exception("plain"), Panic("a panic"), MemoryError(), RecursionError(), KeyError(3)])
def test_whatever_the_library_raises_names_the_folder(tmp_path, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    with pytest.raises(UserError, match=str(tmp_path)):
        HuggingFaceTokenizer.load(gpt2_like(tmp_path))


def test_an_interrupt_stays_one(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        HuggingFaceTokenizer.load(gpt2_like(tmp_path))
