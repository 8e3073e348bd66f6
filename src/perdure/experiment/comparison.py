"""Comparison of arms over seeds, from the results of one or several runs.

    comparison = compare("runs/first", "runs/second")
    comparison.estimates("average_accuracy")       # mean, standard error, interval of every arm
    comparison.differences("average_accuracy")     # paired by seed
    comparison.to_pandas()                         # all of it as one table

Arms of one name and the same settings in several runs are one arm, with the seeds of all: a config
that was run with seed 0 and again with seed 1 is compared as one of two seeds. If the settings
differ, or a seed occurs twice, the name of the run comes first: `fast/ewc-plain`.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from perdure.errors import ConfigError
from perdure.experiment.compared_runs import ComparedArm, ComparedRun, named_arms, refuse_other_data
from perdure.experiment.data_frames import data_frame
from perdure.experiment.paired_statistics import (
    Estimate,
    common_seeds,
    estimate,
    mean_ranks,
    paired_difference,
)
from perdure.tasks import Metric

CONFIDENCE = 0.95
"""Default confidence of the intervals of a comparison."""
COLUMNS = (
    "metric",
    "unit",
    "arm",
    "minus",
    "seeds",
    "mean",
    "standard_error",
    "low",
    "high",
    "mean_rank",
)
"""Columns of the table of a comparison, in every format."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Paired difference of two arms in one metric.

    Args:
        arm: name of the arm.
        minus: name of the arm that is subtracted.
        estimate: mean of the differences at the same seeds; None where no seed has both numbers.
    """

    arm: str
    minus: str
    estimate: Estimate | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result of `compare`: means of every arm over seeds, and paired differences between arms.

    Args:
        runs: folders of the runs.
        stream: stream of all arms, such as "digits, class-incremental, 5 experiences".
        arms: every arm by name, in the order of the runs.
        metrics: every metric that some arm has, by its name in the result.
        confidence: confidence of the intervals, between 0 and 1.
        baseline: arm that all others are compared with; None to compare all pairs.
        notes: warnings on missing seeds, failed trainings and epsilons, one sentence each.
    """

    runs: tuple[str, ...]
    stream: str
    arms: Mapping[str, ComparedArm]
    metrics: Mapping[str, Metric]
    confidence: float = CONFIDENCE
    baseline: str | None = None
    notes: tuple[str, ...] = ()

    def values(self, metric: str) -> dict[str, dict[int, float]]:
        """Return the numbers of a metric by arm and seed, for the arms that have this metric.

        Raises:
            ConfigError: for a metric that no arm has.
        """
        if metric not in self.metrics:
            raise ConfigError.of("metric", metric, self.metrics)
        found = {
            name: {seed: row[metric] for seed, row in arm.trials.items() if metric in row}
            for name, arm in self.arms.items()
        }
        return {name: values for name, values in found.items() if values}

    def estimates(self, metric: str) -> dict[str, Estimate]:
        """Return the mean of a metric over seeds for every arm, with its uncertainty."""
        found = self.values(metric)
        return {name: estimate(values, self.confidence) for name, values in found.items()}

    def differences(self, metric: str) -> list[Difference]:
        """Paired differences of a metric: each pair of arms once, or each arm minus the baseline.

        The interval is the one of a paired t-test. It holds for one pair that was chosen before the
        numbers were seen; of many pairs, some intervals miss by chance.
        """
        found = self.values(metric)
        pairs = (
            [(name, self.baseline) for name in found if name != self.baseline]
            if self.baseline
            else [(later, earlier) for earlier, later in combinations(found, 2)]
        )
        return [
            Difference(
                arm=arm,
                minus=minus,
                estimate=paired_difference(found[arm], found.get(minus, {}), self.confidence),
            )
            for arm, minus in pairs
        ]

    def mean_ranks(self, metric: str) -> dict[str, float]:
        """Return the mean rank of every arm, 1 for the best, over the seeds that all arms have."""
        higher = self.metrics[metric].higher_is_better
        return mean_ranks(self.values(metric), higher_is_better=higher)

    def rows(self) -> list[dict[str, Any]]:
        """Return the comparison as rows: one per arm and metric, and one per paired difference.

        The keys are `COLUMNS`. `minus` is None in the row of a mean; `mean_rank` is None in the row
        of a difference.
        """
        return [row for metric in self.metrics for row in self._rows(metric)]

    def to_pandas(self) -> Any:
        """Return `rows` as a DataFrame; pandas is an extra, `pip install perdure[tables]`.

        Raises:
            ConfigError: without pandas.
        """
        return data_frame(self.rows(), COLUMNS)

    def to_csv(self) -> str:
        """Return `rows` as CSV text; an empty field means that there is no such number."""
        written = io.StringIO()
        table = csv.DictWriter(written, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows())
        return written.getvalue()

    def to_json(self) -> str:
        """Return the comparison as JSON text: `rows`, and the numbers at each seed."""
        content = {
            "runs": list(self.runs),
            "stream": self.stream,
            "confidence": self.confidence,
            "baseline": self.baseline,
            "notes": list(self.notes),
            "rows": self.rows(),
            "values": {
                metric: {
                    arm: {str(seed): value for seed, value in of_arm.items()}
                    for arm, of_arm in self.values(metric).items()
                }
                for metric in self.metrics
            },
        }
        return json.dumps(content, indent=2, allow_nan=False) + "\n"

    def _rows(self, metric: str) -> Iterator[dict[str, Any]]:
        ranks = self.mean_ranks(metric)
        for name, found in self.estimates(metric).items():
            yield self._row(metric, name, None, found) | {"mean_rank": ranks.get(name)}
        for difference in self.differences(metric):
            if difference.estimate:
                yield self._row(metric, difference.arm, difference.minus, difference.estimate)

    def _row(self, metric: str, arm: str, minus: str | None, found: Estimate) -> dict[str, Any]:
        return {
            "metric": metric,
            "unit": self.metrics[metric].unit,
            "arm": arm,
            "minus": minus,
            "seeds": len(found.seeds),
            "mean": found.mean,
            "standard_error": found.standard_error,
            "low": found.low,
            "high": found.high,
            "mean_rank": None,
        }


def compare(
    *runs: Path | str, confidence: float = CONFIDENCE, baseline: str | None = None
) -> Comparison:
    """Compare the arms of one or several finished runs over their seeds.

    Guarantee: none of its own. Each epsilon is for one model of one seed; see `Comparison.notes`.

    Args:
        runs: folders of finished runs on the same stream.
        confidence: confidence of the intervals, between 0 and 1.
        baseline: name of the arm that all others are compared with; None to compare all pairs.

    Raises:
        ConfigError: for runs of different data or streams, arms without a common seed, and a
            baseline that is no arm.
        RunError: if a run has no result that can be read.
    """
    if not 0 < confidence < 1:
        raise ConfigError.of("confidence", confidence, "a number between 0 and 1")
    if not runs:
        raise ConfigError.of("runs", [], "the folder of at least one finished run")
    read = [ComparedRun.read(Path(run)) for run in runs]
    refuse_other_data(read)
    arms = named_arms(read)
    _refuse_no_common_seed(arms)
    if baseline is not None and baseline not in arms:
        raise ConfigError.of("baseline", baseline, arms)
    metrics = read[0].metrics()
    known = {name for arm in arms.values() for row in arm.trials.values() for name in row}
    if not _epsilons_compare(arms):
        known.discard("epsilon")
    return Comparison(
        runs=tuple(str(run.folder) for run in read),
        stream=read[0].stream,
        arms=arms,
        metrics={name: metric for name, metric in metrics.items() if name in known},
        confidence=confidence,
        baseline=baseline,
        notes=tuple(_notes(arms)),
    )


def _refuse_no_common_seed(arms: Mapping[str, ComparedArm]) -> None:
    for (one, first), (two, second) in combinations(arms.items(), 2):
        if not set(first.trials) & set(second.trials):
            told = [", ".join(map(str, sorted(arm.trials))) for arm in (first, second)]
            raise ConfigError(
                f"{one} has the seeds {told[0]} and {two} has {told[1]}, none in common; "
                "run both with the same seeds"
            )


def _notes(arms: Mapping[str, ComparedArm]) -> Iterator[str]:
    """Yield warnings for `Comparison.notes`, on missing seeds, failures and epsilons."""
    common = common_seeds([dict.fromkeys(arm.trials, 0.0) for arm in arms.values()])
    if any(len(arm.trials) == 1 for arm in arms.values()):
        yield (
            "One seed has no standard error and no interval: its numbers say nothing about chance. "
            "Run several, such as seeds = [0, 1, 2]."
        )
    elif any(set(arm.trials) != set(common) for arm in arms.values()):
        yield (
            "Arms have different seeds: means are over all seeds of an arm, differences over the "
            "seeds of both, ranks over the seeds of all."
        )
    for name, arm in arms.items():
        for seed, failure in arm.failures.items():
            yield f"{name} failed at seed {seed} and is left out there: {failure}"
    private = {name: arm for name, arm in arms.items() if arm.private}
    told = sorted({f"{arm.guarantee}, {arm.assumptions}" for arm in private.values()})
    if told:
        yield (
            f"Each epsilon is of one model of one seed ({'; '.join(told)}). Somebody who sees "
            "several models sees more: epsilon_of_all_arms in result.json."
        )
    if not _epsilons_compare(arms):
        yield "Epsilons are left out of the tables: their unit, relation or delta differ."


def _epsilons_compare(arms: Mapping[str, ComparedArm]) -> bool:
    """Return True if the epsilons of all arms have the same unit, relation and delta."""
    return len({arm.guarantee for arm in arms.values() if arm.private}) < 2
