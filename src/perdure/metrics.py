"""Continual-learning metrics: plain functions on the accuracy matrix, and calibration error.

For tasks other than single-label, the matrix has another metric, such as root mean squared errors:
give `metric=stream.task.metric`. If lower is better, forgetting is the mean rise from the lowest
earlier error, and transfer is the mean fall, so that signs have the same meaning for every task.

The accuracy matrix R has one row per time and one column per experience: R[i, j] = accuracy in
percent on experience j after training on experience i, counted from 0. It is (T, E) with T times
and E experiences, T = E in a finished stream. NaN marks an experience that was not evaluated: it is
left out of every mean, and a mean over nothing is NaN. With T = 1 nothing could be forgotten or
transferred: forgetting and both transfers are 0.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.tasks import Metric, SingleLabel, Task
from perdure.utils.chunking import rows_per_pass
from perdure.utils.finite_outputs import finite_outputs

__all__ = [
    "ACCURACY",
    "ClassMeasures",
    "Summary",
    "accuracy",
    "area_under_accuracy",
    "average_accuracy",
    "backward_transfer",
    "class_measures",
    "evaluate",
    "expected_calibration_error",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
    "summarise",
    "worst_experience_accuracy",
]

ACCURACY = SingleLabel.metric
"""Metric of single-label records: percent, higher is better."""

_SLACK = 1e-6  # accuracies summed in float32 may exceed 100 by rounding


def accuracy(
    predict: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    batch_size: int | None = None,
) -> float:
    """Compute the percentage of records for which the label has the largest logit.

    Args:
        predict: function from inputs (k, ...) to logits (k, C).
        inputs: (n, ...) inputs.
        labels: (n,) labels.
        batch_size: largest number of records in a pass; None to choose it by the size of a record.

    Returns:
        Percent; NaN if there are no records.

    Raises:
        ConfigError: if logits are NaN or infinite.
    """
    return evaluate(SingleLabel(), predict, inputs, labels, batch_size)


def evaluate(
    task: Task,
    predict: Callable[[Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    batch_size: int | None = None,
) -> float:
    """Evaluate a model with the metric of a task.

    Args:
        task: task of the records.
        predict: function from inputs (k, ...) to outputs (k, ..., C).
        inputs: (n, ...) inputs.
        targets: targets of the records, in the shape of the task.
        batch_size: largest number of records in a pass; None to choose it by the size of a record.

    Returns:
        Value of the metric, in its unit; NaN if there are no records.

    Raises:
        ConfigError: if outputs are NaN or infinite.
    """
    totals = []
    size = batch_size or rows_per_pass(inputs)
    for start in range(0, len(targets), size):
        piece = slice(start, start + size)
        outputs = finite_outputs(predict(inputs[piece]), first=start)
        totals.append(task.measures(outputs, targets[piece]).sum(0))
    return task.score(torch.stack(totals).sum(0), len(targets)) if totals else math.nan


def average_accuracy(matrix: Tensor, *, metric: Metric = ACCURACY) -> float:
    """Mean accuracy over all experiences at the end of the stream.

    ACC = 1/E sum_j R[T-1, j]

    Args:
        matrix: R, the (T, E) accuracy matrix in percent.
        metric: metric of the matrix, if it does not contain accuracies.

    Raises:
        ConfigError: if the matrix does not contain values of the metric.

    Source: Lopez-Paz and Ranzato 2017, section 2, eq. 2.

    >>> average_accuracy(torch.tensor([[100.0, 0.0], [60.0, 90.0]]))
    75.0
    """
    R, sign = _oriented(matrix, metric)
    return sign * R[-1].nanmean().item()


def learning_accuracy(matrix: Tensor, *, metric: Metric = ACCURACY) -> float:
    """Mean accuracy on each experience directly after training on it (plasticity).

    LA = 1/T sum_j R[j, j]

    Args:
        matrix: R, the (T, E) accuracy matrix in percent.
        metric: metric of the matrix, if it does not contain accuracies.

    Raises:
        ConfigError: if the matrix does not contain values of the metric.

    Source: Riemer et al. 2019, section 5 (there LA).

    >>> learning_accuracy(torch.tensor([[100.0, 0.0], [60.0, 90.0]]))
    95.0
    """
    R, sign = _oriented(matrix, metric)
    return sign * R.diagonal().nanmean().item()


def forgetting(matrix: Tensor, *, metric: Metric = ACCURACY) -> float:
    """Mean drop, over past experiences, from the best earlier accuracy to the last one.

    F = 1/(T-1) sum_{j < T-1} ( max_{j <= l <= T-2} R[l, j] - R[T-1, j] )

    The maximum begins at the time after experience j was trained. The paper also uses earlier
    times; this differs only if a model was better at an experience before training on it. Negative
    forgetting is an improvement and is not cut at 0. Smaller is better.

    Args:
        matrix: R, the (T, E) accuracy matrix in percent.
        metric: metric of the matrix, if it does not contain accuracies.

    Raises:
        ConfigError: if the matrix does not contain values of the metric.

    Source: Chaudhry et al. 2018 (Riemannian Walk), section 3.2, eq. 3.

    >>> forgetting(torch.tensor([[100.0, 0.0], [60.0, 90.0]]))
    40.0
    """
    R, _ = _oriented(matrix, metric)
    past = R[:-1, : len(R) - 1]
    learnt = torch.ones_like(past, dtype=torch.bool).tril() & ~past.isnan()
    best = past.masked_fill(~learnt, -torch.inf).amax(dim=0) if len(past) else past.sum(dim=0)
    best = best.masked_fill(best.isinf(), torch.nan)
    return _mean_of_past(best - R[-1, : best.numel()], len(R))


def backward_transfer(matrix: Tensor, *, metric: Metric = ACCURACY) -> float:
    """Mean change of accuracy on each past experience, from directly after its training to the end.

    BWT = 1/(T-1) sum_{j < T-1} ( R[T-1, j] - R[j, j] )

    Larger is better; the value is negative if there is forgetting.

    Args:
        matrix: R, the (T, E) accuracy matrix in percent.
        metric: metric of the matrix, if it does not contain accuracies.

    Raises:
        ConfigError: if the matrix does not contain values of the metric.

    Source: Lopez-Paz and Ranzato 2017, section 2, eq. 3.

    >>> backward_transfer(torch.tensor([[100.0, 0.0], [60.0, 90.0]]))
    -40.0
    """
    R, _ = _oriented(matrix, metric)
    learnt = R[:-1].diagonal()
    return _mean_of_past(R[-1, : learnt.numel()] - learnt, len(R))


def forward_transfer(matrix: Tensor, baseline: Tensor, *, metric: Metric = ACCURACY) -> float:
    """Mean accuracy on each experience before training on it, minus an untrained model's.

    FWT = 1/(T-1) sum_{j >= 1} ( R[j-1, j] - baseline[j] )

    Larger is better. It is not meaningful in class-incremental streams, in which the accuracy on
    classes before their training is about 0.

    Args:
        matrix: R, the (T, E) accuracy matrix in percent.
        baseline: (E,) accuracy in percent of the untrained model on each experience.
        metric: metric of the matrix, if it does not contain accuracies.

    Raises:
        ConfigError: if the matrix does not contain values of the metric, or the baseline has a
            wrong length.

    Source: Lopez-Paz and Ranzato 2017, section 2, eq. 4.

    >>> forward_transfer(torch.tensor([[100.0, 30.0], [60.0, 90.0]]), torch.tensor([50.0, 20.0]))
    10.0
    """
    R, sign = _oriented(matrix, metric)
    baseline = torch.as_tensor(baseline)
    if baseline.shape != R.shape[1:]:
        raise ConfigError.of(
            "baseline", tuple(baseline.shape), f"one value per experience, ({R.shape[1]},)"
        )
    ahead = R.diagonal(offset=1)
    return _mean_of_past(ahead - sign * baseline.to(R)[1 : 1 + ahead.numel()], len(R))


def area_under_accuracy(matrix: Tensor, *, metric: Metric = ACCURACY) -> float:
    """Mean, over all times of the stream, of the accuracy on all experiences so far.

    AUC = 1/T sum_i 1/(i+1) sum_{j <= i} R[i, j]

    Args:
        matrix: R, the (T, E) accuracy matrix in percent.
        metric: metric of the matrix, if it does not contain accuracies.

    Raises:
        ConfigError: if the matrix does not contain values of the metric.

    Source: the average incremental accuracy of Rebuffi et al. 2017 (iCaRL), section 4.1.

    >>> area_under_accuracy(torch.tensor([[100.0, 0.0], [60.0, 90.0]]))
    87.5
    """
    R, sign = _oriented(matrix, metric)
    rows = [row[: i + 1].nanmean() for i, row in enumerate(R)]
    return sign * torch.stack(rows).nanmean().item()


def worst_experience_accuracy(matrix: Tensor, *, metric: Metric = ACCURACY) -> float:
    """Accuracy at the end of the stream on the worst experience: min_j R[T-1, j].

    Args:
        matrix: R, the (T, E) accuracy matrix in percent.
        metric: metric of the matrix, if it does not contain accuracies.

    Raises:
        ConfigError: if the matrix does not contain values of the metric.

    >>> worst_experience_accuracy(torch.tensor([[100.0, 0.0], [60.0, 90.0]]))
    60.0
    """
    R, sign = _oriented(matrix, metric)
    last = R[-1]
    last = last[~last.isnan()]
    return sign * last.min().item() if last.numel() else float("nan")


def expected_calibration_error(probabilities: Tensor, labels: Tensor, bins: int = 15) -> float:
    """Mean difference between confidence and accuracy, over bins of equal width of the confidence.

    ECE = sum_b n_b / n | accuracy_b - confidence_b |, as a fraction between 0 (calibrated) and 1. A
    bin does not include its lower end: confidence c is in bin ceil(c * bins).

    Args:
        probabilities: (n, classes) probabilities; rows sum to 1.
        labels: (n,) int64 classes.
        bins: number of bins of equal width.

    Raises:
        ConfigError: if shapes do not match, rows are not probabilities, or bins < 1.

    Source: Guo et al. 2017, section 2, eq. 3.

    >>> probabilities = torch.tensor([[0.9, 0.1], [0.9, 0.1]])
    >>> round(expected_calibration_error(probabilities, torch.tensor([0, 1])), 6)
    0.4
    """
    _check_probabilities(probabilities, labels, bins)
    confidence, predicted = probabilities.double().max(dim=1)
    gap = (predicted == labels).double() - confidence
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    return torch.zeros(bins).double().index_add(
        0, bin_of.cpu(), gap.cpu()
    ).abs().sum().item() / len(labels)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassMeasures:
    """Measures of each class on some records.

    Args:
        confusion: (C, C) int64, number of records of class i that were predicted as class j.
        accuracy: (C,) float64, percent of the records of each class that are right (recall); NaN
            for a class without records.
        f1: (C,) float64, F1 of each class in percent; NaN for a class without records.
        macro_f1: mean of `f1` over the classes with records, percent.
        calibration_error: expected calibration error, between 0 and 1; see
            `expected_calibration_error`.
    """

    confusion: Tensor
    accuracy: Tensor
    f1: Tensor
    macro_f1: float
    calibration_error: float


def class_measures(outputs: Tensor, labels: Tensor) -> ClassMeasures:
    """Measure the outputs of a model for each class.

    F1_c = 2 TP / (2 TP + FP + FN), where a record of another class that is predicted as c is a
    false positive of c, and a record of c that is predicted otherwise a false negative. These are
    torchmetrics' multiclass measures; for others see `perdure.learner.evaluate_with`.

    Args:
        outputs: (n, C) logits.
        labels: (n,) int64 classes, n at least 1.

    Raises:
        ConfigError: when shapes do not fit, or outputs are NaN or infinite.

    >>> found = class_measures(torch.eye(3)[[0, 1, 1]], torch.tensor([0, 0, 1]))
    >>> found.confusion.tolist(), found.accuracy.tolist()
    ([[1, 1, 0], [0, 1, 0], [0, 0, 0]], [50.0, 100.0, nan])
    """
    if outputs.ndim != 2 or not len(outputs) or labels.shape != outputs.shape[:1]:
        shapes = (tuple(outputs.shape), tuple(labels.shape))
        raise ConfigError.of("outputs, labels", shapes, "shapes (n, C) and (n,), n at least 1")
    width = outputs.shape[1]
    predicted = finite_outputs(outputs).argmax(1)
    confusion = torch.bincount(labels * width + predicted, minlength=width**2).view(width, width)
    right = confusion.diagonal().double()
    present = confusion.sum(1).double()
    # 0 / 0 is NaN where a class has no records
    f1 = torch.where(present > 0, 200 * right / (present + confusion.sum(0)), torch.nan)
    return ClassMeasures(
        confusion=confusion,
        accuracy=100 * right / present,
        f1=f1,
        macro_f1=float(f1.nanmean()),
        calibration_error=expected_calibration_error(torch.softmax(outputs, dim=1), labels),
    )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Every metric of one accuracy matrix, in percent (points for differences).

    Args:
        average_accuracy: accuracy at the end of the stream, averaged over all experiences.
        learning_accuracy: accuracy on each experience directly after training on it.
        forgetting: drop from the best earlier accuracy.
        backward_transfer: change of accuracy since training on an experience.
        forward_transfer: accuracy before training on an experience, minus an untrained model's;
            None without a baseline.
        worst_experience_accuracy: accuracy at the end on the worst experience.
        area_under_accuracy: accuracy on all experiences so far, averaged over all times.
    """

    average_accuracy: float
    learning_accuracy: float
    forgetting: float
    backward_transfer: float
    forward_transfer: float | None
    worst_experience_accuracy: float
    area_under_accuracy: float


def summarise(
    matrix: Tensor, baseline: Tensor | None = None, *, metric: Metric = ACCURACY
) -> Summary:
    """Compute every metric of an accuracy matrix.

    Args:
        matrix: R, the (T, E) accuracy matrix in percent.
        baseline: (E,) accuracy of the untrained model, needed for forward transfer only.
        metric: metric of the matrix, if it does not contain accuracies.

    Raises:
        ConfigError: if the matrix or the baseline is not allowed.
    """
    return Summary(
        average_accuracy=average_accuracy(matrix, metric=metric),
        learning_accuracy=learning_accuracy(matrix, metric=metric),
        forgetting=forgetting(matrix, metric=metric),
        backward_transfer=backward_transfer(matrix, metric=metric),
        forward_transfer=None
        if baseline is None
        else forward_transfer(matrix, baseline, metric=metric),
        worst_experience_accuracy=worst_experience_accuracy(matrix, metric=metric),
        area_under_accuracy=area_under_accuracy(matrix, metric=metric),
    )


def _oriented(matrix: Tensor, metric: Metric) -> tuple[Tensor, int]:
    """Return the accuracy matrix so that higher is better, in float64, and the factor 1 or -1.

    Args:
        matrix: tensor, or rows of numbers.
        metric: metric of the matrix.

    Raises:
        ConfigError: if it is not a matrix of this metric.
    """
    matrix = torch.as_tensor(matrix)
    if matrix.ndim != 2 or matrix.numel() == 0:
        shape = tuple(matrix.shape)
        raise ConfigError.of(
            "accuracy_matrix", shape, "shape (moments, experiences), both at least 1"
        )
    R = matrix.double()
    known = R[~R.isnan()]
    most = 100 + _SLACK if metric.unit == "%" else math.inf
    if known.numel() and not (known.min() >= -_SLACK and known.max() <= most):
        span = (known.min().item(), known.max().item())
        allowed = "percent between 0 and 100" if metric.unit == "%" else "numbers from 0"
        raise ConfigError.of(
            "accuracy_matrix",
            span,
            f"{allowed}, NaN where not evaluated; give metric=stream.task.metric",
        )
    sign = 1 if metric.higher_is_better else -1
    return sign * R, sign


def _mean_of_past(changes: Tensor, moments: int) -> float:
    """Return the mean of changes over past experiences; 0 if there are none."""
    return changes.nanmean().item() if moments > 1 else 0.0


def _check_probabilities(probabilities: Tensor, labels: Tensor, bins: int) -> None:
    if bins < 1:
        raise ConfigError.of("bins", bins, "1 or more")
    if probabilities.ndim != 2 or not len(probabilities) or labels.shape != probabilities.shape[:1]:
        shapes = (tuple(probabilities.shape), tuple(labels.shape))
        raise ConfigError.of(
            "probabilities, labels", shapes, "shapes (n, classes) and (n,), n at least 1"
        )
    off = (probabilities.double().sum(dim=1) - 1).abs().max().item()
    if not (probabilities.min() >= 0 and off <= 1e-4):
        raise ConfigError.of(
            "probabilities", f"rows that miss a sum of 1 by {off:.3g}", "softmax the logits first"
        )
