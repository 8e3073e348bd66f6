"""Metrics of other libraries, such as torchmetrics, on the predictions of a learner."""

import math
from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from perdure.data.experience import Stream
from perdure.learner.evaluation import refuse_learnt, trained_last
from perdure.learner.learner import Learner


class OutsideMetric(Protocol):
    """Metric of another library, such as torchmetrics."""

    def reset(self) -> None:
        """Discard all records that were counted."""

    def update(self, outputs: Tensor, targets: Tensor, /) -> None:
        """Count more records, given by their outputs (n, ..., C) and targets (n, ...)."""

    def compute(self) -> Any:
        """Return the metric of all records since `reset`."""


def evaluate_with(
    learner: Learner, stream: Stream, metrics: Mapping[str, OutsideMetric]
) -> list[dict[str, Any]]:
    """Measure a learner on the test records of every stage with metrics of another library.

    >>> from torchmetrics.classification import MulticlassF1Score
    >>> evaluate_with(learner, stream, {"f1": MulticlassF1Score(num_classes=10)})

    Args:
        learner: learner that was trained or prepared.
        stream: stream whose test records are used.
        metrics: name of your choice to metric, an object with the methods `reset`,
            `update(outputs, targets)` and `compute`, as in torchmetrics. It is reset before and
            after each stage.

    Returns:
        For every stage, the value of `compute` by name; NaN for a stage without test records.

    Raises:
        PrivacyError: for training records of a learner with privacy.
    """
    refuse_learnt(learner.session, stream)
    found: list[dict[str, Any]] = []
    after = trained_last(learner.session)
    for stage in stream.stages:
        test = stage.test
        if not len(test):
            found.append(dict.fromkeys(metrics, math.nan))
            continue
        index = stage.latest(after) if stream.scenario == "task" else None
        outputs = learner.predict(test.inputs, experience=index)
        measured = {}
        for name, metric in metrics.items():
            metric.reset()
            metric.update(outputs, test.labels.to(outputs.device))
            measured[name] = metric.compute()
            metric.reset()
        found.append(measured)
    return found
