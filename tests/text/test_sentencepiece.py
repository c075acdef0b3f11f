import random

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.text.sentencepiece import (
    MAX_LINE_CHARS,
    SentencePieceTokenizer,
    _sample,
    train_sentencepiece,
)

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
code_like = st.lists(st.sampled_from(["    ", "  ", " ", "\t", "\n", "def", "x", "==", "12", "self.", '"""', "é"])).map(
    "".join
)


@settings(max_examples=300, deadline=None)
@given(st.one_of(any_text, code_like))
@example("\u2581literal\u2581\u2581block\u2581")
@example("<s>a</s><pad><unk><0x41>")
@example(" \x00\x07\r\n\u2585 \ufeff")
@example(" " * 37 + "\n" * 9 + "\t" * 7)
def test_decoding_gives_back_any_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    # No character of a text may come out as a special id.
    assert all(4 <= i < tokenizer.vocab_size for i in ids)


def test_special_ids_and_size(tokenizer):
    assert (tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id) == (0, 1, 2, 3)
    assert tokenizer.vocab_size == 800
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_digits_stay_single_and_indentation_is_short(tokenizer):
    assert len(tokenizer.encode("3141592653")) == 10
    assert len(tokenizer.encode(" " * 16)) == 1
    assert len(tokenizer.encode("\n\n")) == 1


def test_a_batch_is_encoded_like_single_texts(tokenizer, texts):
    batch = [*texts, "", "\u2581 between", "plain"]
    encoded = tokenizer.encode_batch(batch)
    assert [ids.dtype for ids in encoded] == [np.dtype(np.int32)] * len(batch)
    assert [ids.tolist() for ids in encoded] == [tokenizer.encode(text) for text in batch]
    assert tokenizer.encode_batch([]) == []


def test_compresses_its_own_corpus(tokenizer, texts):
    chars = sum(map(len, texts))
    assert chars / sum(len(ids) for ids in tokenizer.encode_batch(texts)) > 2.0


def test_training_is_deterministic(tokenizer, model_path, texts, tmp_path, monkeypatch):
    monkeypatch.setattr("cook.text.sentencepiece.num_cores", lambda: 1)
    assert train_sentencepiece(iter(texts), tmp_path / "again.model", vocab_size=800, seed=0) == 0
    assert (tmp_path / "again.model").read_bytes() == model_path.read_bytes()
    assert SentencePieceTokenizer.load(tmp_path / "again.model").fingerprint == tokenizer.fingerprint


def test_a_sample_depends_on_the_seed_and_changes_the_model(tokenizer, texts, tmp_path):
    for seed, name in ((1, "a"), (1, "b"), (2, "c")):
        unseen = train_sentencepiece(texts, tmp_path / name, vocab_size=800, seed=seed, sample_chars=60_000)
        characters = sum(len(text) - text.count("\n") for text in texts)
        assert characters - 60_000 <= unseen < characters - 20_000
    a, b, c = (SentencePieceTokenizer.load(tmp_path / name).fingerprint for name in "abc")
    assert a == b != c
    assert a != tokenizer.fingerprint


def test_sample_is_bounded_and_spread_over_the_whole_corpus():
    lines = [f"{number:09d}" for number in range(40_000)]
    kept = _sample(lines, 90_000, random.Random(0))
    assert 45_000 <= 9 * len(kept) <= 90_000
    thirds = np.bincount([int(line) // 10_000 for line in kept], minlength=4)
    assert thirds.min() > 0.8 * thirds.mean()  # uniform: about 1250 to 2500 lines of each quarter
    assert _sample(["a", "b"], 90, random.Random(0)) == ["a", "b"]


def test_thousands_of_characters_leave_room_for_words(tmp_path):
    # More characters than ids, as in Chinese: the frequent ones get a piece, the others their bytes, and words fit too.
    rare = "".join(chr(0x4E00 + number) for number in range(3000))
    text = "我们在北京大学学习，我们是中国人。\n" * 9000 + "".join(rare[i : i + 20] + "\n" for i in range(0, 3000, 20))
    train_sentencepiece([text], tmp_path / "m", vocab_size=1000, seed=0)
    chinese = SentencePieceTokenizer.load(tmp_path / "m")
    assert len(chinese.encode("我们在北京大学学习")) < 9 and chinese.decode(chinese.encode(text)) == text
    pieces = [chinese.decode([i]) for i in range(1000)]
    characters = [piece for piece in pieces if len(piece) == 1 and "\u4e00" <= piece <= "\u9fff"]
    assert 300 < len(characters) < 450  # half of what bytes and special pieces leave


def test_a_space_has_a_piece_where_the_corpus_has_none(tmp_path):
    characters = [chr(0x4E00 + number) for number in range(200)]
    words = ["".join(characters[n * k % 200] for k in (1, 3, 7)) for n in range(200)]
    train_sentencepiece(["\n".join(words * 5)], tmp_path / "m", vocab_size=480, seed=0)
    chinese = SentencePieceTokenizer.load(tmp_path / "m")
    assert len(chinese.encode(" ")) == 1 and chinese.decode(chinese.encode("a b")) == "a b"
    chinese.save(tmp_path / "exported")  # refuses where the exported tokenizer would differ


def test_a_long_line_is_cut_not_dropped(tmp_path):
    train_sentencepiece(
        ["wonderful words " * 4000 + "abcdefgh " * MAX_LINE_CHARS], tmp_path / "m", vocab_size=340, seed=0
    )
    assert len(SentencePieceTokenizer.load(tmp_path / "m").encode("wonderful")) == 1


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        (["some text"], 100, "too small"),
        (["some text"], 5000, "lower tokenizer.vocab_size"),
        (["".join(map(chr, range(0x4E00, 0x5800)))], 400, "raise tokenizer.vocab_size"),
        ([], 800, "no text"),
        (["\n\n", ""], 800, "no text"),
    ],
)
def test_impossible_trainings_are_refused_and_write_nothing(texts, vocab_size, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train_sentencepiece(texts, tmp_path / "m", vocab_size=vocab_size, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_files_that_are_no_model_are_refused(tmp_path, model_path):
    (tmp_path / "text.model").write_text("not a model at all")
    (tmp_path / "half.model").write_bytes(model_path.read_bytes()[:5000])
    (tmp_path / "empty.model").write_bytes(b"")
    for name in ("text.model", "half.model", "empty.model", "missing.model"):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            SentencePieceTokenizer.load(tmp_path / name)


def test_a_model_without_an_end_piece_is_refused(texts, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts[0].split("\n")),
        model_prefix=str(tmp_path / "m"),
        vocab_size=300,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="end-of-text"):
        SentencePieceTokenizer.load(tmp_path / "m.model")
