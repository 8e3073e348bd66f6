"""Private selection: its epsilon against dp-accounting, and the number of runs."""

import logging
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from scipy import stats
from scipy.optimize import brentq

from perdure.errors import ConfigError, PrivacyError
from perdure.privacy.accounting import Charge, epsilon
from perdure.privacy.accounting.selection import Selection, selection_epsilon
from perdure.privacy.noise.key import NoiseKey

ONE_RUN = (Charge(0.1, 2.0, 100, "grid-gaussian"), Charge(1.0, 8.0, 1, "grid-gaussian"))
SHAPES = {"geometric": 1.0, "logarithmic": 0.0, "poisson": math.inf}


@pytest.mark.reference
@pytest.mark.parametrize("repeats", SHAPES)
def test_the_epsilon_of_a_selection_equals_dp_accounting(repeats):
    gaussian = dp_accounting.GaussianDpEvent
    steps = dp_accounting.PoissonSampledDpEvent(0.1, gaussian(2.0))
    run = dp_accounting.ComposedDpEvent(
        [dp_accounting.SelfComposedDpEvent(steps, 100), gaussian(8.0)]
    )
    reference = RdpAccountant()
    logging.getLogger("absl").disabled = True
    reference.compose(RepeatAndSelectDpEvent(run, 20.0, SHAPES[repeats]))
    expected = reference.get_epsilon(1e-5)
    found = selection_epsilon(ONE_RUN, 1e-5, Selection(mean=20, repeats=repeats))
    assert expected <= found <= 1.01 * expected


@pytest.mark.reference
def test_the_epsilon_of_a_selection_follows_its_theorem():
    """Theorem 2 of Papernot and Steinke, with the geometric number of runs, by hand."""
    sigma = 5.0
    orders = np.arange(1.1, 200, 0.1)
    run = orders / (2 * sigma**2)
    mean = 10
    best = np.min((1 - 1 / orders) * run + math.log(mean) / orders)
    whole = run + math.log(mean) / (orders - 1) + 2 * best
    spent = whole + np.log1p(-1 / orders) - (math.log(1e-5) + np.log(orders)) / (orders - 1)
    found = selection_epsilon(
        (Charge(1.0, sigma, 1),), 1e-5, Selection(mean=mean, repeats="geometric")
    )
    assert found == pytest.approx(spent.min(), rel=0.01)


def test_a_selection_costs_more_than_one_run_and_less_than_all():
    found = selection_epsilon(ONE_RUN, 1e-5, Selection(mean=20))
    assert epsilon(ONE_RUN, delta=1e-5) < found < epsilon(ONE_RUN * 20, delta=1e-5)


@pytest.mark.statistical
@pytest.mark.parametrize(
    ("repeats", "law"),
    [
        ("geometric", stats.geom(1 / 6)),
        ("poisson", stats.poisson(6)),
        ("logarithmic", stats.logser(brentq(lambda p: stats.logser.mean(p) - 6, 0.1, 0.999))),
    ],
)
def test_the_number_of_runs_has_its_distribution(repeats, law):
    """Chi-square at 1 in 1,000, seeded, so that it does not flake; a mean of 9 is told apart."""
    assert _chance(Selection(mean=6, repeats=repeats), law) > 0.001
    assert _chance(Selection(mean=9, repeats=repeats), law) < 0.001


def _chance(selection, law):
    drawn = [selection.number(NoiseKey.from_seed(0, i)) for i in range(1500)]
    edges = range(10)
    seen = [drawn.count(k) for k in edges]
    seen.append(len(drawn) - sum(seen))
    masses = [law.pmf(k) for k in edges]
    masses.append(1 - sum(masses))
    kept = [(s, len(drawn) * m) for s, m in zip(seen, masses, strict=True) if m > 0]
    counts, expected = map(list, zip(*kept, strict=True))
    assert sum(counts) == len(drawn)
    return stats.chisquare(counts, expected).pvalue


def test_the_number_of_runs_is_fixed_by_the_key(tmp_path):
    selection = Selection(mean=50)
    first = selection.number(NoiseKey.from_os(tmp_path / "key"))
    assert selection.number(NoiseKey.from_os(tmp_path / "key")) == first
    others = {selection.number(NoiseKey.from_os(tmp_path / str(i))) for i in range(8)}
    assert len(others | {first}) > 2


def test_a_selection_refuses_what_has_no_bound():
    with pytest.raises(PrivacyError, match="no bound for charges of kind exponential"):
        selection_epsilon((Charge(1.0, 2.0, 1, "exponential"),), 1e-5, Selection(mean=5))
    with pytest.raises(ConfigError, match="mean number of runs = 1"):
        Selection(mean=1)
    assert selection_epsilon((Charge(1.0, 0.0, 1),), 1e-5, Selection(mean=5)) == math.inf
    assert selection_epsilon((), 1e-5, Selection(mean=5)) == 0.0
