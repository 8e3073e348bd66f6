"""The number of rows that pass through the body of a model in one step of each method."""

from functools import partial

import pytest
import torch

from perdure.learner.learner import Learner
from perdure.strategies import (
    MIR,
    OGD,
    CWRStar,
    FeatureDistillation,
    LwF,
    Naive,
    PackNet,
    Replay,
    RWalk,
)

NEW = 8
"""Rows of a batch."""
STORED = 8
CANDIDATES = 6
CHOSEN = 2

NEEDED = {
    # strategy: rows of each pass in the second experience, and whether it has a gradient
    "naive": (Naive(), [(NEW, True)]),
    "cwr_star": (CWRStar(), [(NEW, True)]),
    "feature_distillation": (FeatureDistillation(strength=1.0), [(NEW, True), (NEW, False)]),
    "lwf": (LwF(), [(NEW, True), (NEW, False)]),
    "mir": (
        MIR(memory_size=20, candidates=CANDIDATES, batch_size=CHOSEN),
        [(NEW, True), (CANDIDATES, False), (CANDIDATES, False), (CHOSEN, True)],
    ),
    "ogd": (OGD(directions=4), [(NEW, True)]),
    "packnet": (PackNet(), [(NEW, True)]),
    "replay": (Replay(memory_size=24), [(NEW + STORED, True)]),
    "rwalk": (RWalk(strength=1.0), [(NEW, True)]),
}


def passes_of(strategy, stream, model, experience):
    """Return the rows of every pass through the body in one step of an experience."""
    learner = Learner(
        model=model,
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.01),
        iterations=3,
        batch_size=NEW,
    )
    learner.prepare(stream)
    for index in range(experience):
        learner.begin(index)
        learner.train(range(3))
        learner.finish()
    learner.begin(experience)
    learner.train(range(2))
    seen = []
    model.body[1].register_forward_hook(
        lambda _, entered, left: seen.append((len(left), left.requires_grad))
    )
    learner.train(range(2, 3))
    return seen


@pytest.mark.parametrize("name", NEEDED)
def test_each_strategy_passes_only_the_rows_that_a_step_needs(name, toy_stream, toy_model):
    strategy, needed = NEEDED[name]
    stream = toy_stream()
    found = passes_of(strategy, stream, toy_model(stream), 1)
    assert sorted(found) == sorted(needed)


@pytest.mark.parametrize("name", ["cwr_star", "feature_distillation", "ogd", "packnet", "rwalk"])
def test_a_step_of_the_first_experience_is_one_forward_pass(name, toy_stream, toy_model):
    stream = toy_stream()
    assert passes_of(NEEDED[name][0], stream, toy_model(stream), 0) == [(NEW, True)]
