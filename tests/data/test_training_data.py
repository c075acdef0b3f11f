import hashlib
import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import cook.data.training_data as load_module
from cook.base.errors import UserError
from cook.config.corpus import DataConfig, SourceConfig
from cook.data.loader import RowLoader
from cook.data.training_data import changed_files, load_rows, read_files


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
    return DataConfig(type="jsonl", paths=(str(path),), text_field="body", held_out=0.2, max_length=64)


def test_a_run_from_a_corpus_to_batches(data, tmp_path):
    tokenizer, train, held_out, _ = load_rows(data, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "out")
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


@pytest.mark.slow
def test_another_process_makes_the_same_files(data, tmp_path):
    load_rows(data, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "a")
    script = f"""
import sys; sys.path[:0] = {sys.path!r}
from types import SimpleNamespace as S
from cook.data.training_data import load_rows
from cook.config.corpus import DataConfig as D
load_rows(D(type="jsonl", paths={data.paths!r}, text_field="body", held_out=0.2, max_length=64),
          S(type="sentencepiece", path=None, vocab_size=500), prompt_length=4,
          output_dir={str(tmp_path / "b")!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONHASHSEED": "77"})
    files = {
        name: {
            str(p.relative_to(tmp_path / name)): p.read_bytes()
            for p in (tmp_path / name / "data").rglob("*.*")
            if p.is_file()
        }
        for name in "ab"
    }
    assert files["a"].keys() == files["b"].keys() and files["a"] == files["b"]


def test_the_default_corpus_gives_the_rows_that_it_always_gave(tmp_path, monkeypatch):
    library = tmp_path / "lib"
    library.mkdir()
    for n in range(40):
        words = [hashlib.sha256(b"%d %d" % (n % 7, i % 50)).hexdigest()[:6] + " = x" for i in range(30 + n * 5)]
        (library / f"m{n:02d}.py").write_text("\n    ".join(words) + "\n")
    monkeypatch.setattr("cook.data.corpus.sysconfig.get_paths", lambda: {"stdlib": str(library)})
    data = DataConfig(type="python_stdlib", max_length=72)
    section = TokenizerSection(vocab_size=400)
    _, train, held_out, _ = load_rows(data, section, prompt_length=8, output_dir=tmp_path / "out")
    loader = RowLoader(train, train_batch_size=4, seed=0, first=3)
    digest = hashlib.sha256()
    for step in range(40):
        for batch in loader.micro_batches(step, 0, 1, 2):
            for key in sorted(batch):
                digest.update(key.encode() + batch[key].numpy().tobytes())
    digest.update(held_out.tokens_RT.tobytes())
    # Computed when there was one source and no state; the figures of the default run were made with this order.
    assert digest.hexdigest() == "c2e733d06b80cb2d709b7caa29d4f44c8a74a223113556ea9dbdc68a1c05ed07"


def many_sources(tmp_path, **options):
    """Three sources: JSON lines, parquet and an arrow folder, of 40 documents each."""
    texts = {
        name: [f"{name} document {n} says " + f"{name} {n * k} " * 9 for n, k in enumerate(range(40))]
        for name in ("json", "parquet", "arrow")
    }
    (tmp_path / "j.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts["json"]))
    datasets.Dataset.from_dict({"body": texts["parquet"]}).to_parquet(tmp_path / "p.parquet")
    datasets.Dataset.from_dict({"text": texts["arrow"]}).save_to_disk(tmp_path / "arrow")
    places = {
        "json": ("jsonl", "j.jsonl", "text"),
        "parquet": ("parquet", "*.parquet", "body"),
        "arrow": ("arrow", "arrow", "text"),
    }
    given = tuple(
        SourceConfig(type=kind, paths=(str(tmp_path / where),), text_field=field, name=name, **options)
        for name, (kind, where, field) in places.items()
    )
    return DataConfig(sources=given, max_length=32, held_out=0.2), texts


@pytest.mark.parametrize("weight", [None, 1.0])
def test_sources_of_all_kinds_become_one_set_of_rows(tmp_path, weight):
    data, texts = many_sources(tmp_path, weight=weight)
    small = TokenizerSection(vocab_size=340)
    tokenizer, train, held_out, _ = load_rows(data, small, prompt_length=4, output_dir=tmp_path / "out")
    assert train.names == held_out.names == ("json", "parquet", "arrow")
    assert train.weights == (None if weight is None else (1.0, 1.0, 1.0))
    for name, part, other in zip(train.names, train.parts, held_out.parts, strict=True):
        written = [tokenizer.decode([t for t in row if t > 3]) for row in (*part.tokens_RT, *other.tokens_RT)]
        assert sum(text.startswith(f"{name} document") for text in written) == len(texts[name])
        assert 0 < len(other) < len(part)
    batch = RowLoader(train, train_batch_size=9, seed=0).micro_batches(0, 0, 1, 9)[0]
    assert batch["input"].shape == (9, 32)
    again = load_rows(data, small, prompt_length=4, output_dir=tmp_path / "out", build=False)
    assert again.train.fingerprint == train.fingerprint


def test_a_single_source_in_a_list_is_the_short_form(data, tmp_path):
    short = load_rows(data, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "out")
    source = SourceConfig(type="jsonl", paths=data.paths, text_field="body")
    listed = replace(data, type=None, paths=(), text_field="text", sources=(source,))
    other = load_rows(listed, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "out")
    assert other.train.fingerprint == short.train.fingerprint


def test_what_has_changed_since_is_named(data, tmp_path):
    out = tmp_path / "out"
    load_rows(data, TokenizerSection(), prompt_length=4, output_dir=out)
    before = read_files(out)
    assert changed_files(before, read_files(out)) == []
    with open(data.paths[0], "a") as file:
        file.write(json.dumps({"body": "one more"}) + "\n")
    load_rows(data, TokenizerSection(), prompt_length=4, output_dir=out)
    [change] = changed_files(before, read_files(out))
    assert change.startswith("corpus.jsonl: ") and "bytes" in change
    assert changed_files({"a": [1, "x"]}, {"b": [1, "x"]}) == ["a: missing", "b: new"]


def test_what_the_rows_hold_and_what_was_left_out_is_told_on_every_start(data, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    texts = ["ok yes"] * 30 + [""]
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    (folder / "long.jsonl").write_text(json.dumps({"body": Path(shutil.__file__).read_text()}))
    (folder / "b.csv").write_text("x")
    given = replace(data, paths=(str(folder),), held_out_paths=data.paths)
    for build in (True, True, False):  # made, found, read by another rank
        loaded = load_rows(given, TokenizerSection(), prompt_length=4, output_dir=tmp_path / "out", build=build)
        told = "\n".join(loaded.notes)
        assert "data: left out: files with another ending than .jsonl, .json, .ndjson: 1 (b.csv)" in told
        assert "data, train: left out: empty documents: 1" in told
        assert "data, train: 32 documents, " in told and "30 documents are shorter than a row and share rows" in told
    text = loaded.train.tokens_RT[loaded.train.spans_RT >= 0]
    assert (text == loaded.tokenizer.bos_id).sum() >= 31  # no short document is lost


@pytest.mark.parametrize("begins", [True, False])
def test_samples_are_texts_as_the_folder_s_tokenizer_makes_them(data, tmp_path, begins):
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<s>", "</s>"]
    rust = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens(["<s>", "</s>"])
    if begins:
        rust.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    backend = PreTrainedTokenizerFast(tokenizer_object=rust, bos_token="<s>", eos_token="</s>")
    backend.save_pretrained(tmp_path / "folder")
    section = TokenizerSection(type="hf", path=str(tmp_path / "folder"))
    loaded = load_rows(data, section, prompt_length=0, output_dir=tmp_path / "out")
    rows = zip(loaded.train.tokens_RT, loaded.train.spans_RT, strict=True)
    samples = [row[spans == number].tolist() for row, spans in rows for number in range(spans.max() + 1)]
    stock = AutoTokenizer.from_pretrained(tmp_path / "folder")
    texts = [stock.decode(sample[:-1], skip_special_tokens=True) for sample in samples]
    assert len(samples) > 10 and [*map(len, samples)].count(loaded.train.tokens_RT.shape[1]) > 3
    assert [[*ids, 257] for ids in stock(texts)["input_ids"]] == samples
