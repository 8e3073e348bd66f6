"""Digits in several orders and over several clients, for analytic heads that must not depend on
either.
"""

from functools import cache

import torch

import perdure.federated  # noqa: F401  # first: it lets the warnings of Flower's dependencies pass
from perdure.data.client_splits import dirichlet, iid
from perdure.data.datasets.digits import digits
from perdure.data.scenarios import split
from perdure.federated import Federation, run_federation
from perdure.learner.learner import Learner
from perdure.models.frozen import frozen
from perdure.models.random_convolutions import RandomConvolutions
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive

FIRST = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
SECOND = (7, 3, 9, 0, 5, 2, 8, 6, 1, 4)


@cache
def data():
    return digits()


def stream_of(order=FIRST, experiences=5):
    return split(data(), scenario="class", experiences=experiences, class_order=order)


def learner_of(strategy, privacy=None, **changes):
    model = frozen(
        RandomConvolutions(filters=12, size=3, pool=2), input_shape=(1, 8, 8), num_classes=10
    )
    options = {"optimizer": torch.optim.SGD, "iterations": 3, "privacy": privacy} | changes
    return Learner(model=model, strategy=strategy, **options)


def alone(strategy, stream=None, **changes):
    """Return a learner trained on the whole stream."""
    learner = learner_of(strategy, **changes)
    learner.fit(stream or stream_of())
    return learner


def logits(learner):
    """Return the logits of all test records after the last experience."""
    last = len(learner.stream) - 1
    with torch.no_grad():
        return learner.predictor(0, after=last)(data().test.inputs)


def accuracy(learner):
    return float((logits(learner).argmax(1) == data().test.labels).double().mean())


def everything():
    """Return (features, labels) of all training records, by the frozen model."""
    learner = learner_of(Naive())
    records = data().train
    with torch.no_grad():
        return learner.model.features(records.inputs).double(), records.labels


def features_of_tests():
    with torch.no_grad():
        return learner_of(Naive()).model.features(data().test.inputs).double()


def difference(strategy):
    """Return the largest relative difference of logits between one learner and other orders, splits
    and federations.
    """
    base = logits(alone(strategy))
    learners = [
        alone(strategy, stream_of(SECOND)),
        alone(strategy, stream_of(SECOND, experiences=2)),
        alone(strategy, stream_of(experiences=10)),
    ]
    for streams in (
        iid(stream_of(), clients=3),
        dirichlet(stream_of(SECOND), clients=4, alpha=0.3),
    ):
        federation = Federation(clients=len(streams), rounds=2)
        learners.append(
            run_federation(lambda _: learner_of(strategy, blocks=2), streams, federation).learner
        )
    return max(
        float((logits(learner) - base).abs().max() / base.abs().max()) for learner in learners
    )


SIMULATED = Privacy(epsilon=8.0, seed=1)
