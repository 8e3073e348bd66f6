"""Robust accuracy of an arm over time: the robust twin of the accuracy matrix."""

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor

from perdure.adversarial import Attack, ThreatModelCard, measure_robustness
from perdure.data.experience import Stream
from perdure.learner.learner import Learner
from perdure.metrics import backward_transfer, forgetting
from perdure.utils.seeding import generator


class RobustnessRow(TypedDict):
    """Robustness after an experience, on the experiences so far.

    Args:
        robust: accuracy under attack on each experience so far, in percent.
        clean: accuracy on the same records without the attack, in percent.
        zero_gradients: percentage of records without a gradient of the cross entropy.
    """

    robust: list[float]
    clean: list[float]
    zero_gradients: float


class RobustNumbers(TypedDict):
    """Measures of robustness of a trained model, for a run's result; null without an attack."""

    robust_accuracy: float | None
    robust_matrix: Sequence[Sequence[float | None]] | None
    robust_forgetting: float | None
    robust_backward_transfer: float | None
    zero_gradients: float | None


def robustness_after(
    learner: Learner, stream: Stream, attack: Attack, index: int, seed: int
) -> RobustnessRow:
    """Attack the test records of every experience that a learner has seen.

    Args:
        learner: learner after stage `index`.
        stream: stream of the run.
        attack: attack, with bounds that fit the stream.
        index: number of the stage that was trained last.
        seed: seed of the attack's random numbers.
    """
    stages = stream.to(learner.device).stages
    last = stages[index].last
    cards: list[ThreatModelCard] = [
        measure_robustness(
            learner.predictor(stage.latest(last), after=last),
            stage.test.inputs,
            stage.test.labels,
            attack,
            generator=generator(seed, "attack", stage.number),
        )
        for stage in stages[: index + 1]
    ]
    return {
        "robust": [card.robust_accuracy for card in cards],
        "clean": [card.clean_accuracy for card in cards],
        "zero_gradients": sum(card.zero_gradients for card in cards) / len(cards),
    }


def robust_numbers(rows: Sequence[RobustnessRow]) -> RobustNumbers:
    """Return the robust measures of an arm, from its rows after each stage; none for no rows."""
    if not rows:
        return without_robustness()
    last = rows[-1]
    matrix, known = matrix_of([row["robust"] for row in rows])
    several = len(rows) > 1
    return {
        "robust_accuracy": sum(last["robust"]) / len(last["robust"]),
        "robust_matrix": matrix,
        "robust_forgetting": forgetting(known) if several else None,
        "robust_backward_transfer": backward_transfer(known) if several else None,
        "zero_gradients": last["zero_gradients"],
    }


def matrix_of(rows: Sequence[Sequence[float]]) -> tuple[list[list[float | None]], Tensor]:
    """Return rows of growing length as a square matrix, with None, and with NaN as a tensor."""
    width = len(rows[-1])
    matrix: list[list[float | None]] = [[*row, *[None] * (width - len(row))] for row in rows]
    known = [[float("nan") if value is None else value for value in row] for row in matrix]
    return matrix, torch.tensor(known)


def without_robustness() -> RobustNumbers:
    """Return the robust measures of an arm that was not attacked: null."""
    return {
        "robust_accuracy": None,
        "robust_matrix": None,
        "robust_forgetting": None,
        "robust_backward_transfer": None,
        "zero_gradients": None,
    }
