import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cook.data.packing as packing
from cook.base.errors import UserError

# A slow and obvious writing of the row rules, from their description: the oracle.


def reference_samples(documents: list[list[int]], row_size: int, start: list[int]) -> list[list[int]]:
    """Samples `<s> piece </s>` in order, with `start` for `<s>` and eos 3."""
    room = row_size - len(start) - 1
    samples = []
    for document in documents:
        rest, is_first = document, True
        while rest:
            piece, rest = rest[:room], rest[room:]
            shortest = room if len(piece) == room else 1 if is_first else 32
            if len(piece) >= shortest:
                samples.append([*start, *piece, 3])
            is_first = False
    return samples


def reference_rows(samples: list[list[int]], row_size: int, open_rows: int) -> list[list[list[int]]]:
    """Rows as lists of samples: each sample goes into the first of the last `open_rows` shared rows with room."""
    rows: list[list[list[int]]] = []
    shared: list[list[list[int]]] = []
    for sample in samples:
        if len(sample) == row_size:
            rows.append([sample])
            continue
        for row in shared[-open_rows:]:
            if sum(map(len, row)) + len(sample) <= row_size:
                row.append(sample)
                break
        else:
            shared.append([sample])
            rows.append(shared[-1])
    return rows


def reference_batch_row(row: list[list[int]], prompt_length: int, max_length: int) -> dict[str, list]:
    """One row of the batch, position by position."""
    fields = {name: [] for name in ("input", "context", "position", "segment", "span", "targets")}

    def put(**values):
        for name, value in values.items():
            fields[name].append(value)

    for i in range(prompt_length):
        put(input=2 * prompt_length + i, context=True, position=i, segment=0, span=0, targets=-100)
    for number, sample in enumerate(row):
        for i, token in enumerate(sample):
            target = sample[i + 1] if i + 1 < len(sample) else -100
            put(input=token, context=False, position=prompt_length + i, segment=2, span=number, targets=target)
    length = len(fields["input"])
    while len(fields["input"]) < max_length:
        put(input=0, context=False, position=0, segment=0, span=-1, targets=-100)
    return {**fields, "length": length}


shapes = st.tuples(st.integers(0, 5), st.integers(10, 60))


def numbered(lengths):
    """Documents in which every token is unique, so that nothing can be confused or lost unseen."""
    ids = iter(range(10, 60_000))
    return [[next(ids) for _ in range(length)] for length in lengths]


document_lists = st.lists(st.integers(0, 150), max_size=25).map(numbered)


@settings(max_examples=200, deadline=None)
@given(document_lists, shapes, st.sampled_from([1, 2, 1024]), st.sampled_from([2, None]))
def test_rows_and_batches_equal_the_slow_reference(make_rows, documents, shape, open_rows, start):
    prompt_length, row_size = shape
    samples = reference_samples(documents, row_size, [] if start is None else [start])
    wanted = reference_rows(samples, row_size, open_rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", open_rows)
        patch.setattr(packing, "_PIECES_AT_ONCE", 3)
        rows, statistics = make_rows(
            documents, max_length=prompt_length + row_size, prompt_length=prompt_length, start_id=start
        )
    assert statistics["rows"] == len(wanted)
    if not wanted:
        return
    assert len(rows) == len(wanted) and rows.max_length == prompt_length + row_size
    batch = rows.batch(np.arange(len(rows)))
    expected = [reference_batch_row(row, prompt_length, prompt_length + row_size) for row in wanted]
    for name, value in batch.items():
        assert value.tolist() == [row[name] for row in expected], name
    assert rows.num_targets(np.arange(len(rows))).tolist() == (batch["targets"] != -100).sum(1).tolist()
    assert rows.lengths.tolist() == batch["length"].tolist()


@settings(max_examples=100, deadline=None)
@given(document_lists, shapes)
def test_nothing_is_lost_but_what_the_rules_drop(make_rows, documents, shape):
    prompt_length, row_size = shape
    rows, statistics = make_rows(documents, max_length=prompt_length + row_size, prompt_length=prompt_length)
    kept = set() if rows is None else set(rows.tokens_RT[rows.tokens_RT >= 10].tolist())
    left_out = {reason.partition(" ")[0]: told["count"] for reason, told in statistics["left_out"].items()}
    assert left_out.get("tokens", 0) == sum(map(len, documents)) - len(kept)
    assert left_out.get("empty", 0) == sum(not document for document in documents)
    for document in documents:
        lost = [token for token in document if token not in kept]
        # What is lost is the end of a document that has more, and short.
        assert lost == document[len(document) - len(lost) :]
        assert len(lost) < 32 and (len(lost) < len(document) or not document)
    if rows is not None:
        assert (rows.tokens_RT >= 10).sum() == len(kept)  # and nothing is there twice
        assert statistics["targets"] == rows.targets_R.sum()


@settings(max_examples=60, deadline=None)
@given(document_lists, shapes)
def test_invariants_of_a_batch_under_the_attention_formula(make_rows, documents, shape):
    prompt_length, row_size = shape
    rows, _ = make_rows(documents, max_length=prompt_length + row_size, prompt_length=prompt_length)
    if rows is None:
        return
    b = rows.batch(np.arange(len(rows)))
    assert b["context"].dtype == torch.bool
    assert {b[name].dtype for name in b if name != "context"} == {torch.int64}
    has_target = b["targets"] != -100
    assert not (has_target & b["context"]).any()
    # A target is the next token, which is text of the same sample.
    assert (b["targets"][:, :-1] == b["input"][:, 1:])[has_target[:, :-1]].all() and not has_target[:, -1].any()
    assert (b["span"][:, :-1] == b["span"][:, 1:])[has_target[:, :-1]].all()

    # Which keys a query sees, by the model's formula.
    index = torch.arange(b["input"].shape[1])
    context, span, inside = b["context"], b["span"], index < b["length"][:, None]
    sees = context[:, None, :] | (~context[:, :, None] & (index[None, :] <= index[:, None]))
    sees = sees & (span[:, :, None] == span[:, None, :]) & inside[:, :, None] & inside[:, None, :]
    sample_begin = (b["input"] == 2) & ~context & inside
    sample = torch.where(~context & inside, sample_begin.cumsum(1) - 1, torch.where(context, 0, -1))
    # The prompt sees itself; text sees the past of its own sample, to which the prompt belongs for the first sample.
    same = (sample[:, :, None] == sample[:, None, :]) & inside[:, :, None] & inside[:, None, :]
    wanted = torch.where(context[:, :, None], context[:, None, :], same & (index[None, :] <= index[:, None]))
    assert torch.equal(sees, wanted)


def test_borders_of_what_is_dropped():
    def sizes(*lengths, room=100):
        return packing.cut(np.cumsum([0, *lengths]), room).size_N.tolist()

    assert sizes(131) == [100] and sizes(132) == [100, 32]  # the end of a longer document
    assert sizes(1) == [1] and sizes(7, 0, 8) == [7, 8]  # a whole document
    assert sizes(100, 0, 31, 200) == [100, 31, 100, 100]


def test_a_window_of_open_rows_bounds_the_search():
    sizes = np.array([6] * 5 + [4])
    assert packing.first_fit(sizes, 10).row_N.tolist() == [0, 1, 2, 3, 4, 0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "OPEN_ROWS", 2)
        assert packing.first_fit(sizes, 10).row_N.tolist() == [0, 1, 2, 3, 4, 3]


def test_long_documents_leave_few_samples_without_the_prompt(make_rows):
    lengths = np.random.default_rng(0).integers(500, 5000, 200).tolist()
    rows, statistics = make_rows([[9] * length for length in lengths], max_length=256, prompt_length=32)
    assert statistics["filled"] > 0.98 and statistics["share_without_prompt"] < 0.05
    first = (rows.spans_RT == 0).sum() - len(rows)
    assert statistics["share_without_prompt"] == pytest.approx(1 - first / rows.targets_R.sum())


def test_a_row_without_room_is_refused():
    assert packing.text_capacity(42, 32) == 8
    with pytest.raises(UserError, match="at least 42"):
        packing.text_capacity(41, 32)


def test_a_missing_or_cut_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="missing or damaged"):
        packing.open_rows(tmp_path, "train", 32)


def test_the_space_of_an_array_is_taken_before_it_is_written(tmp_path):
    array = packing.new_array(tmp_path / "x.npy", np.int32, (1000, 1000))
    assert (tmp_path / "x.npy").stat().st_blocks * 512 >= array.nbytes  # a file with holes has less
    array[:] = 7
    array.flush()
    assert (np.load(tmp_path / "x.npy") == 7).all()


FULL = """
import subprocess, sys
from pathlib import Path
import numpy as np
from cook.data.packing import pack_to_folder
place = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], check=True)
tokens = np.arange(200_000, dtype=np.uint16)
def pack():
    borders = np.array([0, len(tokens)])
    return pack_to_folder(tokens, borders, row_size=64, start_id=2, eos_id=3, folder=place, part="train")
try:
    pack()
except OSError as error:
    print(error.strerror)
subprocess.run(["mount", "-o", "remount,size=9m", place], check=True)
print(pack()["samples"])
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.slow
def test_a_full_disk_is_an_error_and_kills_nothing(tmp_path):
    done = subprocess.run(
        ["unshare", "--mount", sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and done.stdout == "No space left on device\n3226\n", done
