"""Predictions of a party's strategy, and their metric on test records."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.learner.party import Party
from perdure.metrics import evaluate
from perdure.utils.modules import evaluating


def predictor(party: Party, index: int, *, after: int) -> Callable[[Tensor], Tensor]:
    """Return a function from inputs (n, ...) to outputs (n, ..., C); set evaluation mode.

    Args:
        party: with model, strategy and state.
        index: experience of the inputs.
        after: experience that was trained last.
    """
    context = party.context(index if party.stream.scenario == "task" else after)
    party.model.eval()
    return lambda x: party.strategy.predict(party.forward, x, context, party.state)


def measurements(party: Party, stream: Stream, batch_size: int) -> list[float]:
    """Measure a party on the test records of every stage, each once, by the metric of the task.

    The model's modes stay as they are. An experience that is being trained counts as trained.

    Args:
        party: with model, strategy and state.
        stream: its test records are used.
        batch_size: rows of one pass.
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
    """Tell if a model is measured after experience `index`.

    Args:
        stream: that is learnt.
        index: of the experience.
        every: experiences of a stage after which it is measured too; None for its end alone.
    """
    stage = stream.stage_of(index)
    inside = index - stage.first + 1
    return index == stage.last or (every is not None and inside % every == 0)


def lacks_late_tests(stream: Stream, matrix: list[list[float]]) -> bool:
    """Tell if a stage has test records now that was not measured at the end of the stream."""
    last = matrix[-1] if matrix else []
    return any(
        len(stage.test) and math.isnan(found)
        for stage, found in zip(stream.stages, last, strict=False)
    )
