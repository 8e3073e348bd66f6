"""Analytic heads over clients equal the heads of all records at one place (AFL, He et al. 2025)."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from perdure.federated import Federation, run_federation
from perdure.learner.learner import Learner
from perdure.models import frozen
from perdure.strategies import NCM, SLDA, RanPAC

HEADS = [NCM(), SLDA(shrinkage=0.1), RanPAC(ridge=1.0, projection=12)]


def by_class(records):
    """Give every client the records of one class of each experience only."""
    return records.labels % 2


def one_each(records):
    """Give every client but the last a single record of each experience."""
    return torch.arange(len(records)).clamp(max=3)


def at_random(records):
    """Give every record to a random client."""
    return torch.randint(4, (len(records),), generator=torch.Generator().manual_seed(7))


def parts(stream, client_of):
    """Split a stream over clients, by a function from records to the numbers of their clients."""
    return [
        replace(
            stream,
            experiences=tuple(
                replace(e, train=e.train.take(torch.nonzero(client_of(e.train) == client)[:, 0]))
                for e in stream
            ),
        )
        for client in client_of(stream[0].train).unique().tolist()
    ]


def learner_of(strategy, stream):
    """Return a learner whose features are the inputs, so that no sum of floats precedes them."""
    model = frozen(nn.Identity(), input_shape=stream.input_shape, num_classes=stream.num_classes)
    return Learner(model=model, strategy=strategy, optimizer=torch.optim.SGD, iterations=1)


@pytest.mark.parametrize("client_of", [by_class, one_each, at_random], ids=lambda f: f.__name__)
@pytest.mark.parametrize("strategy", HEADS, ids=lambda s: s.name)
def test_one_round_over_clients_gives_the_centralised_head(strategy, client_of, toy_stream):
    stream = toy_stream()
    central = learner_of(strategy, stream)
    central.fit(stream)
    streams = parts(stream, client_of)
    asked = []
    server = run_federation(
        lambda _: learner_of(strategy, stream),
        streams,
        Federation(clients=len(streams), rounds=1, quorum=1.0),
        listen=lambda message: asked.append(message.metadata.message_type),
    )
    assert server.learner.matrix == central.matrix
    # RanPAC projects in float32, and on some processors a product of few rows rounds differently
    bound = 1e-6 if isinstance(strategy, RanPAC) else 1e-9
    for name, value in central.state.items():
        found = server.learner.state[name]
        torch.testing.assert_close(found, value, rtol=bound, atol=bound)
    # the sums of a client travel once per experience, and once more with the reply
    assert asked.count("train.finish") == 2 * len(streams) * len(stream)
