"""Clients that learn digits, a federation that stores every kind of state, and comparisons of
outcomes.
"""

from dataclasses import replace
from functools import partial

import torch
from flwr.serverapp.strategy import FedAdam

from perdure.data.client_splits import dirichlet
from perdure.federated import Federation
from perdure.learner.learner import Learner
from perdure.models.classifiers import mlp
from perdure.privacy.settings import Privacy

SIMULATED = Privacy(noise_multiplier=1.0, seed=5)


def maker(stream, strategy, **changes):
    """Return a function from a client's number to a learner of a small MLP, equal for all
    clients.
    """
    default = {
        "optimizer": partial(torch.optim.Adam, lr=2e-3),
        "iterations": 7,
        "blocks": 3,
        "batch_size": 16,
    }

    def make(number):
        model = mlp(input_shape=stream.input_shape, num_classes=10, hidden=(16,), seed=3)
        return Learner(**{"model": model, "strategy": strategy, "seed": 11} | default | changes)

    return make


def short(stream, experiences=3):
    return replace(stream, experiences=stream.experiences[:experiences])


def outcome(learner):
    """Return all values that must be bit-identical."""
    tensors = {f"model.{n}": t for n, t in learner.model.state_dict().items()}
    tensors |= {
        f"state.{n}": t for n, t in learner.state.items() if learner.state.rules[n] != "local"
    }
    return {name: value.numpy().tobytes() for name, value in tensors.items()}, learner.matrix


def without_spending(result):
    """Copy a result without its charges: sites of a deployment report them without purposes."""
    if isinstance(result, dict):
        return {k: without_spending(v) for k, v in result.items() if k != "spending"}
    return list(map(without_spending, result)) if isinstance(result, list) else result


def hard(stream):
    """Return streams and a federation with optimiser moments, memory and idle clients."""
    streams = dirichlet(short(stream, 2), clients=4, alpha=0.5, min_size=8, exact=False)
    aggregator = FedAdam(eta=0.02, beta_1=0.9, beta_2=0.99)
    return streams, Federation(
        clients=4, rounds=3, fraction=0.5, aggregator=aggregator, seed=2, quorum=1.0
    )
