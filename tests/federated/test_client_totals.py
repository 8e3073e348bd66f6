"""Participation, bytes and accuracy of every client of a federation."""

from dataclasses import replace
from statistics import fmean

import pytest
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

from helpers.federations import SIMULATED, hard, maker, short
from perdure.adversarial import PGD, robustness_by_client
from perdure.data import iid
from perdure.errors import FederationError, LedgerError, RunawayError
from perdure.federated import Federation, run_federation
from perdure.federated.absences import Absence, require_quorum
from perdure.federated.client_accuracy import accuracy_over_clients, own_robustness
from perdure.federated.client_totals import tensor_bytes
from perdure.federated.held_arrays import held
from perdure.strategies import Naive, Replay


class StoppedError(Exception):
    pass


def counted(server):
    """Return the counts of all clients without seconds."""
    return [replace(each, seconds=0.0) for each in server.clients]


def own_tests(streams):
    """Return the streams, in which every client has test records of its own."""
    found = []
    for client, stream in enumerate(streams):
        parts = [
            replace(each, test=each.test.take(torch.arange(client, len(each.test), len(streams))))
            for each in stream
        ]
        found.append(replace(stream, experiences=tuple(parts)))
    return found


def test_bytes_are_counted_alike_however_they_are_carried():
    tensors = {"weight": torch.randn(3, 5), "count": torch.arange(4), "scalar": torch.tensor(2.0)}
    plain = ArrayRecord({name: Array(value.numpy()) for name, value in tensors.items()})
    for record in (held(tensors), plain):
        content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 3})})
        assert tensor_bytes(content) == 15 * 4 + 4 * 8 + 4


def test_bytes_of_a_damaged_array_are_not_negative():
    broken = Array("float32", (2, 2), "numpy.ndarray", b"\xff" * 12)
    assert tensor_bytes(RecordDict({"arrays": ArrayRecord({"x": broken})})) == 0


def test_every_client_has_its_participation_and_bytes(stream):
    streams = iid(short(stream, 2), clients=3, min_size=8, exact=False)

    def failing(point, learner):
        if point == "block.begin" and learner.client == 1 and learner.position.experience == 1:
            raise FederationError("the disk of this client is full")

    make = maker(stream, Naive(), callbacks=[failing])
    server = run_federation(make, streams, Federation(clients=3, rounds=2))
    size = sum(value.nbytes for value in server.learner.model.state_dict().values())
    kept, failed, _ = counted(server)
    assert (kept.asked, kept.accepted) == (6, 6)
    assert (kept.bytes_sent, kept.bytes_received) == (6 * size, 4 * size)
    assert (failed.asked, failed.accepted) == (5, 3)
    # without a folder it has no state after its failure, and is asked once more to begin anew
    assert (failed.bytes_sent, failed.bytes_received) == (6 * size, 2 * size)
    assert all(each.seconds > 0 for each in server.clients)


def test_accuracy_is_measured_on_the_test_records_of_each_client(stream):
    streams = own_tests(iid(short(stream, 2), clients=3, min_size=8, exact=False))
    server = run_federation(maker(stream, Naive()), streams, Federation(clients=3, rounds=1))
    by_hand = [fmean(server.learner.evaluate(each)) for each in streams]
    assert server.client_accuracies() == pytest.approx(by_hand)
    assert len(set(by_hand)) > 1


def test_accuracy_covers_only_the_held_experiences(stream):
    first, second = iid(short(stream, 2), clients=2, min_size=8, exact=False)
    left = replace(second, experiences=second.experiences[:1])
    server = run_federation(maker(stream, Naive()), [first, left], Federation(clients=2, rounds=1))
    row = server.learner.matrix[-1]
    assert server.client_accuracies() == pytest.approx([fmean(row), row[0]])


def test_accuracy_under_attack_is_that_of_each_clients_records(stream):
    streams = iid(short(stream, 2), clients=3, min_size=8, exact=False)
    streams = [*own_tests(streams)[:2], replace(streams[2], experiences=streams[2].experiences[:1])]
    server = run_federation(maker(stream, Naive()), streams, Federation(clients=3, rounds=1))
    attack = PGD(epsilon=0.5, steps=2, random_start=False, bounds=(-100.0, 100.0))

    def by_hand(tests):
        cards = [
            robustness_by_client(
                server.learner.predictor(n, after=1), [each.test], attack, generator=None
            )[0]
            for n, each in enumerate(tests)
        ]
        return [card.robust_accuracy for card in cards]

    known = by_hand(server.learner.stream)
    found = own_robustness(server.learner, server.tests, server.sizes, attack, known=known, seed=0)
    own = [fmean(by_hand(each)) for each in streams[:2]]
    assert found == pytest.approx([*own, known[0]])
    assert own[0] < server.client_accuracies()[0]


def test_the_worst_client_has_the_largest_error_for_losses():
    over = accuracy_over_clients([1.0, None, 3.0], higher_is_better=False)
    assert (over.mean, over.worst, over.spread) == (2.0, 3.0, 1.0)
    assert accuracy_over_clients([1.0, 3.0]).worst == 1.0
    assert accuracy_over_clients([None]) is None


@pytest.mark.parametrize("point", ["round.received", "checkpoint.begin", "checkpoint.end"])
def test_counts_are_the_same_after_a_stop(stream, tmp_path, point):
    streams, federation = hard(stream)
    make = maker(stream, Replay(memory_size=20), privacy=SIMULATED)
    expected = counted(run_federation(make, streams, federation, folder=tmp_path / "whole"))
    passed = 0

    def stop(now, server):
        nonlocal passed
        passed += now == point
        if now == point and passed == 3:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_federation(make, streams, federation, folder=tmp_path / "cut", callbacks=[stop])
    resumed = run_federation(make, streams, federation, folder=tmp_path / "cut")
    assert counted(resumed) == expected
    assert any(each.asked for each in expected)


def test_the_quorum_names_a_client_of_its_own_before_a_rejection():
    ledger = LedgerError("the ledger of client 0 is shorter")
    diverged = RunawayError("client 1 diverged")
    rejected = Absence(exchange=4, client=0, cause="rejected", error=ledger)
    failed = Absence(exchange=4, client=1, cause="failed", error=diverged)
    with pytest.raises(RunawayError, match=r"client 1 diverged.*client 0 \(rejected"):
        require_quorum(1.0, [0, 1, 2], 1, [rejected, failed])
    own = replace(rejected, client=2, cause="failed")
    with pytest.raises(LedgerError):
        require_quorum(1.0, [0, 1, 2], 0, [failed, own])
