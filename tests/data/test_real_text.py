"""Chinese and English as people write it: tokenizers, and a mixture of both. `real_text.py` names the files."""

from __future__ import annotations

import json
import re
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer, CpmAntTokenizer

from cook.config.corpus import DataConfig, SourceConfig
from cook.data.loader import RowLoader
from cook.data.training_data import load_rows
from cook.text.jieba import SPECIAL, JiebaTokenizer
from cook.text.sentencepiece import SentencePieceTokenizer, train_sentencepiece
from tests.data.real_text import enwik8, peoples_daily

pytestmark = pytest.mark.real_text

CHARS = 2_000_000


@pytest.fixture(scope="module")
def chinese() -> list[str]:
    """Articles of the People's Daily."""
    lines = peoples_daily()
    return ["\n".join(lines[i : i + 10]) for i in range(0, len(lines), 10)]


@pytest.fixture(scope="module")
def english() -> list[str]:
    """Pages of Wikipedia, with their markup."""
    return re.findall(r"<text[^>]*>(.*?)</text>", enwik8(CHARS), re.S)


@pytest.mark.parametrize("language", ["chinese", "english", "both"])
def test_a_trained_tokenizer_gives_back_every_document(request, language, tmp_path):
    names = ["chinese", "english"] if language == "both" else [language]
    texts = [text for name in names for text in request.getfixturevalue(name)]
    train_sentencepiece(texts, tmp_path / "m", vocab_size=8000, seed=0)
    tokenizer = SentencePieceTokenizer.load(tmp_path / "m")
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    assert sum(map(len, texts)) / sum(map(len, encoded)) > (1.2 if language == "chinese" else 1.5)
    tokenizer.save(tmp_path / "exported")
    auto = AutoTokenizer.from_pretrained(str(tmp_path / "exported"))
    assert auto(texts[:200], verbose=False)["input_ids"] == [ids.tolist() for ids in encoded[:200]]


def test_cpm_ants_tokenizer_gives_transformers_ids(chinese, english, tmp_path):
    import rjieba

    counts = Counter(word for text in chinese[:600] for word in rjieba.cut(text, False))
    pieces = [word for word, _ in counts.most_common(9000) if word.strip()]
    characters = sorted({c for text in chinese for c in text if c.strip()} - set(pieces))
    (tmp_path / "vocab.txt").write_text("\n".join((*SPECIAL, *pieces, *characters)) + "\n", encoding="utf-8")
    ours, theirs = JiebaTokenizer.load(tmp_path / "vocab.txt"), CpmAntTokenizer(str(tmp_path / "vocab.txt"))
    for text in (*chinese[::10], *english[:20]):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
    plain = [text for text in chinese[:300] if not {"\r", "\t"} & set(text)]
    assert all(ours.decode(ours.encode(text)) == text for text in plain)


def test_two_languages_in_one_run(chinese, english, tmp_path):
    for name, texts in (("zh", chinese), ("en", english)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    sources = tuple(
        SourceConfig(type="jsonl", paths=(str(tmp_path / f"{name}.jsonl"),), name=name, weight=weight)
        for name, weight in (("zh", 1.0), ("en", 3.0))
    )
    section = SimpleNamespace(type="sentencepiece", path=None, vocab_size=8000)
    data = DataConfig(sources=sources, max_length=256)
    tokenizer, train, _ = load_rows(data, section, prompt_length=8, output_dir=tmp_path / "out")
    loader = RowLoader(train, train_batch_size=16, seed=0)
    steps = len(train) // 16
    read = Counter(name.partition(":")[0] for step in range(steps) for name in loader.sample_ids(step))
    assert read["en"] / read["zh"] == pytest.approx(3, rel=0.01)
    batch = loader.micro_batches(0, 0, 1, 16)[0]
    assert int(batch["input"].max()) < 8000 and np.isfinite(loader.num_targets(0))
    assert tokenizer.unk_id not in batch["input"][:, 8:].tolist()
