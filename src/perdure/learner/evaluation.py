"""Predictions of a party's strategy, and their metric on test records."""

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
    """Measure a party on the test records of every experience, by the metric of the task.

    The model's modes stay as they are. An experience that is being trained counts as trained.

    Args:
        party: with model, strategy and state.
        stream: its test records are used.
        batch_size: rows of one pass.
    """
    position = party.position
    after = max(0, position.experience - (not position.begun))
    with torch.no_grad(), evaluating(party.model):
        return [
            evaluate(
                stream.task,
                predictor(party, each.index, after=after),
                each.test.inputs,
                each.test.labels,
                batch_size,
            )
            for each in stream.to(party.device)
        ]
