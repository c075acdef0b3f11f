import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cook.data.mixing import updated_weights


def test_the_formula_by_hand():
    # α = w · exp(max(ℓ − ref, 0)): 0.5·e^0.2, 0.3·e^0, 0.2·e^1.0; e^0.2 = 1.221403, e = 2.718282.
    alpha = [0.5 * 1.221403, 0.3, 0.2 * 2.718282]
    wanted = [value / sum(alpha) for value in alpha]
    assert updated_weights((0.5, 0.3, 0.2), [2.2, 1.0, 4.0], [2.0, 1.5, 3.0]) == pytest.approx(wanted, rel=1e-6)


@given(
    st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 900), st.floats(0, 900)), min_size=1, max_size=6),
)
def test_equals_the_paper_and_never_overflows(sources):
    weights, losses, references = (list(column) for column in zip(*sources, strict=True))
    got = updated_weights(weights, losses, references)
    assert sum(got) == pytest.approx(1.0) and all(0 <= weight <= 1 for weight in got)
    with np.errstate(over="ignore", invalid="ignore"):
        alpha = np.array(weights, np.longdouble) * np.exp(np.maximum(np.array(losses, np.longdouble) - references, 0))
    np.testing.assert_allclose(got, np.asarray(alpha / alpha.sum(), float), rtol=1e-9, atol=1e-300)


def test_sources_that_have_reached_their_references_keep_their_shares():
    assert updated_weights((0.7, 0.3), [1.0, 2.0], [1.5, 2.0]) == pytest.approx((0.7, 0.3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_changes_nothing(bad):
    assert updated_weights((0.7, 0.3), [1.0, bad], [1.5, 2.0]) == (0.7, 0.3)
