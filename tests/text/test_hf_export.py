import json
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from cook.base.errors import UserError
from cook.text.hf_export import PROBES
from cook.text.sentencepiece import SentencePieceTokenizer

TEXTS = (
    *PROBES,
    "line\nline\r\n\n\n\nline",
    "tab\tand\t\t\t\t\t\t\ttabs",
    "one two  three   four    five" + " " * 33 + "x" + " " * 7,
    "naïve façade 中文分词 한국어 עברית",
    "😀 👩‍👩‍👧 🇫🇷 x̄",
    "a <s> b </s> c <pad> <unk> <0x41>",
    "\u2581 literal \u2581\u2581\u2581",
    "\x00\x01\x7f",
)


@pytest.fixture(scope="module")
def auto(exported):
    return AutoTokenizer.from_pretrained(str(exported))


def ids_of(auto, text):
    """The ids after `<s>`, with which texts begin as samples did in training."""
    start, *ids = auto(text)["input_ids"]
    assert start == auto.bos_token_id and ids == auto(text, add_special_tokens=False)["input_ids"]
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_auto_tokenizer_gives_the_same_ids(tokenizer, auto, text):
    assert ids_of(auto, text) == tokenizer.encode(text)
    assert auto.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=60),
        # Repetitions are where the order of equal merges could show.
        st.lists(st.tuples(st.sampled_from("-=#_.\"'* \n\t>)a"), st.integers(1, 13))).map(
            lambda runs: "".join(char * count for char, count in runs)
        ),
    )
)
def test_auto_tokenizer_gives_the_same_ids_for_any_text(tokenizer, auto, text):
    assert ids_of(auto, text) == tokenizer.encode(text)


def test_whole_documents(tokenizer, auto, texts):
    assert auto(texts, verbose=False)["input_ids"] == [[2, *ids] for ids in tokenizer.encode_batch(texts)]


def test_special_tokens_are_named_and_dropped_on_request(tokenizer, auto):
    assert (auto.pad_token_id, auto.unk_token_id, auto.bos_token_id, auto.eos_token_id) == (0, 1, 2, 3)
    assert len(auto) == tokenizer.vocab_size
    ids = [2, *tokenizer.encode(" a\n"), 3]
    assert auto.decode(ids, skip_special_tokens=True) == " a\n"
    assert auto.decode(ids) == "<s> a\n</s>"
    assert set(auto("x")) == {"input_ids", "attention_mask"}


@pytest.mark.slow
def test_without_cook_and_beside_a_model_of_an_unknown_type(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "some_new_model", "vocab_size": 800}))
    text = "def f(x):\n\treturn  'é😀'\n"
    script = (
        "import sys, json; sys.modules['cook'] = sys.modules['sentencepiece'] = None\n"
        "from transformers import AutoTokenizer\n"
        f"print(json.dumps(AutoTokenizer.from_pretrained({str(tmp_path)!r}).encode({text!r})))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [2, *tokenizer.encode(text)]


def test_the_model_lies_beside_its_export(tokenizer, exported):
    assert SentencePieceTokenizer.load(exported / "sentencepiece.model").fingerprint == tokenizer.fingerprint


def train(texts, folder, **options):
    lines = [line for text in texts for line in text.split("\n") if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "m"), vocab_size=800, minloglevel=2, **options
    )
    return SentencePieceTokenizer.load(folder / "m.model")


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "byte_fallback": True},
        {"model_type": "unigram", "normalization_rule_name": "nfkc", "add_dummy_prefix": False},
        {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"},
        {"model_type": "bpe", "normalization_rule_name": "identity", "remove_extra_whitespaces": False},
    ],
)
def test_models_trained_elsewhere(options, texts, tmp_path):
    foreign = train(texts, tmp_path, **options)
    foreign.save(tmp_path / "out")
    auto = AutoTokenizer.from_pretrained(str(tmp_path / "out"))
    for text in (*PROBES, *texts[0].split("\n")[:400]):
        ours, theirs = foreign.encode(text), ids_of(auto, text)
        if options["model_type"] == "unigram" and ours != theirs:  # a tie between equally likely segmentations
            assert sorted(ours) == sorted(theirs) and foreign.decode(ours) == foreign.decode(theirs)
        else:
            assert ours == theirs


def test_what_cannot_be_expressed_is_refused_and_nothing_is_written(texts, tmp_path):
    suffixed = train(texts, tmp_path, model_type="bpe", treat_whitespace_as_suffix=True)
    with pytest.raises(UserError, match="cannot be exported"):
        suffixed.save(tmp_path / "out")
    chars = train(texts[-1:], tmp_path, model_type="char", hard_vocab_limit=False)
    with pytest.raises(UserError, match="bpe or unigram"):
        chars.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
