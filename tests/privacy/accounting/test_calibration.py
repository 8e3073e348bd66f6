import math
import warnings

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy import stats

from perdure.errors import BudgetError, ConfigError, PrivacyError
from perdure.privacy.accounting.accountants import pld_epsilon
from perdure.privacy.accounting.calibration import calibrate, epsilon, within, worst
from perdure.privacy.accounting.charges import Charge, merged

DELTA = 1e-5
Q = 256 / 12_000


def library_epsilon(accountant, charges):
    """Return dp-accounting's own composition, event by event."""
    for charge in charges:
        event = dp_accounting.GaussianDpEvent(charge.noise_multiplier)
        if charge.sampling_rate < 1:
            event = dp_accounting.PoissonSampledDpEvent(charge.sampling_rate, event)
        accountant.compose(event, charge.steps)
    return accountant.get_epsilon(DELTA)


# ---- reference values. RDP of the third row: 8.666 is that of the exact Renyi divergence at order
# 2.7; dp-accounting bounds fractional orders from above and gives 8.680.


@pytest.mark.reference
@pytest.mark.parametrize(
    ("charge", "rdp", "pld"),
    [
        (Charge(0.00427, 1.1, 3525), 1.283, 1.135),
        (Charge(0.01, 1.0, 1000), 2.101, 1.828),
        (Charge(0.01, 0.6, 1000), 8.680, 7.434),
        (Charge(0.1, 2.0, 300), 4.564, 4.183),
    ],
)
def test_accountants_give_the_documented_epsilons(charge, rdp, pld):
    assert epsilon([charge], delta=DELTA) == pytest.approx(pld, abs=0.005)
    assert epsilon([charge], delta=DELTA, accountant="rdp") == pytest.approx(rdp, abs=0.005)


@pytest.mark.reference
@pytest.mark.parametrize(
    "charges",
    [
        [Charge(Q, 2.5, 469), Charge(256 / 13_000, 2.5, 938), Charge(1.0, 8.0, 1)],
        [Charge(1.0, 5.0, 7), Charge(1.0, 3.0, 2)],
        [Charge(0.5, 8.0, 30), Charge(0.1, 4.0, 10), Charge(0.5, 8.0, 12)],
    ],
)
def test_epsilon_agrees_with_dp_accounting(charges):
    assert epsilon(charges, delta=DELTA) == pytest.approx(
        library_epsilon(PLDAccountant(), charges), abs=1e-6
    )
    rdp = library_epsilon(RdpAccountant(), charges)
    assert epsilon(charges, delta=DELTA, accountant="rdp") == pytest.approx(rdp, abs=1e-6)


@pytest.mark.reference
@pytest.mark.parametrize(
    "charges", [[Charge(Q, 3.0, 469)], [Charge(0.1, 4.0, 50), Charge(1.0, 9.0, 2)]]
)
def test_epsilon_under_replace_one_agrees_with_dp_accounting(charges):
    library = PLDAccountant(dp_accounting.NeighboringRelation.REPLACE_ONE)
    assert epsilon(charges, delta=DELTA, relation="replace-one") == pytest.approx(
        library_epsilon(library, charges), abs=1e-6
    )


@pytest.mark.reference
@pytest.mark.parametrize("noise", [0.8, 3.0])
def test_one_gaussian_step_has_the_analytic_epsilon(noise):
    """Balle and Wang 2018: delta = Phi(1/(2s) - eps s) - exp(eps) Phi(-1/(2s) - eps s)."""
    for relation, s in (("add-remove", noise), ("replace-one", noise / 2)):
        spent = epsilon([Charge(1.0, noise, 1)], delta=DELTA, relation=relation)
        delta = stats.norm.cdf(0.5 / s - spent * s) - math.exp(spent) * stats.norm.cdf(
            -0.5 / s - spent * s
        )
        assert delta == pytest.approx(DELTA, rel=1e-2)
        assert delta <= DELTA * (1 + 1e-9)


def test_epsilon_is_above_the_central_limit_approximation():
    """The central-limit value of the first row, 1.079, is below the spent epsilon."""
    assert epsilon([Charge(0.00427, 1.1, 3525)], delta=DELTA) > 1.13


# ---- replace-one


@pytest.mark.reference
def test_the_replace_one_bound_covers_every_pair_of_vectors():
    """One Poisson-sampled step in two dimensions, by quadrature: v = -v' is the worst pair at every
    tested order.
    """
    q = 0.3
    s = 0.9
    axis = np.linspace(-6, 6, 241)
    x, y = np.meshgrid(axis, axis)

    def density(a, b):
        return np.exp(-((x - a) ** 2 + (y - b) ** 2) / (2 * s * s)) / (2 * np.pi * s * s)

    def mixture(radius, angle):
        return (1 - q) * density(0, 0) + q * density(radius * np.cos(angle), radius * np.sin(angle))

    cell = (axis[1] - axis[0]) ** 2
    others = [mixture(r, t) for r in (0, 0.5, 1) for t in np.linspace(0, np.pi, 7)]

    def divergence(a, b, order):
        return np.maximum(a - order * b, 0).sum() * cell

    for order in (0.6, 1.0, 1.3, 2.7):
        claimed = divergence(mixture(1, 0), mixture(1, np.pi), order)
        for radius in (0.4, 1.0):
            found = max(divergence(mixture(radius, 0), other, order) for other in others)
            assert found <= claimed + 1e-9
            assert found < claimed - 1e-4 or radius == 1.0


def test_replace_one_epsilon_lies_above_add_remove_epsilon():
    charges = [Charge(0.1, 4.0, 200)]
    halved = [Charge(0.1, 2.0, 200)]
    replace = epsilon(charges, delta=DELTA, relation="replace-one")
    assert 1.2 * epsilon(charges, delta=DELTA) < replace < epsilon(halved, delta=DELTA)


def test_rdp_under_replace_one_halves_the_noise_or_refuses():
    """The RDP accountant of the library ignores the relation of an unsampled Gaussian."""
    unsampled = epsilon(
        [Charge(1.0, 1.5, 3)], delta=DELTA, accountant="rdp", relation="replace-one"
    )
    assert unsampled == epsilon([Charge(1.0, 0.75, 3)], delta=DELTA, accountant="rdp")
    with pytest.raises(PrivacyError, match="pld"):
        epsilon([Charge(0.1, 1.5, 3)], delta=DELTA, accountant="rdp", relation="replace-one")


# ---- structure


def test_equal_charges_are_merged_in_any_order():
    a = Charge(0.1, 2.0, 3)
    b = Charge(0.2, 2.0, 1)
    c = Charge(0.1, 2.0, 4)
    assert (
        merged([a, b, c])
        == merged([c, Charge(1.0, 0.0, 0), a, b])
        == (Charge(0.1, 2.0, 7), Charge(0.2, 2.0, 1))
    )


def test_epsilon_is_0_without_steps_and_infinite_without_noise():
    assert epsilon([], delta=DELTA) == epsilon([], delta=DELTA, accountant="rdp") == 0
    assert epsilon([Charge(0.1, 0.0, 0)], delta=DELTA) == 0
    for accountant in ("pld", "rdp"):
        assert (
            epsilon([Charge(0.1, 0.0, 1), Charge(0.1, 1.0, 1)], delta=DELTA, accountant=accountant)
            == math.inf
        )
    assert epsilon([Charge(1.0, 1e-6, 10)], delta=DELTA) == math.inf


@pytest.mark.parametrize("noise", [0.2, 0.05, 0.01])
def test_epsilon_stays_an_upper_bound_with_very_little_noise(noise):
    """The reference is the exact epsilon of one Gaussian of ten steps."""
    s = noise / math.sqrt(10)
    spent = epsilon([Charge(1.0, noise, 10)], delta=DELTA)
    log_delta = stats.norm.logcdf(0.5 / s - spent * s)  # the second term only lowers it
    assert log_delta <= math.log(DELTA) + 1.0
    assert spent >= 0.5 / s**2
    assert spent <= (0.5 / s**2 + 4.4 / s) * 1.01


def test_rdp_gives_no_warning_about_left_out_orders(caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        epsilon([Charge(0.3, 1.1, 50)], delta=2e-5, accountant="rdp")
    assert not caplog.records


@pytest.mark.parametrize(
    "values",
    [
        (0.0, 1.0, 1),
        (1.1, 1.0, 1),
        (0.5, -1.0, 1),
        (0.5, math.inf, 1),
        (0.5, 1.0, -1),
        (0.5, 1.0, 1.5),
        (math.nan, 1.0, 1),
        (0.5, math.nan, 1),
        (0.5, 1.0, True),
    ],
)
def test_a_charge_refuses_invalid_fields(values):
    with pytest.raises(ConfigError):
        Charge(*values)


@pytest.mark.parametrize(
    "wrong",
    [
        {"delta": 0.0},
        {"delta": 1.0},
        {"delta": DELTA, "accountant": "gdp"},
        {"delta": DELTA, "relation": "x"},
    ],
)
def test_epsilon_refuses_invalid_arguments(wrong):
    with pytest.raises(ConfigError):
        epsilon([Charge(0.1, 1.0, 1)], **wrong)


def test_the_worst_partition_is_one_with_the_largest_epsilon():
    few = [Charge(0.1, 2.0, 10)]
    many = [Charge(0.1, 2.0, 20)]
    other = [Charge(0.02, 0.9, 12)]
    histories = {"few": few, "many": many, "other": other, "nothing": []}
    values = {name: epsilon(history, delta=DELTA) for name, history in histories.items()}
    for names in (
        ("few", "many"),
        ("few", "other"),
        ("nothing",),
        ("many", "other", "few", "nothing"),
    ):
        name, value = worst({n: histories[n] for n in names}, delta=DELTA)
        assert value == max(values[n] for n in names) and values[name] == value
    assert worst({}, delta=DELTA) == ("none", 0.0)


def test_the_budget_check_agrees_with_pld_near_the_target():
    charges = [Charge(0.1, 2.0, 20)]
    spent = epsilon(charges, delta=DELTA)
    assert within(charges, spent, delta=DELTA) and within(charges, 2 * spent, delta=DELTA)
    assert not within(charges, spent * (1 - 1e-9), delta=DELTA)
    assert epsilon(charges, delta=DELTA, accountant="rdp") > spent  # RDP alone would have refused


# ---- calibration


def check_minimal(charges_at, target, noise, delta=DELTA, **relation):
    def spent(s):
        return max(epsilon(history, delta=delta, **relation) for history in charges_at(s))

    assert spent(noise) <= target
    assert spent(noise * (1 - 2.5e-3)) > target
    assert float(f"{noise:.4g}") == noise


@pytest.mark.parametrize(("target", "rate", "steps"), [(3.0, 0.01, 1000), (0.2, 0.3, 100)])
def test_calibrated_noise_is_the_smallest_within_the_target(target, rate, steps):
    def charges_at(noise):
        return [[Charge(rate, noise, steps)]]

    check_minimal(charges_at, target, calibrate(charges_at, epsilon=target, delta=DELTA))


def test_calibration_holds_for_the_partition_with_most_charges():
    """Replay makes the first experience worst; among the others, the release of the small client is
    worst.
    """

    def charges_at(noise):
        first = [Charge(0.2, noise, 40), *[Charge(0.1, noise, 40)] * 3]
        return [
            [Charge(0.2, noise, 40)],
            first,
            [Charge(0.15, noise, 60), Charge(1.0, 3 * noise, 1)],
            [],
        ]

    check_minimal(charges_at, 2.0, calibrate(charges_at, epsilon=2.0, delta=1e-3), delta=1e-3)


def test_calibration_includes_charges_spent_earlier():
    spent = Charge(0.1, 2.0, 30)

    def charges_at(noise):
        return [[spent, Charge(0.1, noise, 30)]]

    check_minimal(charges_at, 2.0, calibrate(charges_at, epsilon=2.0, delta=DELTA))
    with pytest.raises(BudgetError, match="raise epsilon"):
        calibrate(charges_at, epsilon=0.5, delta=DELTA)


def test_calibration_holds_under_the_replace_one_relation():
    def charges_at(noise):
        return [[Charge(0.1, noise, 20)]]

    noise = calibrate(charges_at, epsilon=1.0, delta=DELTA, relation="replace-one")
    check_minimal(charges_at, 1.0, noise, relation="replace-one")
    assert epsilon(charges_at(noise)[0], delta=DELTA) < 0.95


def test_calibration_returns_the_least_noise_if_it_is_enough():
    assert calibrate(lambda noise: [], epsilon=1.0, delta=DELTA) == 0.05
    assert calibrate(lambda noise: [[]], epsilon=1.0, delta=DELTA) == 0.05
    assert (
        calibrate(lambda noise: [[Charge(1.0, 10 * noise, 1)]], epsilon=100.0, delta=DELTA) == 0.05
    )


@pytest.mark.parametrize(
    "wrong", [{"epsilon": 0.0}, {"epsilon": math.inf}, {"delta": 0.0}, {"delta": 1.0}]
)
def test_calibration_refuses_an_invalid_target(wrong):
    with pytest.raises(ConfigError):
        calibrate(
            lambda noise: [[Charge(0.1, noise, 1)]], **({"epsilon": 1.0, "delta": DELTA} | wrong)
        )


def revisited(noise):
    """Return histories of five experiences with a memory, and of one whose records are used
    once.
    """
    own = Charge(0.02, noise, 300, "grid-gaussian")
    back = [Charge(0.02 / (1 + j), noise, 300, "grid-gaussian") for j in range(5)]
    return [[own, *back[i + 1 :]] for i in range(5)] + [[Charge(0.01, noise, 1000)]]


def used_once(noise):
    return [[Charge(0.01, noise, 1000)]]


@pytest.mark.parametrize(
    ("charges_at", "target"), [(revisited, 0.1), (used_once, 1e-3), (used_once, 3.0)]
)
def test_calibration_computes_at_most_40_loss_distributions(charges_at, target):
    """Calibration once took 1,100 distributions at a target of 0.01 and failed at 1e-4; a repeat
    takes none.
    """
    before = pld_epsilon.cache_info().misses
    noise = calibrate(charges_at, epsilon=target, delta=1e-5)
    needed = pld_epsilon.cache_info().misses - before
    assert needed <= 40
    assert calibrate(charges_at, epsilon=target, delta=1e-5) == noise
    assert pld_epsilon.cache_info().misses - before == needed
    spent = max(epsilon(history, delta=1e-5) for history in charges_at(noise))
    assert 0.998 * target < spent <= target


@pytest.mark.reference
def test_epsilon_is_accurate_for_very_small_privacy_losses():
    """The reference is the closed form of an unsampled Gaussian at epsilon 1e-3 (Balle and Wang
    2018).
    """
    charge = Charge(1.0, 2000.0, 1)
    spent = epsilon([charge], delta=1e-5)
    mu = 1 / 2000.0
    delta = stats.norm.cdf(mu / 2 - spent / mu) - math.exp(spent) * stats.norm.cdf(
        -mu / 2 - spent / mu
    )
    assert delta == pytest.approx(1e-5, rel=1e-3)
