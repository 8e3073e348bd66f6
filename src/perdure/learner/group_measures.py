"""Measures of groups of records, such as selection rates, on public test records, by fairlearn."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from perdure.data.experience import Stream
from perdure.data.groups import Groups, group_of
from perdure.errors import ConfigError
from perdure.learner.evaluation import refuse_learnt, trained_last
from perdure.learner.learner import Learner
from perdure.tasks import SingleLabel, refuse_other_tasks
from perdure.utils.extras import imported


@dataclass(frozen=True, kw_only=True)
class GroupMeasures:
    """Measures of the groups of one set of test records.

    Shares are from 0 to 1. Measures of selection are None where no class counts as selected.

    Args:
        attribute: attribute that has the groups.
        records: number of records of each group that occurs, by the name of the group.
        accuracy: share of the records that are classified correctly, by group.
        selection_rate: share of the records that are classified as the positive class, by group.
        accuracy_difference: difference of the largest and the smallest accuracy.
        demographic_parity_difference: difference of the largest and the smallest selection rate.
        equalized_odds_difference: the larger one of the differences of true positive rates and of
            false positive rates.
    """

    attribute: str
    records: Mapping[str, int]
    accuracy: Mapping[str, float]
    selection_rate: Mapping[str, float] | None
    accuracy_difference: float
    demographic_parity_difference: float | None
    equalized_odds_difference: float | None


def group_measures(learner: Learner, stream: Stream, groups: Groups) -> list[GroupMeasures | None]:
    """Measure groups of the test records of every stage, with the metrics of fairlearn.

    >>> group_measures(learner, stream, Groups(attribute="sex", names=("Female", "Male")))

    Guarantee: none for the test records, which are public with their groups; training records of a
    private learner are refused.

    Args:
        learner: learner that was trained or prepared.
        stream: stream whose test records have the attribute.
        groups: attribute, names of the groups, and the class that counts as selected.

    Returns:
        Measures of each stage; None for a stage without test records.

    Raises:
        ConfigError: if the records have no classes, or fairlearn is not installed.
        DataError: if test records do not have the attribute.
        PrivacyError: for training records of a learner with privacy.
    """
    refuse_groups(stream, groups)
    refuse_learnt(learner.session, stream)
    after = trained_last(learner.session)
    found: list[GroupMeasures | None] = []
    for stage in stream.stages:
        test = stage.test
        if not len(test):
            found.append(None)
            continue
        index = stage.latest(after) if stream.scenario == "task" else None
        outputs = learner.predict(test.inputs, experience=index)
        found.append(
            measures_of(
                predicted=stream.task.predictions(outputs).cpu(),
                labels=test.labels.cpu(),
                group=group_of(test, groups.attribute).cpu(),
                groups=groups,
                num_classes=stream.num_classes,
            )
        )
    return found


def refuse_groups(stream: Stream, groups: Groups) -> None:
    """Refuse groups that cannot be measured on a stream's test records.

    Raises:
        ConfigError: if the records have no classes, if the positive class does not exist, or if
            fairlearn is not installed.
        DataError: if test records do not have the attribute.
    """
    refuse_other_tasks(stream.task, (SingleLabel,), "measures of groups", "they compare classes")
    positive = groups.positive
    if positive is not None and positive >= stream.num_classes:
        raise ConfigError.of("positive", positive, f"a class, 0 to {stream.num_classes - 1}")
    imported("fairlearn.metrics", "fairness", "groups")
    for stage in stream.stages:
        if len(stage.test):
            group_of(stage.test, groups.attribute)


def measures_of(
    *, predicted: Tensor, labels: Tensor, group: Tensor, groups: Groups, num_classes: int
) -> GroupMeasures:
    """Measure groups of records with the metrics of fairlearn.

    Args:
        predicted: (n,) predicted classes.
        labels: (n,) classes.
        group: (n,) group of each record.
        groups: names of the groups, and the class that counts as selected.
        num_classes: number of classes.
    """
    from fairlearn.metrics import MetricFrame, count, equalized_odds_difference, selection_rate
    from sklearn.metrics import accuracy_score

    positive = groups.positive
    if positive is None and num_classes == 2:
        positive = 1
    truth, answer, sensitive = (each.numpy() for each in (labels, predicted, group))
    frame = MetricFrame(
        metrics={"records": count, "accuracy": accuracy_score},
        y_true=truth,
        y_pred=answer,
        sensitive_features=sensitive,
    )
    rates: dict[str, float] | None = None
    odds: float | None = None
    if positive is not None:
        truth, answer = truth == positive, answer == positive
        chosen = MetricFrame(
            metrics=selection_rate, y_true=truth, y_pred=answer, sensitive_features=sensitive
        )
        rates = _named(chosen.by_group, groups)
        odds = float(equalized_odds_difference(truth, answer, sensitive_features=sensitive))
    accuracy = _named(frame.by_group["accuracy"], groups)
    return GroupMeasures(
        attribute=groups.attribute,
        records={
            name: int(each) for name, each in _named(frame.by_group["records"], groups).items()
        },
        accuracy=accuracy,
        selection_rate=rates,
        accuracy_difference=_gap(accuracy),
        demographic_parity_difference=None if rates is None else _gap(rates),
        equalized_odds_difference=odds,
    )


def _named(by_group: Mapping[int, float], groups: Groups) -> dict[str, float]:
    """Return numbers by the name of the group; NaN is left out."""
    return {
        groups.name_of(int(group)): float(value)
        for group, value in by_group.items()
        if not math.isnan(value)
    }


def _gap(values: Mapping[str, float]) -> float:
    return max(values.values()) - min(values.values())
