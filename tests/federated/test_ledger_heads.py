"""Ledger heads of clients at the server, which detects rolled-back clients; a folder belongs to one
federation.
"""

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from flwr.serverapp.strategy import FedAdam

from helpers.federations import SIMULATED, maker, short
from perdure.data.client_splits import iid
from perdure.errors import ConfigError, LedgerError, PrivacyError, RunError
from perdure.federated import Federation, run_federation
from perdure.learner.checkpoint import Store
from perdure.models.classifiers import mlp
from perdure.strategies import EWC, Naive


class StoppedError(RuntimeError):
    pass


@pytest.fixture
def two(stream):
    """Streams of two clients, and their federation."""
    return iid(short(stream, 2), clients=2, min_size=8, exact=False), Federation(
        clients=2, rounds=2, quorum=1.0
    )


@pytest.fixture
def started(stream, two, tmp_path):
    """Start or resume a federation in a folder; stop at the nth call of a point."""

    def run(strategy=None, stop=None, federation=None, streams=None, **changes):
        left = [stop[1]] if stop else [0]

        def callback(point, server):
            if stop and point == stop[0]:
                left[0] -= 1
                if left[0] == 0:
                    raise StoppedError(point)

        options = {"privacy": SIMULATED, "iterations": 2, "blocks": 2} | changes
        make = maker(stream, strategy or Naive(), **options)
        return run_federation(
            make,
            streams or two[0],
            federation or two[1],
            folder=tmp_path / "run",
            callbacks=[callback],
        )

    return run


@pytest.fixture
def stopped(started, tmp_path):
    with pytest.raises(StoppedError):
        started(stop=("checkpoint.end", 4))
    return tmp_path / "run"


def test_the_server_stores_the_ledger_heads_that_clients_report(started, tmp_path):
    server = started()
    for client in (0, 1):
        folder = tmp_path / "run" / "clients" / f"00{client}"
        assert server.heads.texts[str(client)] == (folder / "ledger.head.json").read_text()
    assert Store(tmp_path / "run").load().facts["heads"] == server.heads.texts


@pytest.mark.parametrize("how", ["deleted", "put back"])
def test_the_server_refuses_a_client_with_an_older_ledger(started, stopped, how):
    """The client's checkpoint and copy agree with its ledger, so only the server can detect it."""
    folder = stopped / "clients" / "001"
    kept = stopped.parent / "kept"
    if how == "put back":
        shutil.copytree(folder, kept)
        with pytest.raises(StoppedError):
            started(stop=("checkpoint.end", 1))
    shutil.rmtree(folder)
    if how == "put back":
        shutil.copytree(kept, folder)
        store = Store(folder)
        number = store.numbers()[-1]
        snapshot = store.load(number)
        # as if it had taken part in the exchange that followed
        store.save(number, replace(snapshot, facts={**snapshot.facts, "exchange": 4}))
        with pytest.raises(LedgerError, match=r"client 1: .* the federation's server records"):
            started()
    else:
        with pytest.raises(LedgerError, match=r"client 1: the federation's server records"):
            started()


def test_a_private_federation_cannot_resume_without_privacy(started, stopped):
    with pytest.raises(RunError, match=r"privacy \(given null, stored Privacy\)"):
        started(privacy=None)
    for part in ("checkpoint", "private"):
        shutil.rmtree(stopped / part)
    with pytest.raises(PrivacyError, match=r"client 0: .* has a run with privacy"):
        started(privacy=None)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"strategy": EWC(strength=1.0)}, r"strategy \(given EWC, stored Naive\)"),
        ({"seed": 12}, r"seed \(given 12, stored 11\)"),
        (
            {"optimizer": partial(torch.optim.Adam, lr=0.5)},
            r"optimizer.lr \(given 0.5, stored 0.002\)",
        ),
        (
            {"privacy": replace(SIMULATED, noise_multiplier=3.0)},
            r"privacy.noise_multiplier \(given 3.0, stored 1.0\)",
        ),
        ({"federation": Federation(clients=2, rounds=3)}, r"federation.rounds \(given 3, stored 2"),
        (
            {"federation": Federation(clients=2, rounds=2, aggregator=FedAdam(eta=0.3))},
            r"federation.aggregator \(given FedAdam, stored FedAvg\)",
        ),
    ],
)
def test_the_error_names_the_changed_federation_settings(started, stopped, changes, told):
    with pytest.raises(RunError, match=f"run has a run that differs in .*{told}"):
        started(**changes)


def test_a_resumed_client_with_other_records_is_refused(started, stopped, two, caplog):
    first, second = two[0][1]
    fewer = first.train.take(torch.arange(len(first.train) - 1)).declared(first.train.declared_size)
    streams = [two[0][0], replace(two[0][1], experiences=(replace(first, train=fewer), second))]
    with pytest.raises(Exception, match="client 1 stopped: RunError: see the client's log"):
        started(streams=streams)
    assert "differs in stream.experiences[0]" in caplog.text


def test_a_federation_folder_is_refused_to_a_second_server(started, tmp_path, stream, two):
    def second(point, server):
        with pytest.raises(RunError, match="is in use"):
            started()
        raise StoppedError

    make = maker(stream, Naive(), privacy=SIMULATED, iterations=2, blocks=2)
    with pytest.raises(StoppedError):
        run_federation(make, two[0], two[1], folder=tmp_path / "run", callbacks=[second])


def test_one_model_object_for_all_clients_is_refused(stream, two):
    shared = mlp(input_shape=stream.input_shape, num_classes=10, hidden=(16,), seed=3)
    with pytest.raises(Exception, match="trained already") as refused:
        run_federation(maker(stream, Naive(), model=shared, iterations=2), *two)
    assert "client" in str(refused.value)


def test_the_model_of_a_private_federation_counts_as_trained(started, stream):
    model = started().learner.model
    learner = maker(stream, Naive(), model=model, privacy=SIMULATED)(0)
    with pytest.raises(ConfigError, match="trained by clients, who hold the ledgers"):
        learner.fit(short(stream, 2))
    learner = maker(stream, Naive(), model=model, privacy=SIMULATED, warm_start=True)(0)
    with pytest.raises(PrivacyError, match="trained by clients, who hold the ledgers"):
        learner.fit(short(stream, 2))
