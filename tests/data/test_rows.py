import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cook.base.errors import UserError
from cook.data.rows import JoinedRows, by_epoch, merged
from tests.data.number_rows import rows_of


class EpochRows:
    """Rows whose input is (row, epoch)."""

    fingerprint, max_length, is_redrawn = "e", 2, True

    def __len__(self):
        return 9

    def batch(self, indices, epoch=0):
        return {"input": torch.tensor([[int(i), epoch] for i in indices])}


def test_rows_of_all_parts_under_one_numbering():
    joined = JoinedRows(["a", "b"], [rows_of(3), rows_of(4, start=100)])
    assert len(joined) == 7 and joined.max_length == 4
    indices = np.array([6, 0, 3, 2, 6])
    batch = joined.batch(indices)
    assert batch["input"][:, 2].tolist() == [113, 10, 110, 12, 113]
    assert joined.num_targets(indices).tolist() == [103, 0, 100, 2, 103]
    assert [joined.label(i) for i in range(7)] == ["a:0", "a:1", "a:2", "b:0", "b:1", "b:2", "b:3"]
    # A batch of one part alone keeps the order that was asked for.
    assert joined.batch(np.array([2, 0]))["input"][:, 2].tolist() == [12, 10]


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(0, 3)), min_size=1, max_size=12))
def test_every_row_is_read_in_its_epoch(pairs):
    rows, epochs = np.array(pairs).T
    assert by_epoch(EpochRows().batch, rows, epochs)["input"].tolist() == [list(pair) for pair in pairs]


def test_fingerprint_follows_parts_names_and_weights():
    def print_of(**changes):
        given = {"names": ["a", "b"], "parts": [rows_of(2), rows_of(2)], "weights": None} | changes
        return JoinedRows(**given).fingerprint

    prints = {print_of(), print_of(names=["a", "c"]), print_of(weights=[1, 2]), print_of(weights=[2, 1])}
    assert len(prints) == 4 and print_of() == print_of()


def test_parts_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="the source b has no rows"):
        JoinedRows(["a", "b"], [rows_of(2), rows_of(0)])
    with pytest.raises(UserError, match="the source b has rows of another length"):
        JoinedRows(["a", "b"], [rows_of(2), EpochRows()])


def test_a_key_that_only_some_rows_have_is_filled():
    plain, asked = {"a": torch.tensor([[1]])}, {"a": torch.tensor([[2]]), "choices": torch.tensor([[5]])}
    batch = merged([(np.array([1]), plain), (np.array([0]), asked | {"choice_token": torch.tensor([7])})])
    assert batch["choices"].tolist() == [[5], [-1]] and batch["choice_token"].tolist() == [7, 0]
    assert batch["a"].tolist() == [[2], [1]]
