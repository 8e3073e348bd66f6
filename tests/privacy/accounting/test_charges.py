"""Charge histories: one history that covers another, and one that bounds several."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge, bounding, covers, merged


def test_a_charge_history_covers_rarer_or_noisier_histories():
    strong = [Charge(0.2, 1.0, 10), Charge(0.1, 2.0, 5)]
    assert covers(strong, strong)
    assert covers(strong, [Charge(0.1, 1.0, 10), Charge(0.05, 3.0, 5)])
    assert covers(strong, [Charge(0.1, 2.0, 15)])
    assert not covers(strong, [Charge(0.1, 2.0, 16)])
    assert not covers(strong, [Charge(0.3, 1.0, 1)])
    assert not covers(strong, [Charge(0.2, 0.9, 1)])
    assert not covers(strong, [Charge(0.1, 2.0, 1, "grid-gaussian")])
    assert covers([Charge(1.0, 0.0, 1)], [Charge(1.0, 1.0, 1)])
    assert covers(strong, []) and not covers([], strong)


def test_bounding_returns_the_history_that_covers_all_others():
    rare, often = [Charge(0.1, 1.0, 10)], [Charge(0.2, 1.0, 10)]
    assert bounding([rare, often]) == bounding([often, rare]) == merged(often)
    assert bounding([rare]) == merged(rare) and bounding([]) == () and bounding([[]]) == ()


def test_bounding_joins_histories_that_do_not_cover_each_other():
    """One history is worse alone and the other after more charges; their bound is worse than
    both.
    """
    once, often = [Charge(1.0, 1.45, 1)], [Charge(0.01, 0.5, 40)]
    more = [Charge(0.01, 0.5, 400)]
    bound = bounding([once, often])
    assert bound == merged([*once, *often])
    alone, after = (
        [epsilon([*history, *extra], delta=1e-5) for history in (once, often, bound)]
        for extra in ([], more)
    )
    assert alone[0] < alone[1] - 2 and after[0] > after[1] + 0.2
    assert alone[2] >= max(alone) and after[2] >= max(after)


@given(
    histories=st.lists(
        st.lists(
            st.builds(
                Charge,
                st.sampled_from([0.05, 0.2, 1.0]),
                st.sampled_from([1.0, 2.0]),
                st.integers(1, 30),
            ),
            max_size=3,
        ),
        min_size=1,
        max_size=3,
    )
)
@settings(max_examples=6, deadline=None)
@pytest.mark.property
def test_a_bounding_history_costs_at_least_as_much_as_its_parts(histories):
    bound = bounding(histories)
    for history in histories:
        assert covers(bound, history)
        assert epsilon(bound, delta=1e-5) >= epsilon(history, delta=1e-5) * (1 - 1e-6) - 1e-6
