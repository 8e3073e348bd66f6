"""Loss distributions of one Gaussian step against those of dp-accounting."""

import math

import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import privacy_loss_distribution

from perdure.privacy.accounting.gaussian_losses import gaussian_step

RELATIONS = {
    "add-remove": NeighboringRelation.ADD_OR_REMOVE_ONE,
    "replace-one": NeighboringRelation.REPLACE_ONE,
}


@pytest.mark.reference
@pytest.mark.parametrize("relation", RELATIONS)
@pytest.mark.parametrize(
    ("rate", "noise", "interval", "steps"),
    [
        (0.01, 0.8, 1e-3, 1000),
        (1.0, 1.1, 1e-3, 1),
        (1e-4, 0.5, 1e-3, 10_000),
        (0.2, 0.3, 1e-2, 50),  # losses into the hundreds
        (0.3, 0.06, 1e-1, 3),
        (0.999, 1.3, 1e-3, 9),
        (0.04, 30.0, 1e-4, 2000),
    ],
)
def test_a_gaussian_step_equals_the_step_of_dp_accounting(relation, rate, noise, interval, steps):
    """One step and many steps, on both sides of the neighbouring relation."""
    mine = gaussian_step(rate, noise, relation, interval)
    theirs = privacy_loss_distribution.from_gaussian_mechanism(
        noise,
        sampling_prob=rate,
        value_discretization_interval=interval,
        neighboring_relation=RELATIONS[relation],
    )
    for epsilon in (-1.0, 0.0, 0.1, 3.0):
        assert mine.once().get_delta_for_epsilon(epsilon) == pytest.approx(
            theirs.get_delta_for_epsilon(epsilon), rel=1e-8, abs=1e-13
        )
    many = [mine.repeated(steps), theirs.self_compose(steps)]
    for delta in (1e-3, 1e-5):
        found, expected = (one.get_epsilon_for_delta(delta) for one in many)
        assert found == pytest.approx(expected, rel=1e-6)


def test_rounding_never_lowers_epsilon():
    """Delta of repeated steps against transforms of numbers with 64-bit mantissas."""
    steps = 100_000
    for side in gaussian_step(0.01, 50.0, "add-remove", 1e-3).sides:
        found = side.repeated(steps)
        size = 2 * len(found.masses) + len(side.masses)
        powers = np.fft.rfft(side.masses.astype(np.longdouble), size) ** steps
        low = found.lowest - steps * side.lowest
        exact = np.roll(np.fft.irfft(powers, size), -low)[: len(found.masses)].astype(float)
        losses = (found.lowest + np.arange(len(exact))) * 1e-3
        for epsilon in (0.0, 0.3, 0.8, 5.0, 20.0):
            beyond = exact * -np.expm1(np.minimum(epsilon - losses, 0))
            infinite = -math.expm1(steps * math.log1p(-side.infinite))
            assert found.pmf().get_delta_for_epsilon(epsilon) >= beyond.sum() + infinite
