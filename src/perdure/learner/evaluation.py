"""Predictions of a party's strategy, and the task's metric of them on test records."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.learner.party import Party
from perdure.metrics import evaluate
from perdure.utils.modules import evaluating


def predictor(party: Party, index: int, *, after: int) -> Callable[[Tensor], Tensor]:
    """Return a function from inputs (n, ...) to outputs (n, ..., C); puts the model in eval mode.

    Args:
        party: party with model, strategy and state.
        index: index of the experience that the inputs belong to.
        after: index of the experience that was trained last.
    """
    context = party.context(index if party.stream.scenario == "task" else after)
    party.model.eval()
    return lambda x: party.strategy.predict(party.forward, x, context, party.state)


def measurements(party: Party, stream: Stream, batch_size: int) -> list[float]:
    """Evaluate a party on the test records of every stage, by the metric of the task.

    The modes of the model do not change. An experience in training counts as trained.

    Args:
        party: party with model, strategy and state.
        stream: stream whose test records are used.
        batch_size: number of rows of one pass.
    """
    position = party.position
    after = max(0, position.experience - (not position.begun))
    found = []
    with torch.no_grad(), evaluating(party.model):
        for stage in stream.stages:
            # the test records alone: a stream of pieces has thousands of experiences
            test = stage.test.to(party.device)
            predicted = predictor(party, stage.latest(after), after=after)
            found.append(evaluate(stream.task, predicted, test.inputs, test.labels, batch_size))
    return found


def is_measured(stream: Stream, index: int, every: int | None) -> bool:
    """Return True if the model is evaluated after experience `index`.

    Args:
        stream: stream that the model learns.
        index: index of the experience.
        every: also evaluate after this many experiences of a stage; None for its end only.
    """
    stage = stream.stage_of(index)
    inside = index - stage.first + 1
    return index == stage.last or (every is not None and inside % every == 0)


def lacks_late_tests(stream: Stream, matrix: list[list[float]]) -> bool:
    """Return True if a stage has test records that were not evaluated after the last stage."""
    last = matrix[-1] if matrix else []
    return any(
        len(stage.test) and math.isnan(found)
        for stage, found in zip(stream.stages, last, strict=False)
    )
