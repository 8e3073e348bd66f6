"""Noise of private clients that train in some rounds only, which are public."""

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from helpers.federations import maker, short
from perdure.data.client_splits import dirichlet
from perdure.federated import Federation, InProcessGrid, run_federation
from perdure.federated.client import ClientSessions, app_of
from perdure.federated.client_store import FRESH
from perdure.federated.client_streams import participation
from perdure.federated.messages import shared, to_record
from perdure.privacy import Privacy
from perdure.strategies import EWC, Naive, Replay

TARGET = 8.0
CLIENTS = 4
PRIVATE = Privacy(epsilon=TARGET, delta=1e-4, clip_norm=1.0, seed=3)


@pytest.fixture(scope="module")
def streams(stream):
    return dirichlet(short(stream, 2), clients=CLIENTS, alpha=5.0, min_size=30, exact=False)


def trained(stream, streams, strategy, **changes):
    """Run a private federation; return the epsilon of every client that was asked."""
    learners = {}

    def keep(point, learner):
        learners[learner.client] = learner

    make = maker(stream, strategy, privacy=PRIVATE, callbacks=[keep])
    federation = Federation(clients=CLIENTS, rounds=4, seed=5, **changes)
    run_federation(make, streams, federation)
    return {
        client: learner.session.private_sum.ledger.worst(PRIVATE.delta)[1]
        for client, learner in sorted(learners.items())
    }


@pytest.mark.parametrize(
    "strategy", [Naive(), EWC(strength=1.0), Replay(memory_size=20)], ids=lambda s: s.name
)
@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_clients_spend_the_whole_budget_in_their_rounds(stream, streams, strategy, fraction):
    spent = trained(stream, streams, strategy, fraction=fraction)
    assert len(spent) >= 3
    assert all(0.97 * TARGET < epsilon <= TARGET for epsilon in spent.values()), spent


def test_participation_names_the_rounds_of_the_cohorts(streams):
    federation = Federation(clients=CLIENTS, rounds=5, fraction=0.5, seed=2)
    of = participation(federation, streams)
    for client in range(CLIENTS):
        assert of(client).rounds == 5
        for experience, taken in enumerate(of(client).taken):
            cohorts = [federation.cohort(experience, number) for number in range(5)]
            assert taken == {n for n, cohort in enumerate(cohorts) if client in cohort}
    assert participation(Federation(clients=CLIENTS, rounds=5), streams) is None


def test_a_round_that_is_not_in_the_plan_is_refused(stream, streams):
    federation = Federation(clients=CLIENTS, rounds=4, fraction=0.25, seed=5)
    of = participation(federation, streams)
    make = maker(stream, Naive(), privacy=PRIVATE)
    seats = ClientSessions(lambda n: (make(n), streams[n]), None, distinct=True, participation=of)
    client = next(n for n in range(CLIENTS) if 0 < len(of(n).taken[0]) < 4)
    wrong = min(set(range(4)) - of(client).taken[0])
    task = {"experience": 0, "round": wrong, "rounds": 4, "exchange": wrong, "private": 1}
    content = RecordDict(
        {
            "arrays": to_record(shared(make(0).model)),
            "task": ConfigRecord(task | {"previous": FRESH}),
        }
    )
    with InProcessGrid(app_of(seats), CLIENTS).running() as grid:
        (reply,) = grid.send_and_receive([Message(content, client + 1, "train")])
    assert reply.has_error()
    assert f"allowed: rounds {sorted(of(client).taken[0])}" in reply.error.reason
