"""Attendance: the clients of each exchange, the last exchange with each client, and the cost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.federations import SIMULATED, maker, outcome, short
from perdure.data.client_splits import dirichlet
from perdure.federated import Federation, run_federation
from perdure.federated.attendance import Attendance
from perdure.federated.client_store import FRESH
from perdure.strategies import DER, EWC, LwF, Naive, Replay


@settings(max_examples=30, deadline=None)
@given(
    clients=st.integers(1, 6),
    rounds=st.integers(1, 4),
    fraction=st.floats(0.1, 1.0),
    seed=st.integers(0, 99),
    everyone=st.booleans(),
)
@pytest.mark.property
def test_the_last_exchange_with_each_client_is_recorded(clients, rounds, fraction, seed, everyone):
    federation = Federation(clients=clients, rounds=rounds, fraction=fraction, seed=seed)
    attendance = Attendance(federation, lambda _: everyone)
    last = [FRESH] * clients
    for exchange in range(3 * (rounds + 1)):
        assert attendance.exchange == exchange
        assert attendance.previous == last
        experience, number = divmod(exchange, rounds + 1)
        drawn = [federation.cohort(experience, earlier) for earlier in range(rounds)]
        closing = range(clients) if everyone else sorted({c for one in drawn for c in one})
        asked = list(closing if number == rounds else drawn[number])
        assert attendance.asked == asked
        for client in asked:
            last[client] = exchange
        attendance.advance(asked)


def test_attendance_draws_the_clients_of_each_round_once(monkeypatch):
    drawn = []
    cohort = Federation.cohort

    def counted(self, experience, number, holds):
        drawn.append((experience, number))
        return cohort(self, experience, number, holds)

    monkeypatch.setattr(Federation, "cohort", counted)
    attendance = Attendance(Federation(clients=9, rounds=40, fraction=0.3), lambda _: False)
    for _ in range(2 * 41):
        assert attendance.asked is not None
        assert attendance.previous is not None
        attendance.advance(attendance.asked)
    assert drawn == [(e, number) for e in range(2) for number in range(40)]


def asked_to_consolidate(stream, strategy, *, folder=None, privacy=None):
    """Return the clients of each consolidation among five clients, two per round, and the
    outcome.
    """
    streams = dirichlet(short(stream, 2), clients=5, alpha=1.0, min_size=8, exact=False)
    federation = Federation(clients=5, rounds=1, fraction=0.4, seed=3)
    asked = []

    def listen(message):
        if message.metadata.message_type == "train.finish" and message.metadata.src_node_id == 0:
            asked.append(message.content["task"]["experience"])

    make = maker(stream, strategy, privacy=privacy, iterations=3, blocks=1)
    server = run_federation(make, streams, federation, folder=folder, listen=listen)
    return [asked.count(experience) for experience in range(2)], outcome(server.learner)


@pytest.mark.parametrize(
    "strategy,number",
    [
        (Naive(), 2),
        (Replay(memory_size=30), 2),
        (EWC(strength=1.0), 5),
        (LwF(), 5),
        (DER(memory_size=30), 5),
        (Replay(memory_size=30, selection="herding"), 5),
    ],
    ids=["naive", "replay", "ewc", "lwf", "der", "herding"],
)
def test_untrained_clients_consolidate_only_if_they_have_state(stream, strategy, number):
    counts, _ = asked_to_consolidate(stream, strategy)
    assert counts == [number] * 2


def twin(**hooks):
    """Return Replay under another name, on which the noise depends, with the given hooks."""
    return type("Twin", (Replay,), {"__module__": __name__, **hooks})(memory_size=30)


def unchanged(self, curator, params, state):
    return state


@pytest.mark.parametrize("privacy", [None, SIMULATED], ids=["plain", "private"])
def test_a_left_out_client_catches_up_to_identical_results(stream, tmp_path, privacy):
    """Its memory contains records of experiences that it did not train on, as if it had been
    asked.
    """
    (few, one), (every, other) = (
        asked_to_consolidate(stream, strategy, privacy=privacy, folder=tmp_path / name)
        for name, strategy in {"few": twin(), "every": twin(after_experience=unchanged)}.items()
    )
    assert (few, every) == ([2] * 2, [5] * 2)
    assert one == other
    ledgers = sorted((tmp_path / "few").glob("clients/*/ledger.jsonl"))
    assert bool(ledgers) == (privacy is not None)
    for ledger in ledgers:
        all_asked = tmp_path / "every" / ledger.relative_to(tmp_path / "few")
        assert ledger.read_text() == all_asked.read_text()


def test_a_resumed_federation_restores_its_attendance(stream, tmp_path):
    streams = dirichlet(short(stream, 2), clients=5, alpha=1.0, min_size=8, exact=False)
    federation = Federation(clients=5, rounds=2, fraction=0.4, seed=3)
    make = maker(stream, Replay(memory_size=30), iterations=4, blocks=1)
    whole = outcome(run_federation(make, streams, federation).learner)

    def stop(point, server):
        if point == "round.end" and server.exchange in stops:
            stops.remove(server.exchange)
            raise KeyboardInterrupt

    stops = [0, 4]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_federation(make, streams, federation, folder=tmp_path, callbacks=[stop])
    last = run_federation(make, streams, federation, folder=tmp_path)
    assert outcome(last.learner) == whole


def test_an_idle_client_keeps_no_gradient_and_shares_parameters(stream):
    """It keeps only its own copy of the model."""
    streams = dirichlet(short(stream, 1), clients=3, alpha=5.0, min_size=8)
    learners = {}
    plain = maker(stream, Naive(), iterations=3, blocks=1)

    def make(client):
        learners[client] = plain(client)
        return learners[client]

    run_federation(make, streams, Federation(clients=3, rounds=2))
    clients = [learners[client] for client in range(3)]
    assert all(param.grad is None for each in clients for param in each.model.parameters())
    began = [each.session.initial for each in clients]
    assert began[0].keys() == dict(clients[0].model.state_dict()).keys()
    for name, value in began[0].items():
        assert all(other[name] is value for other in began[1:])
    own = [each.model.head.weight.data_ptr() for each in clients]
    assert len(set(own)) == 3
