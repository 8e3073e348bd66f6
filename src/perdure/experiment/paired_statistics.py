"""Statistics of several arms over the same seeds: means, paired differences and ranks.

    standard error = s / sqrt(n),   interval of the mean = mean +- t(n - 1) * standard error

s is the standard deviation with divisor n - 1, and t the quantile of Student's distribution. A
paired difference is the same with the differences of two arms at the same seed for values: what a
seed does to both arms (order of the classes, first parameters, order of the records) drops out.

Values are plain numbers, by arm, then by seed: {"ewc": {0: 71.2, 1: 69.8}, "naive": {...}}.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Seeds = Mapping[int, float]
"""Value of one metric of one arm at each seed where it was measured."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Mean of values at several seeds, with standard error and confidence interval.

    Args:
        seeds: seeds of the values, ascending.
        mean: mean of the values.
        standard_error: standard error of the mean; None with one value.
        low: lower end of the interval of the mean; None with one value.
        high: upper end of the interval.
    """

    seeds: tuple[int, ...]
    mean: float
    standard_error: float | None
    low: float | None
    high: float | None


def estimate(values: Seeds, confidence: float) -> Estimate:
    """Estimate the mean of values at seeds.

    Args:
        values: value at each seed; at least one.
        confidence: confidence of the interval, between 0 and 1.
    """
    seeds = tuple(sorted(values))
    ordered = [values[seed] for seed in seeds]
    n = len(ordered)
    mean = math.fsum(ordered) / n
    if n == 1:
        return Estimate(seeds=seeds, mean=mean, standard_error=None, low=None, high=None)
    from scipy.special import stdtrit  # Student's quantile; scipy.stats takes seconds to load

    variance = math.fsum((value - mean) ** 2 for value in ordered) / (n - 1)
    error = math.sqrt(variance / n)
    reach = float(stdtrit(n - 1, (1 + confidence) / 2)) * error
    return Estimate(
        seeds=seeds, mean=mean, standard_error=error, low=mean - reach, high=mean + reach
    )


def paired_difference(values: Seeds, other: Seeds, confidence: float) -> Estimate | None:
    """Estimate the mean of `values - other` at the seeds that both have; None without any.

    Args:
        values: values of an arm, by seed.
        other: values of the arm that is subtracted, by seed.
        confidence: confidence of the interval, between 0 and 1.
    """
    differences = {seed: values[seed] - other[seed] for seed in values if seed in other}
    return estimate(differences, confidence) if differences else None


def mean_ranks(values: Mapping[str, Seeds], *, higher_is_better: bool) -> dict[str, float]:
    """Rank the arms at every seed that all of them have, 1 for the best, and average over seeds.

    Arms of the same value share the mean of their ranks.

    Args:
        values: value of the metric by arm and seed.
        higher_is_better: True if a larger value of the metric is better.

    Returns:
        Mean rank by arm; empty where no seed is common to all arms.
    """
    common = common_seeds(list(values.values()))
    sign = -1 if higher_is_better else 1
    ranks: dict[str, list[float]] = {arm: [] for arm in values if common}
    for seed in common:
        found = {arm: sign * of_arm[seed] for arm, of_arm in values.items()}
        for arm, value in found.items():
            better = sum(other < value for other in found.values())
            equal = sum(other == value for other in found.values())
            ranks[arm].append(better + (equal + 1) / 2)
    return {arm: math.fsum(of_arm) / len(of_arm) for arm, of_arm in ranks.items()}


def common_seeds(values: Sequence[Seeds]) -> tuple[int, ...]:
    """Return the seeds at which all arms have a value, ascending."""
    return tuple(sorted(set.intersection(*map(set, values)))) if values else ()
