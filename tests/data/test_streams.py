"""Streams of documents, and the loader that reads them."""

import json

import numpy as np
import pytest
import torch

import cook.data.streams as streams
from cook.base.errors import UserError
from cook.config.corpus import DataConfig
from cook.data.stream_loader import StreamLoader
from cook.data.streams import StreamedData, num_streams, open_stream

BATCH = 8


class Letters:
    """A tokenizer whose ids are code points shifted past four special ids."""

    bos_id, start_id, eos_id, pad_id, unk_id = 2, 2, 3, 0, 1
    vocab_size, fingerprint = 200, "letters"

    def encode_batch(self, texts):
        return [np.array([4 + ord(char) for char in text], dtype=np.int32) for text in texts]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(streams, "BLOCK_CHARS", 100)


@pytest.fixture
def source(tmp_path):
    """Makes a source of some files of twenty documents of ten characters, all different."""

    def make(name="s", files=4, **options):
        for number in range(files):
            lines = [json.dumps({"text": f"{name}.{number:02d}.{n:03d}...."[:10]}) + "\n" for n in range(20)]
            (tmp_path / f"{name}{number}.jsonl").write_text("".join(lines))
        given = {"type": "jsonl", "paths": (str(tmp_path / f"{name}[0-9]*.jsonl"),), "name": name, "held_out": 0.0}
        return open_stream(DataConfig(**(given | {"max_length": 14, "streaming": True} | options)))

    return make


def data_of(*sources, weights=None):
    return StreamedData(
        sources=sources, weights=weights or (1.0,) * len(sources), tokenizer=Letters(), max_length=14, prompt_length=2
    )


def loader_of(data, **options):
    return StreamLoader(data, **({"train_batch_size": BATCH, "seed": 3} | options))


def texts_of(batches):
    return ["".join(chr(t - 4) for t in row if t > 3) for batch in batches for row in batch["input"][:, 2:].tolist()]


def read(loader, steps, rank=0, world_size=1, micro_batch_size=2):
    return [texts_of(loader.micro_batches(step, rank, world_size, micro_batch_size)) for step in steps]


def test_every_epoch_holds_every_document_once(source):
    data = data_of(source())
    assert num_streams(data.sources[0]) == 4
    epochs = np.array(read(loader_of(data), range(30))).reshape(3, 80)
    assert all(len(set(epoch)) == 80 for epoch in epochs.tolist())
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert sorted(epochs[0]) != epochs[0].tolist()


@pytest.mark.parametrize("files", [4, 3, 1])
def test_ranks_share_out_the_same_global_batches(source, files):
    data = data_of(source(files=files), source("t", files=2), weights=(3.0, 1.0))
    whole = read(loader_of(data), range(20))
    for world_size in (2, 4):
        ranks = [loader_of(data, rank=rank, world_size=world_size) for rank in range(world_size)]
        shares = [read(loader, range(20), rank, world_size) for rank, loader in enumerate(ranks)]
        assert [sum(step, []) for step in zip(*shares, strict=True)] == whole
        if files == 4 and world_size == 4:
            assert all(len(loader._readers) < 6 for loader in ranks)  # a rank reads its own streams alone
    assert sum(text.startswith("t") for step in whole for text in step) == 40


def test_a_run_resumes_at_the_very_next_row_with_any_number_of_ranks(source):
    data = data_of(source(), source("t", files=3), weights=(3.0, 1.0))

    def whole():
        loader = loader_of(data)
        first = read(loader, range(9))
        loader.reweigh([1, 1], 9)
        return first + read(loader, range(9, 40))

    wanted = whole()
    alone = loader_of(data)
    got = read(alone, range(9))
    alone.reweigh([1, 1], 9)
    got += read(alone, range(9, 13))
    state = json.loads(json.dumps(alone.state_dict()))
    assert len(json.dumps(state)) < 2500 and state["row"] == 13 * BATCH

    # One rank becomes two; each saves what it has read, together they save all of it.
    pair = [loader_of(data, rank=rank, world_size=2) for rank in (0, 1)]
    for loader in pair:
        loader.load_state_dict(state)
        assert loader.next_step == 13
    got += [sum(step, []) for step in zip(*[read(pair[r], range(13, 21), r, 2) for r in (0, 1)], strict=True)]
    states = [{key: (reader.state(), reader.left_out) for key, reader in loader._readers.items()} for loader in pair]
    for loader in pair:
        loader._gather = lambda own: states
    assert pair[0].state_dict() == pair[1].state_dict()
    # And one again, in another stage with a smaller batch.
    last = loader_of(data, first=0)
    last.load_state_dict(json.loads(json.dumps(pair[1].state_dict())))
    got += read(last, range(21, 40))
    assert got == wanted and whole() == wanted
    for loader in (alone, last, *pair):
        loader.close()


def test_a_later_stage_reads_on(source):
    data = data_of(source())
    first, second = loader_of(data), loader_of(data, first=5 * BATCH, train_batch_size=4)
    done = read(first, range(5))
    second.load_state_dict(first.state_dict())
    rest = read(second, range(10))
    assert len({text for step in done + rest for text in step}) == 80


def test_held_out_documents_are_never_trained_on(source):
    stream = source(held_out=0.2)
    held_out = {document.text for document, is_held_out in stream.documents() if is_held_out}
    assert 5 < len(held_out) < 30
    epoch = {text for step in read(loader_of(data_of(stream)), range(12)) for text in step}
    assert not held_out & epoch and len(held_out | epoch) == 80
    assert not held_out & set(stream.training_texts())
    with pytest.raises(UserError, match="none of its first 16 million characters is held out"):
        list(source(held_out=1e-9).documents())


def test_a_held_out_corpus_of_its_own(source, tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps({"text": "evaluation"}) + "\n")
    stream = source(held_out=0.2, held_out_paths=(str(tmp_path / "eval.jsonl"),))
    assert [document.text for document, _ in stream.documents()] == ["evaluation"]
    assert len({text for step in read(loader_of(data_of(stream)), range(10)) for text in step}) == 80


def test_targets_names_and_the_ledger(source, tmp_path):
    loader = loader_of(data_of(source()), ledger=tmp_path / "ledger")
    for step in range(3):
        targets = loader.num_targets(step)
        batches = loader.micro_batches(step, 0, 1, 4)
        assert targets == sum(int((batch["targets"] != -100).sum()) for batch in batches) == BATCH * 11
    assert set(batches[0]) == {"input", "length", "context", "position", "segment", "span", "targets"}
    assert loader.sample_ids(2) and loader.sample_ids(1) == []
    lines = [json.loads(line) for line in (tmp_path / "ledger" / "ledger-0.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[2]["samples"] == loader.sample_ids(2)
    assert len({name for line in lines for name in line["samples"]}) == 3 * BATCH
    doubled = loader_of(data_of(source()), gather=lambda own: [own, own])
    assert doubled.num_targets(0) == 2 * targets


def test_a_bad_line_is_named_when_it_is_read(source, tmp_path):
    stream = source(files=1)
    lines = (tmp_path / "s0.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "s0.jsonl").write_text("".join([*lines[:15], "{torn\n", *lines[15:]]))
    loader = loader_of(data_of(stream))
    with pytest.raises(UserError, match=r"s0\.jsonl, line 16: not valid JSON"):
        read(loader, range(3))


def test_a_stream_without_text_is_refused(source):
    with pytest.raises(UserError, match="source empty has no text"):
        loader_of(data_of(source("empty", held_out=0.999999))).micro_batches(0, 0, 1, 1)


def test_a_state_of_other_files_is_refused(source):
    state = loader_of(data_of(source())).state_dict()
    with pytest.raises(UserError, match="another seed"):
        loader_of(data_of(source()), seed=4).load_state_dict(state)
    with pytest.raises(UserError, match="another corpus"):
        loader_of(data_of(source(files=5))).load_state_dict(state)


def test_a_hub_dataset_is_streamed(tmp_path):
    (tmp_path / "hub").mkdir()
    for number in range(2):
        lines = [json.dumps({"body": f"h.{number:02d}.{n:03d}..."}) + "\n" for n in range(20)]
        (tmp_path / "hub" / f"train-{number}.jsonl").write_text("".join(lines))
    section = DataConfig(
        type="hub", name=str(tmp_path / "hub"), text_field="body", held_out=0.0, max_length=14, streaming=True
    )
    data = data_of(open_stream(section))
    wanted = read(loader_of(data), range(12))
    assert len({text for step in wanted[:5] for text in step}) == 40
    first, second = loader_of(data), loader_of(data)
    done = read(first, range(7))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert done + read(second, range(7, 12)) == wanted
    assert torch.is_tensor(second.micro_batches(12, 0, 1, 8)[0]["input"])


def test_what_a_stream_leaves_out_is_counted_once_whatever_is_resumed(tmp_path, capsys):
    for number in range(4):  # a row holds 10 characters: the rest of a longer document is left out
        lines = [json.dumps({"text": text}) + "\n" for text in ["x" * 10, "x" * 13, "", "x" * 10] * 5]
        (tmp_path / f"{number}.jsonl").write_text("".join(lines))
    config = DataConfig(type="jsonl", paths=(str(tmp_path),), name="s", held_out=0.0, max_length=14, streaming=True)
    data = data_of(open_stream(config))
    whole, first, second = loader_of(data), loader_of(data), loader_of(data)
    read(whole, range(7))
    read(first, range(4))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    read(second, range(4, 7))
    assert whole.state_dict() == second.state_dict()
    assert [reader.left_out for reader in whole._readers.values()] == [
        {
            "empty documents": {"count": 5, "named": []},
            "tokens at the ends of long documents, fewer than 32 of each": {"count": 15, "named": []},
        }
    ] * 4
    assert "in this epoch: left out: empty documents: 20\n" in capsys.readouterr().out
    for loader in (whole, first, second):
        loader.close()
