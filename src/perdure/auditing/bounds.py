"""Lower bounds on epsilon from the success of an attacker: the mathematics of an audit.

The audit: each of m canaries is in the data with probability 1/2, independently of the others. The
mechanism runs once. From its releases, every canary gets a score; a higher score means that the
canary was more likely in the data. If the scores show which canaries were in the data, more often
than (epsilon, delta)-DP allows, then the mechanism is not (epsilon, delta)-DP.

Three bounds, from the tightest to the one that assumes least:

gaussian        the scores of canaries in the data and not in the data are two samples of Gaussians
                with one variance. A confidence bound on their distance mu is a bound on the mu of
                Gaussian DP. Exact without sampling. With Poisson sampling it is a limit for many
                steps and lies below the PLD: over few steps at a low rate it is far too low.
one-run-f-dp    assumes nothing about the scores. It finds the smallest mu for which the mechanism
                could be mu-GDP, and gives the epsilon of this mu.
one-run         assumes nothing about scores or mechanism: an (epsilon, delta)-DP mechanism passes.
"""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Literal, get_args

import torch
from torch import Tensor

from perdure.errors import ConfigError

Method = Literal["gaussian", "one-run-f-dp", "one-run"]
"""Bound on epsilon, from the tightest to the one that assumes least."""

GUESSED = (0.02, 0.1, 0.3, 1.0)
"""Shares of the canaries about which a one-run bound makes guesses; the error probability is
divided equally between them.
"""

STANDARD = NormalDist()


def log_likelihood_ratio(released: Tensor, *, rate: float, noise_multiplier: float) -> Tensor:
    """Log likelihood ratios (m,) of noisy coordinates: canary in the data against canary not in it.

        log(1 - q + q exp((2x - 1) / (2 s^2)))
        x = released / clip norm, q = rate, s = noise multiplier

    The sum over all steps is the best score for Poisson-sampled Gaussian noise (Neyman and
    Pearson). At q = 1 it is the sum of the coordinates, up to scale and shift. Any other score
    gives a valid but lower bound.

    Args:
        released: (m,) coordinates in units of the clip norm, each N(b, s^2), with b = 1 if the
            canary was in the step and 0 if not.
        rate: probability that a canary in the data is in a step.
        noise_multiplier: claimed noise multiplier.
    """
    shift = (2 * released.double() - 1) / (2 * noise_multiplier**2)
    absent = torch.tensor(1 - rate, dtype=torch.float64).log().to(released.device)
    return torch.logaddexp(absent, math.log(rate) + shift)


def lower_bound(
    scores: Tensor,
    included: Tensor,
    *,
    delta: float,
    confidence: float,
    method: Method = "gaussian",
) -> float:
    """Lower bound on the epsilon of the mechanism, which holds with the given confidence.

    Guarantee: for a mechanism that is (epsilon, delta)-DP under add-remove, the bound is above
    epsilon with probability at most 1 - confidence; for `gaussian` if the scores are Gaussian, as
    the head of this module says, and for `one-run-f-dp` if the mechanism is mu-GDP for some mu.

    Args:
        scores: (m,) scores, one per canary.
        included: (m,) bool, True for a canary in the data, each with probability 1/2.
        delta: number in (0, 1).
        confidence: confidence of the lower bound, in (0, 1).

    Raises:
        ConfigError: if delta, confidence or method is not allowed, or fewer than two canaries are
            in the data, or not in it.
    """
    for field, value in (("delta", delta), ("confidence", confidence)):
        if not 0 < value < 1:
            raise ConfigError.of(field, value, "a number above 0 and below 1")
    if method not in get_args(Method):
        raise ConfigError.of("method", method, get_args(Method))
    inside = scores[included].double()
    outside = scores[~included].double()
    if min(len(inside), len(outside)) < 2:
        raise ConfigError.of(
            "canaries",
            len(scores),
            "enough canaries to have two in the data and two outside, for example 1000",
        )
    if method == "gaussian":
        return epsilon_of(separation(inside, outside, confidence), delta)
    bound = one_run_epsilon if method == "one-run" else one_run_f_dp_epsilon
    tail = (1 - confidence) / len(GUESSED)
    counts = [guesses(scores, included, share) for share in GUESSED]
    return max(
        bound(correct, made, len(scores), delta=delta, tail=tail) for correct, made in counts
    )


# --------------------------------------------------------------------------- Gaussian scores


def separation(inside: Tensor, outside: Tensor, confidence: float) -> float:
    """Lower confidence bound on the distance of two Gaussians in units of their standard deviation.

        d - z sqrt(1/n + 1/n' + d^2 / (2 (n + n' - 2)))
        d = (mean - mean') / pooled standard deviation

    Args:
        inside: (n,) samples.
        outside: (n',) samples.
        confidence: one-sided confidence; z is its normal quantile.

    Source: Hedges and Olkin 1985, Statistical Methods for Meta-Analysis, section 5 (large-sample
    interval).
    """
    n = len(inside)
    other = len(outside)
    squares = (inside - inside.mean()).square().sum() + (outside - outside.mean()).square().sum()
    deviation = float((squares / (n + other - 2)).sqrt())
    distance = float(inside.mean() - outside.mean())
    if deviation == 0:
        return math.inf if distance > 0 else 0.0
    d = distance / deviation
    error = math.sqrt(1 / n + 1 / other + d**2 / (2 * (n + other - 2)))
    return max(0.0, d - STANDARD.inv_cdf(confidence) * error)


def epsilon_of(mu: float, delta: float) -> float:
    """Epsilon at `delta` of a Gaussian mechanism with sensitivity `mu` and noise of deviation 1.

        delta(epsilon) = Phi(mu/2 - epsilon/mu) - exp(epsilon) Phi(-mu/2 - epsilon/mu)

    Source: Balle and Wang 2018, theorem 8; Dong, Roth and Su 2022, corollary 2.13.
    """
    if mu == 0 or math.isinf(mu):
        return mu

    def excess(epsilon: float) -> float:
        spread = torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
        kept, lost = torch.special.log_ndtr(spread).tolist()
        return math.exp(kept) - math.exp(epsilon + lost) - delta

    return _crossing(lambda epsilon: excess(epsilon) > 0)


# ------------------------------------------------------------------------- one run, few assumptions


def guesses(scores: Tensor, included: Tensor, share: float) -> tuple[int, int]:
    """Guess which canaries were in the data, and count the correct guesses.

    The highest scores are guessed to be in the data, the lowest not to be in it.

    Args:
        scores: (m,) scores, one per canary.
        included: (m,) bool, True for a canary in the data.
        share: share of the canaries about which guesses are made, fixed in advance.

    Returns:
        Number of right guesses, and number of guesses.
    """
    each = max(1, int(share * len(scores) / 2))
    order = torch.argsort(scores, stable=True)
    right = int(included[order[-each:]].sum()) + int((~included[order[:each]]).sum())
    return right, 2 * each


def one_run_epsilon(correct: int, made: int, canaries: int, *, delta: float, tail: float) -> float:
    """Find the smallest epsilon at which `correct` right guesses have a probability above `tail`.

    Args:
        correct: number of right guesses.
        made: number of guesses.
        canaries: number of all canaries, with and without a guess.
        delta: delta of the returned epsilon.
        tail: probability that the bound is wrong.
    """
    return _crossing(
        lambda epsilon: one_run_p_value(correct, made, canaries, epsilon, delta) <= tail
    )


def one_run_p_value(correct: int, made: int, canaries: int, epsilon: float, delta: float) -> float:
    """Largest probability of `correct` or more right guesses under (epsilon, delta)-DP.

        P[W >= v] <= b + 2 m delta max_i (P[B >= v - i] - b) / i
        b = P[B >= v],   B ~ Bin(made, 1 / (1 + e^-epsilon))

    Args:
        correct: number of right guesses, v.
        made: number of guesses; the mechanism's output decides which canaries they are about.
        canaries: number of all canaries, m, with and without a guess.

    Source: Steinke, Nasr and Jagielski 2023, Privacy auditing with one (1) training run, theorem
    5.2.
    """
    k = torch.arange(made + 1, dtype=torch.float64)
    log_ways = math.lgamma(made + 1) - torch.lgamma(k + 1) - torch.lgamma(made - k + 1)
    right, wrong = torch.nn.functional.logsigmoid(
        torch.tensor([epsilon, -epsilon], dtype=torch.float64)
    ).tolist()
    mass = (log_ways + k * right + (made - k) * wrong).exp()
    above = float(mass[correct:].sum())
    below = mass[:correct].flip(0).cumsum(0) / torch.arange(1, correct + 1, dtype=torch.float64)
    steepest = float(below.max()) if correct else 0.0
    return min(1.0, above + 2 * canaries * delta * steepest)


def one_run_f_dp_epsilon(
    correct: int, made: int, canaries: int, *, delta: float, tail: float
) -> float:
    """Compute the epsilon of the smallest mu at which `correct` right guesses are possible.

    With this mu, a mu-GDP mechanism could give `correct` right guesses with probability `tail`.

    Args:
        correct: number of right guesses.
        made: number of guesses.
        canaries: number of all canaries, with and without a guess.
        delta: delta of the returned epsilon.
        tail: probability that the bound is wrong.
    """
    mu = _crossing(lambda mu: not could_be_gaussian(correct, made, canaries, mu, tail), 1e-6)
    return epsilon_of(mu, delta)


def could_be_gaussian(correct: int, made: int, canaries: int, mu: float, tail: float) -> bool:
    """Return True if a mu-GDP mechanism can have `correct` right guesses with probability `tail`.

    This means `correct` or more right guesses out of `made`.

    Let p_t be the probability of t right guesses. Sum over all canaries the probability that one is
    guessed right (wrong) while at least i of the others are right: the sums are made * r_{i+1} with
    r_i = sum_{t >= i} p_t t / made, and made * h_i with h_i = sum_{t >= i} p_t (made - t) / made.
    Moving one canary into or out of the data turns one event into the other, so that, averaged over
    the canaries,

        (made/m) h_i >= Phi(Phi^-1((made/m) r_{i+1}) - mu)

    Starting from P[t >= correct] = tail, these force a smallest total probability, which is at most
    1.

    Source: Mahloujifar, Melis and Chaudhuri 2025, Auditing f-differential privacy in one run,
    theorem 3.2, algorithm 3.
    """
    share = made / canaries
    right = tail * correct / canaries
    wrong = tail * (made - correct) / canaries
    for i in range(correct - 1, -1, -1):
        if right + wrong >= share:
            break
        needed = max(wrong, STANDARD.cdf(STANDARD.inv_cdf(right) - mu))
        right += i / (made - i) * (needed - wrong)
        wrong = needed
    return right + wrong <= share


def _crossing(below: Callable[[float], bool], accuracy: float = 1e-9) -> float:
    """Find by bisection the largest number for which the function `below` returns True.

    It is 0 if `below` returns False for all numbers.
    """
    if not below(0.0):
        return 0.0
    low = 0.0
    high = 1.0
    while below(high):
        low = high
        high = 2 * high
    while high - low > accuracy * high:
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low
