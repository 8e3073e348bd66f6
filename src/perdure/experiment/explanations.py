"""Explanations of a run: those of the first test records, after a stage."""

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.experiment.explain_config import ExplainConfig
from perdure.learner.learner import Learner
from perdure.utils.seeding import generator


def explanation_of(
    learner: Learner, stream: Stream, chosen: ExplainConfig, index: int, seed: int
) -> dict[str, Tensor]:
    """Explain the first test records of the first stage, and return the tensors to store.

    Args:
        learner: learner after stage `index`.
        stream: stream of the run.
        chosen: explainer, and number of records.
        index: number of the stage that was trained last.
        seed: seed of the explainer's draws.

    Returns:
        `inputs` (n, ...), `labels` (n,) and `values`, the attributions.
    """
    first = stream.stages[0]
    inputs = first.test.inputs[: chosen.records].to(learner.device)
    labels = first.test.labels[: chosen.records].to(learner.device)
    with torch.no_grad():
        values = chosen.explainer.explain(
            learner.predictor(first.last, after=stream.stages[index].last),
            inputs,
            chosen.background(inputs),
            targets=labels,
            generator=generator(seed, "explain", index),
        ).values
    return {"inputs": inputs, "labels": labels, "values": values}
