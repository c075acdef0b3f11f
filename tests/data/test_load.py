import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

import cook.data.load as load_module
from cook.base.errors import UserError
from cook.data.load import load_rows


@dataclass(frozen=True)
class Data:
    paths: tuple
    type: str = "jsonl"
    text_field: str = "body"
    held_out: float = 0.2
    held_out_paths: tuple = ()
    max_length: int = 64
    cache_dir: str | None = None


@dataclass(frozen=True)
class TokenizerSection:
    type: str = "sentencepiece"
    path: str | None = None
    vocab_size: int = 500


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "corpus.jsonl"
    members = [inspect.getsource(member) for _, member in inspect.getmembers(shutil, inspect.isfunction)]
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in members))
    return Data((str(path),))


def test_a_run_from_a_corpus_to_batches(data, tmp_path):
    tokenizer, train, held_out = load_rows(data, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "out")
    assert tokenizer.vocab_size == 500 and len(train) > len(held_out) > 0
    assert train.max_length == held_out.max_length == 64 and train.prompt_length == 4
    batch = train.batch(np.arange(len(train)))
    assert int(batch["input"].max()) < 500 and (batch["input"][:, :4] == np.arange(8, 12)).all()
    # The text of a document's first pieces is the document's beginning.
    texts = [json.loads(line)["body"] for line in Path(data.paths[0]).read_text().splitlines()]
    ids = batch["input"][batch["span"] == 0].tolist()
    assert any(tokenizer.decode(ids[5:40]).startswith(text[:20]) for text in texts)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["data", "data.json"]


def test_the_other_ranks_only_read(data, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"data\.json"):
        load_rows(data, TokenizerSection(), prompt_length=4, output_dir=out, build=False)
    first = load_rows(data, TokenizerSection(), prompt_length=4, output_dir=out)
    monkeypatch.setattr(load_module, "open_split", None)
    os.remove(data.paths[0])
    second = load_rows(data, TokenizerSection(), prompt_length=4, output_dir=out, build=False)
    assert second.tokenizer.fingerprint == first.tokenizer.fingerprint
    assert second.train.fingerprint == first.train.fingerprint
    assert (second.train.tokens_RT == first.train.tokens_RT).all()
    for changed, prompt in ((replace(data, max_length=65), 4), (data, 5)):
        with pytest.raises(UserError, match="another configuration"):
            load_rows(changed, TokenizerSection(), prompt_length=prompt, output_dir=out, build=False)


def test_a_second_start_builds_nothing_and_a_changed_corpus_builds_anew(data, tmp_path, monkeypatch):
    cached = replace(data, cache_dir=str(tmp_path / "cache"))
    first = load_rows(cached, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "out")
    monkeypatch.setattr("cook.data.cache._build", None)
    assert load_rows(cached, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "two").train.fingerprint == (
        first.train.fingerprint
    )
    monkeypatch.undo()
    with open(data.paths[0], "a") as file:
        file.write(json.dumps({"body": "one more document, long enough for a row of its own"}) + "\n")
    again = load_rows(cached, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "out")
    assert again.train.fingerprint != first.train.fingerprint


def test_a_cut_file_of_rows_is_noticed_and_rebuilt(data, tmp_path):
    out = tmp_path / "out"
    first = load_rows(data, TokenizerSection(), prompt_length=4, output_dir=out)
    [tokens] = (out / "data").glob("rows-*/train.tokens.npy")
    wanted = np.array(first.train.tokens_RT)
    del first
    tokens.write_bytes(tokens.read_bytes()[:-4])
    with pytest.raises(UserError, match="missing or damaged"):
        load_rows(data, TokenizerSection(), prompt_length=4, output_dir=out, build=False)
    assert (load_rows(data, TokenizerSection(), prompt_length=4, output_dir=out).train.tokens_RT == wanted).all()


def test_a_tokenizer_larger_than_configured_is_refused(data, tmp_path):
    tokenizer, *_ = load_rows(data, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "out")
    tokenizer.save(tmp_path / "saved")
    for section in (
        TokenizerSection(path=str(tmp_path / "saved" / "sentencepiece.model"), vocab_size=499),
        TokenizerSection(type="hf", path=str(tmp_path / "saved"), vocab_size=499),
    ):
        with pytest.raises(UserError, match="more ids than tokenizer.vocab_size"):
            load_rows(data, section, prompt_length=4, output_dir=tmp_path / "other")
        again = load_rows(data, replace(section, vocab_size=512), prompt_length=4, output_dir=tmp_path / "other")
        assert again.tokenizer.encode("def f():") == tokenizer.encode("def f():")


def test_a_malformed_corpus_is_refused_before_anything_is_written(data, tmp_path):
    with open(data.paths[0], "a") as file:
        file.write("{not json}\n")
    with pytest.raises(UserError, match=r"corpus\.jsonl, line \d+: not valid JSON"):
        load_rows(data, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_process_makes_the_same_files(data, tmp_path):
    load_rows(data, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "a")
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
from types import SimpleNamespace as S
from cook.data.load import load_rows
load_rows(S(type="jsonl", paths={data.paths!r}, text_field="body", held_out=0.2, held_out_paths=(), max_length=64,
            cache_dir=None), S(type="sentencepiece", path=None, vocab_size=500), prompt_length=4,
          output_dir={str(tmp_path / "b")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": "77"})
    files = {
        name: {str(p.relative_to(tmp_path / name)): p.read_bytes() for p in (tmp_path / name / "data").rglob("*.*")
               if p.is_file()}
        for name in "ab"
    }  # fmt: skip
    assert files["a"].keys() == files["b"].keys() and files["a"] == files["b"]
