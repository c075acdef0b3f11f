import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cook.base.errors import RunFailed, UserError
from cook.data.loader import RowLoader, held_out_batches
from tests.data.number_rows import BATCH, STEPS, loader_of, numbers, read, rows_of, sources


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 3))
def test_every_epoch_reads_every_row_once(count, batch_size, seed):
    loader = RowLoader(rows_of(count), train_batch_size=batch_size, seed=seed)
    steps = -(-3 * count // batch_size)
    stream = np.concatenate([loader.indices(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))


@given(st.integers(1, 40), st.integers(1, 50), st.lists(st.integers(0, 60), min_size=1, max_size=20))
def test_a_step_is_the_same_whatever_was_read_before(count, batch_size, steps):
    history = RowLoader(rows_of(count), train_batch_size=batch_size, seed=5)
    for step in steps:
        fresh = RowLoader(rows_of(count), train_batch_size=batch_size, seed=5)
        assert history.indices(step).tolist() == fresh.indices(step).tolist()
        assert history.num_targets(step) == history.indices(step).sum()


def test_order_depends_on_seed_and_epoch_and_is_pinned():
    first = RowLoader(rows_of(100), train_batch_size=100, seed=1)
    assert first.indices(0).tolist() != first.indices(1).tolist()
    assert first.indices(0).tolist() != RowLoader(rows_of(100), train_batch_size=100, seed=2).indices(0).tolist()
    # Order by the raw Philox stream of numpy's SeedSequence([1, 0]); a change of it would break resumed runs.
    assert RowLoader(rows_of(8), train_batch_size=8, seed=1).indices(0).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]


def test_far_steps_cost_no_replay():
    loader = RowLoader(rows_of(1000), train_batch_size=64, seed=0)
    assert len(loader.indices(10**9)) == 64
    assert len(loader._orders[0]._kept) <= 2


@settings(deadline=None)
@given(st.sampled_from([(1, 1), (1, 4), (2, 2), (2, 4), (4, 1), (4, 2), (8, 1)]), st.integers(0, 30))
def test_any_number_of_ranks_reads_the_same_global_batch(split, step):
    world_size, micro_batch_size = split
    loader = RowLoader(rows_of(21), train_batch_size=8, seed=3)
    shares = [loader.micro_batches(step, rank, world_size, micro_batch_size) for rank in range(world_size)]
    assert {len(share) for share in shares} == {8 // (world_size * micro_batch_size)}
    assert all(len(batch["input"]) == micro_batch_size for share in shares for batch in share)
    assert [n for share in shares for n in numbers(share)] == loader.indices(step).tolist()


def test_a_batch_that_does_not_divide_is_refused():
    loader = RowLoader(rows_of(21), train_batch_size=8, seed=3)
    with pytest.raises(UserError, match="3 ranks x 1 rows"):
        loader.micro_batches(0, 0, 3, 1)


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="too small"):
        RowLoader(rows_of(0), train_batch_size=8, seed=3)


@given(st.integers(1, 30), st.integers(1, 7), st.integers(1, 40), st.integers(1, 5))
def test_held_out_rows_are_shared_out_once_in_equal_batches(count, batch_size, max_rows, world_size):
    rows = rows_of(count)
    ranks = [list(held_out_batches(rows, batch_size, max_rows, rank, world_size)) for rank in range(world_size)]
    assert len({tuple(len(batch["input"]) for batch in batches) for batches in ranks}) == 1
    assert max(len(batch["input"]) for batch in ranks[0]) <= batch_size
    counted = [
        n
        for batches in ranks
        for batch in batches
        for n, targets in zip(numbers([batch]), batch["targets"], strict=True)
        if (targets != -100).any()
    ]
    chosen = sorted(counted)
    assert len(chosen) == len(set(chosen)) == min(max_rows, count)
    assert chosen[0] == 0 and np.ptp(np.diff([*chosen, count])) <= 1  # evenly spread
    alone = list(held_out_batches(rows, batch_size, max_rows))
    assert sorted(numbers(alone)) == chosen and all((b["targets"] != -100).any(1).all() for b in alone)


def test_filling_rows_do_not_spoil_the_rows_themselves():
    rows = rows_of(3)
    [batch] = held_out_batches(rows, 4, 3, rank=1, world_size=2)
    assert batch["targets"].tolist() == [[-100, 11, 3, -100], [-100, -100, -100, -100]]
    assert torch.equal(rows.batch(np.array([2]))["targets"], torch.tensor([[-100, 12, 3, -100]]))


class Faulty:
    """Rows of which one cannot be read."""

    fingerprint, max_length, is_redrawn = "f", 4, False

    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 16

    def num_targets(self, indices, epoch=0):
        return np.ones(len(indices), np.int64)

    def batch(self, indices, epoch=0):
        if 3 in indices:
            raise self.error
        return {"input": torch.from_numpy(np.asarray(indices))}


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_a_worker_arrives_with_its_text(workers):
    error = UserError("row 3 is torn", remedy="mend it")
    loader = RowLoader(Faulty(error), train_batch_size=16, seed=0, workers=workers)
    with pytest.raises(UserError) as caught:
        loader.micro_batches(0, 0, 1, 4)
    loader.close()
    assert str(caught.value) == "row 3 is torn\n  remedy: mend it"


def test_a_bug_in_a_worker_and_a_killed_one_end_the_run_by_name():
    loader = RowLoader(Faulty(RuntimeError("a bug")), train_batch_size=16, seed=0, workers=1)
    with pytest.raises(RunFailed, match="at step 1(?s:.*)a bug"):
        loader.micro_batches(0, 0, 1, 4)
    loader.close()
    wait_for(lambda: not children(os.getpid()))
    loader = loader_of(workers=1)
    read(loader, [0])
    [child] = children(os.getpid())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # sent to a whole group, meant for the run
        os.kill(child, number)
    assert read(loader, [1]) == read(loader_of(), [1])
    os.kill(child, signal.SIGKILL)
    with pytest.raises(RunFailed, match="a worker process of the data loader failed at step"):
        read(loader, range(2, 9))
    loader.close()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")  # more than this machine has cores
def test_any_number_of_workers_gives_the_same_batches_and_none_stays():
    loaders = {workers: loader_of(sources(), workers=workers) for workers in (0, 1, 3)}
    steps = [0, 1, 2, 3, 9, 10, 4, 5]  # with jumps ahead and back
    batches = {w: [loader.micro_batches(step, 0, 1, 2) for step in steps] for w, loader in loaders.items()}
    for loader in loaders.values():
        loader.reweigh([1, 5], 6)  # what was built ahead belongs to the old weights
    for w, loader in loaders.items():
        batches[w] += [loader.micro_batches(step, 1, 2, 2) for step in (6, 7, 8)]
    for other in (1, 3):
        for ours, theirs in zip(batches[0], batches[other], strict=True):
            assert len(ours) == len(theirs)
            assert all(torch.equal(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in a)
    assert len(children(os.getpid())) >= 4
    for loader in loaders.values():
        loader.close()
    wait_for(lambda: not children(os.getpid()))


def children(parent):
    """Process ids of the workers of `parent`: the children of its fork server."""
    parents, servers = {}, set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                servers |= {int(entry.name)} if b"forkserver" in (entry / "cmdline").read_bytes() else set()
        except (OSError, ValueError):
            continue
    return [pid for pid, of in parents.items() if of in servers and parents.get(of) == parent]


def wait_for(condition, seconds=30):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


# Two sources with weights 3 to 1, weighed anew at step 9: what an uninterrupted run reads.
def uninterrupted():
    loader = loader_of(sources())
    return read(loader, range(9)) + (loader.reweigh([1, 1], 9) or read(loader, range(9, STEPS)))


def test_a_killed_process_is_followed_to_the_sample(tmp_path):
    script = Path(__file__).with_name("number_rows.py")
    process = subprocess.Popen([sys.executable, script, tmp_path, "1"], stdout=subprocess.PIPE)
    while json.loads(process.stdout.readline()) < 13:  # in the middle of an epoch of each source
        pass
    helpers = children(process.pid)
    assert len(helpers) == 1
    process.kill()
    process.wait()
    process.stdout.close()
    state = json.loads((tmp_path / "state.json").read_text())
    assert len(json.dumps(state)) < 300, "a few numbers"

    whole = uninterrupted()
    lines = [json.loads(line) for line in (tmp_path / "ledger-0.jsonl").read_text().splitlines()]
    resumed = loader_of(sources())
    resumed.load_state_dict(state)
    done = resumed.next_step
    assert 14 <= done <= len(lines) <= done + 1 < STEPS
    # Ranks change from one to two, four and one again: the same rows follow.
    after = [step for n, step in enumerate(range(done, STEPS))]
    rest = [read(resumed, [step], world_size=(2, 4, 1)[step % 3])[0] for step in after]
    assert rest == whole[done:]
    names = [f"large:{n}" if n < 100 else f"small:{n - 100}" for batch in whole for n in batch]
    assert [name for line in lines for name in line["samples"]] == names[: len(lines) * BATCH]
    # No orphan.
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in helpers))


def test_ranks_one_two_four_read_the_same_and_their_union_is_the_corpus():
    whole = read(loader_of(), range(41))  # eight epochs of 41 rows
    for world_size in (2, 4):
        assert read(loader_of(), range(41), world_size) == whole
    stream = np.array(whole).reshape(8, 41)
    assert all(sorted(epoch) == list(range(41)) for epoch in stream.tolist())


def test_weighted_sources_are_each_read_whole_every_epoch_of_their_own():
    loader = loader_of(sources())
    stream = [n for batch in read(loader, range(100)) for n in batch]
    small, large = [n for n in stream if n >= 100], [n for n in stream if n < 100]
    assert len(small) == 200 and len(large) == 600
    for numbers_, first, size in ((large, 0, 50), (small, 100, 7)):
        for begin in range(0, len(numbers_) - size, size):
            assert sorted(numbers_[begin : begin + size]) == list(range(first, first + size))
    assert loader.epochs(100) == [12.0, pytest.approx(200 / 7)]
    assert loader.num_targets(3) == sum(read(loader, [3])[0])


def test_sources_without_weights_are_one_corpus():
    loader = loader_of(sources(weights=None), train_batch_size=57)
    assert sorted(read(loader, [5], micro_batch_size=57)[0]) == [*range(50), *range(100, 107)]
    assert loader.weights is None


def test_a_later_stage_reads_on_with_another_batch_size():
    first = loader_of(sources())
    read(first, range(9))
    first.reweigh([1, 1], 9)
    whole = [n for batch in uninterrupted() for n in batch]
    second = loader_of(sources(), first=9 * BATCH, train_batch_size=4)
    second.load_state_dict(first.state_dict())
    assert second.next_step == 0 and second.weights == (0.5, 0.5)
    assert [n for batch in read(second, range(12)) for n in batch] == whole[9 * BATCH : 9 * BATCH + 48]


@pytest.mark.parametrize(
    ("changed", "message"), [({"seed": 5}, "another seed"), ({"rows": rows_of(40)}, "another corpus")]
)
def test_a_state_of_other_data_is_refused(changed, message):
    state = loader_of(sources()).state_dict()
    with pytest.raises(UserError, match=message):
        loader_of(**({"rows": sources()} | changed)).load_state_dict(state)


def test_names_of_samples():
    loader = loader_of(sources())
    labels = [label for rank in (0, 1) for label in loader.sample_ids(2, rank, 2)]
    wanted = [f"large:{n}" if n < 100 else f"small:{n - 100}" for n in read(loader, [2])[0]]
    assert labels == wanted and loader_of().sample_ids(0)[0] == f"train:{read(loader_of(), [0])[0][0]}"
