"""State that is combined after every round: its transport, its mean, and hostile replies."""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from helpers.federations import maker, outcome, short
from helpers.hostile_clients import serve, without
from perdure.contract import State
from perdure.data.client_splits import dirichlet
from perdure.federated import Federation
from perdure.federated.state_merging import combine, combine_round, sent_every_round
from perdure.strategies import Scaffold

FEDERATION = Federation(clients=4, rounds=2)


@pytest.fixture(scope="module")
def parties(stream):
    streams = dirichlet(short(stream, 1), clients=4, alpha=5.0, min_size=8, exact=False)
    return maker(stream, Scaffold(), iterations=2, blocks=1), streams


def state(value, *, rule="round_mean"):
    own = State().declare("control", torch.tensor([value]), rule)
    return own.declare("own", torch.tensor([7.0]), "local")


def test_the_mean_is_over_all_clients_of_the_federation():
    old = sent_every_round(state(1.0))
    new = combine_round(old, [state(3.0), state(5.0)], clients=4)
    assert new["control"].item() == 1.0 + (2.0 + 4.0) / 4
    assert set(new) == {"control"}


def test_a_consolidation_leaves_the_state_of_the_last_round():
    ended = combine(state(1.0), [state(3.0), state(5.0)], [1, 1])
    assert ended["control"].item() == 1.0


def spoil(change):
    def spoiler(reply, message):
        if "state" in reply.content:
            own = {name: array.numpy() for name, array in reply.content["state"].items()}
            reply.content["state"] = change(own)
        return reply

    return spoiler


def record(change):
    return lambda own: ArrayRecord({name: Array(change(array)) for name, array in own.items()})


def dropped(reply, message):
    if "state" in reply.content:
        del reply.content["state"]
    return reply


HOSTILE = {
    "nan": (spoil(record(lambda a: a * np.float32(np.nan))), "NaN, infinite"),
    "x1e23": (spoil(record(lambda a: a * np.float32(1e23) + np.float32(1e20))), "above"),
    "shape": (spoil(record(lambda a: a[None])), "has shape"),
    "int64": (spoil(record(lambda a: a.astype(np.int64))), "int64"),
    "names": (spoil(lambda own: ArrayRecord({"x": Array(np.zeros(1))})), "the model's own names"),
    "dropped": (dropped, "has the records"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_state_of_a_round_is_rejected(parties, case):
    make, streams = parties
    spoiler, told = HOSTILE[case]
    gone = outcome(serve(make, streams, FEDERATION, without).learner)
    server = serve(make, streams, FEDERATION, spoiler)
    assert outcome(server.learner) == gone
    assert {each.client for each in server.absences} == {1}
    assert all(told in each.reason for each in server.absences), server.absences[0].reason
