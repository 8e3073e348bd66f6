"""Metrics against values by hand, Avalanche, torchmetrics, and properties."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from perdure.data import Stream
from perdure.errors import ConfigError
from perdure.learner import Learner, OutsideMetric, evaluate_with
from perdure.metrics import (
    Summary,
    area_under_accuracy,
    average_accuracy,
    backward_transfer,
    class_measures,
    expected_calibration_error,
    forgetting,
    forward_transfer,
    learning_accuracy,
    summarise,
    worst_experience_accuracy,
)
from perdure.strategies import Naive

NAN = float("nan")
# Best on experience 0 is after experience 1 (95), not when it was learnt (90).
HAND = torch.tensor(
    [[90.0, 10.0, 5.0], [95.0, 80.0, 30.0], [50.0, 60.0, 70.0]], dtype=torch.float64
)
BASELINE = torch.tensor([33.0, 20.0, 10.0], dtype=torch.float64)
accuracies = st.integers(0, 1000).map(lambda tenths: tenths / 10)


@st.composite
def matrices(draw: st.DrawFn, smallest: int = 1) -> Tensor:
    moments = draw(st.integers(smallest, 6))
    row = st.lists(accuracies, min_size=moments, max_size=moments)
    return torch.tensor(
        draw(st.lists(row, min_size=moments, max_size=moments)), dtype=torch.float64
    )


def test_metrics_equal_hand_computed_values() -> None:
    assert average_accuracy(HAND) == pytest.approx(60)
    assert learning_accuracy(HAND) == pytest.approx(80)
    assert forgetting(HAND) == pytest.approx(((95 - 50) + (80 - 60)) / 2)
    assert backward_transfer(HAND) == pytest.approx(((50 - 90) + (60 - 80)) / 2)
    assert forward_transfer(HAND, BASELINE) == pytest.approx(((10 - 20) + (30 - 10)) / 2)
    assert worst_experience_accuracy(HAND) == 50
    assert area_under_accuracy(HAND) == pytest.approx((90 + (95 + 80) / 2 + (50 + 60 + 70) / 3) / 3)


def test_forgetting_ignores_accuracy_before_an_experience() -> None:
    lucky = torch.tensor([[90.0, 99.0, 0.0], [90.0, 80.0, 0.0], [90.0, 70.0, 60.0]])
    assert forgetting(lucky) == pytest.approx((0 + 10) / 2)


def test_higher_accuracy_later_gives_negative_forgetting() -> None:
    assert forgetting(torch.tensor([[50.0, 0.0], [60.0, 90.0]])) == pytest.approx(-10)


def test_forgetting_and_transfer_are_0_with_one_experience() -> None:
    one = torch.tensor([[87.5]])
    assert summarise(one, torch.tensor([10.0])) == Summary(
        average_accuracy=87.5,
        learning_accuracy=87.5,
        forgetting=0.0,
        backward_transfer=0.0,
        forward_transfer=0.0,
        worst_experience_accuracy=87.5,
        area_under_accuracy=87.5,
    )


def test_metrics_accept_one_row_with_several_experiences() -> None:
    row = torch.tensor([[80.0, 40.0, 0.0]])
    assert average_accuracy(row) == pytest.approx(40)
    assert learning_accuracy(row) == 80
    assert forgetting(row) == backward_transfer(row) == 0


def test_metrics_leave_out_experiences_without_evaluation() -> None:
    holes = torch.tensor([[90.0, NAN, NAN], [NAN, 80.0, NAN], [NAN, 60.0, 70.0]])
    assert average_accuracy(holes) == pytest.approx(65)
    assert learning_accuracy(holes) == pytest.approx(80)
    assert forgetting(holes) == pytest.approx(20)
    assert backward_transfer(holes) == pytest.approx(-20)
    assert worst_experience_accuracy(holes) == 60
    assert math.isnan(forward_transfer(holes, BASELINE))


def test_forgetting_counts_from_the_first_evaluation() -> None:
    late = torch.tensor([[NAN, NAN, NAN], [85.0, 80.0, NAN], [70.0, 75.0, 90.0]])
    assert forgetting(late) == pytest.approx((15 + 5) / 2)
    assert backward_transfer(late) == pytest.approx(-5)


def test_metrics_without_evaluations_are_nan() -> None:
    empty = torch.full((3, 3), NAN)
    for metric in (
        average_accuracy,
        learning_accuracy,
        forgetting,
        backward_transfer,
        worst_experience_accuracy,
    ):
        assert math.isnan(metric(empty))


def test_metrics_accept_a_matrix_that_is_not_square() -> None:
    wide = torch.tensor([[90.0, 20.0, 10.0], [70.0, 80.0, 30.0]])
    assert forgetting(wide) == pytest.approx(20)
    assert forward_transfer(wide, BASELINE) == pytest.approx(((20 - 20) + (30 - 10)) / 2)
    tall = torch.tensor([[50.0], [80.0], [60.0]])
    assert forgetting(tall) == pytest.approx(20)
    assert backward_transfer(tall) == pytest.approx(10)


def test_the_metrics_summary_needs_a_baseline_for_transfer() -> None:
    assert summarise(HAND).forward_transfer is None
    assert summarise(HAND, BASELINE).forward_transfer == pytest.approx(5)


@pytest.mark.parametrize(
    "bad",
    [
        torch.rand(3),
        torch.empty(0, 3),
        torch.tensor([[101.0]]),
        torch.tensor([[-1.0]]),
        torch.tensor([[math.inf]]),
    ],
)
def test_an_invalid_accuracy_matrix_is_refused(bad: Tensor) -> None:
    with pytest.raises(ConfigError, match="accuracy_matrix"):
        summarise(bad)


def test_a_baseline_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="baseline"):
        forward_transfer(HAND, torch.zeros(2))


@pytest.mark.property
@given(matrices())
def test_forgetting_is_at_least_minus_backward_transfer(matrix: Tensor) -> None:
    assert forgetting(matrix) >= -backward_transfer(matrix) - 1e-9


@pytest.mark.property
@given(matrices(), accuracies)
def test_constant_accuracy_has_no_forgetting_and_no_transfer(matrix: Tensor, value: float) -> None:
    constant = torch.full_like(matrix, value)
    assert forgetting(constant) == backward_transfer(constant) == 0
    assert forward_transfer(constant, constant[0]) == 0
    assert average_accuracy(constant) == pytest.approx(value)


@pytest.mark.property
@given(matrices(smallest=2))
def test_average_accuracy_is_learning_accuracy_plus_transfer(matrix: Tensor) -> None:
    moments = len(matrix)
    change = backward_transfer(matrix) * (moments - 1) / moments
    assert average_accuracy(matrix) == pytest.approx(learning_accuracy(matrix) + change, abs=1e-9)
    assert worst_experience_accuracy(matrix) <= average_accuracy(matrix) + 1e-9


@pytest.fixture(scope="module")
def avalanche_metrics() -> tuple[type, type, type]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from avalanche.evaluation.metrics.forgetting_bwt import BWT, Forgetting
        from avalanche.evaluation.metrics.forward_transfer import ForwardTransfer
    return Forgetting, BWT, ForwardTransfer


@pytest.mark.slow
@pytest.mark.reference
@pytest.mark.property
@settings(deadline=None)
@given(matrix=matrices(smallest=2))
def test_forgetting_agrees_with_avalanche(
    avalanche_metrics: tuple[type, type, type], matrix: Tensor
) -> None:
    worst, change, ahead = (metric() for metric in avalanche_metrics)
    rows = matrix.tolist()
    last = len(matrix) - 1
    baseline = [7.0 * j for j in range(last + 1)]
    for j in range(last):
        # Avalanche compares with whatever it is given as initial: the best earlier value for
        # forgetting.
        worst.update(j, max(rows[k][j] for k in range(j, last)), initial=True)
        worst.update(j, rows[last][j])
        change.update(j, rows[j][j], initial=True)
        change.update(j, rows[last][j])
        ahead.update(j + 1, baseline[j + 1], initial=True)
        ahead.update(j + 1, rows[j][j + 1])
    theirs = [sum(metric.result().values()) / last for metric in (worst, change, ahead)]
    ours = [
        forgetting(matrix),
        backward_transfer(matrix),
        forward_transfer(matrix, torch.tensor(baseline)),
    ]
    assert ours == pytest.approx(theirs, abs=1e-9)


def test_calibration_error_equals_hand_computed_values() -> None:
    probabilities = torch.tensor([[0.95, 0.05], [0.95, 0.05], [0.45, 0.55], [0.45, 0.55]])
    labels = torch.tensor([0, 1, 1, 1])
    assert expected_calibration_error(probabilities, labels, bins=10) == pytest.approx(
        (0.45 + 0.45) / 2
    )
    # In one bin the two gaps have opposite signs and cancel.
    assert expected_calibration_error(probabilities, labels, bins=1) == pytest.approx(0, abs=1e-6)


def test_a_certain_model_is_calibrated_only_if_always_correct() -> None:
    sure = torch.eye(3)
    assert expected_calibration_error(sure, torch.tensor([0, 1, 2])) == 0
    assert expected_calibration_error(sure, torch.tensor([1, 2, 0])) == 1


@pytest.mark.reference
@pytest.mark.parametrize("seed", range(5))
def test_calibration_error_agrees_with_torchmetrics(seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.functional.classification import multiclass_calibration_error
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.softmax(2 * torch.randn(500, 7, generator=generator), dim=1)
    labels = torch.randint(0, 7, (500,), generator=generator)
    theirs = multiclass_calibration_error(probabilities, labels, num_classes=7, n_bins=15)
    assert expected_calibration_error(probabilities, labels) == pytest.approx(
        theirs.item(), abs=1e-6
    )


@pytest.mark.reference
def test_class_measures_agree_with_torchmetrics() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.functional import classification as reference
    generator = torch.Generator().manual_seed(0)
    outputs = 2 * torch.randn(400, 7, generator=generator)
    labels = torch.randint(0, 6, (400,), generator=generator)  # class 6 has no records
    found = class_measures(outputs, labels)
    theirs = reference.multiclass_confusion_matrix(outputs, labels, num_classes=7)
    assert torch.equal(found.confusion, theirs)
    for mine, name in ((found.accuracy, "accuracy"), (found.f1, "f1_score")):
        compute = getattr(reference, f"multiclass_{name}")
        each = compute(outputs, labels, num_classes=7, average="none")
        assert torch.allclose(mine[:6], 100 * each[:6].double(), atol=1e-4)
        assert mine[6].isnan()
    assert found.macro_f1 == pytest.approx(float(found.f1[:6].mean()))
    error = reference.multiclass_calibration_error(outputs, labels, num_classes=7, n_bins=15)
    assert found.calibration_error == pytest.approx(error.item(), abs=1e-6)


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (torch.eye(2), torch.tensor([0]), r"outputs, labels = \(\(2, 2\), \(1,\)\)"),
        (torch.empty(0, 2), torch.empty(0, dtype=torch.int64), "n at least 1"),
        (torch.full((2, 2), torch.nan), torch.tensor([0, 1]), "NaN or infinite for 2 of 2"),
    ],
)
def test_class_measures_refuse_outputs_or_labels_without_classes(
    outputs: Tensor, labels: Tensor, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        class_measures(outputs, labels)


@pytest.mark.parametrize(
    ("probabilities", "labels", "bins", "field"),
    [
        (torch.eye(2), torch.tensor([0, 1]), 0, "bins"),
        (torch.eye(2), torch.tensor([0]), 15, "labels"),
        (torch.tensor([[3.0, -1.0]]), torch.tensor([0]), 15, "probabilities"),
        (torch.tensor([[2.0, 1.0]]), torch.tensor([0]), 15, "probabilities"),
        (torch.empty(0, 2), torch.empty(0, dtype=torch.int64), 15, "probabilities"),
    ],
)
def test_calibration_error_refuses_invalid_probabilities(
    probabilities: Tensor, labels: Tensor, bins: int, field: str
) -> None:
    with pytest.raises(ConfigError, match=field):
        expected_calibration_error(probabilities, labels, bins)


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_metrics_of_torchmetrics_measure_every_stage(
    toy_model: Callable[[Stream], nn.Module], toy_stream: Callable[[str], Stream], scenario: str
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix
    stream = toy_stream(scenario)
    learner = Learner(
        model=toy_model(stream), strategy=Naive(), optimizer=torch.optim.Adam, iterations=2
    )
    learner.fit(stream)
    metrics: dict[str, OutsideMetric] = {
        "accuracy": MulticlassAccuracy(num_classes=4, average="micro"),
        "confusion": MulticlassConfusionMatrix(num_classes=4),
    }
    found = evaluate_with(learner, stream, metrics)
    accuracies = [100 * float(each["accuracy"]) for each in found]
    assert accuracies == pytest.approx(learner.matrix[-1])
    for stage, each in zip(stream.stages, found, strict=True):
        counts = torch.bincount(stage.test.labels, minlength=4)
        assert torch.equal(each["confusion"].sum(1), counts)
