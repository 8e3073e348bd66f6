"""Federations: one client equals one learner, clients are averaged, rounds follow the seed, and
refusals.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.serverapp.strategy import (
    Bulyan,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
)
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from helpers.federations import SIMULATED, maker, outcome, short
from perdure.data.client_splits import dirichlet, iid
from perdure.errors import ConfigError, FederationError, GuardError, PrivacyError
from perdure.federated import (
    Federation,
    NearestNeighbours,
    Server,
    client_app,
    fit_federated,
    run_federation,
)
from perdure.federated.flower_adapter import InProcessGrid
from perdure.federated.messages import load_shared, shared, to_record
from perdure.learner.learner import Learner
from perdure.strategies import EWC, Combine, Joint, LwF, Naive, Replay

# ------------------------------------------------------------------ one client is the learner alone

ALONE = [
    Naive(),
    EWC(strength=50.0),
    EWC(strength=50.0, mode="online"),
    LwF(),
    Replay(memory_size=40),
    Joint(),
]


@pytest.mark.parametrize("privacy", [None, SIMULATED], ids=["plain", "private"])
@pytest.mark.parametrize("strategy", ALONE, ids=lambda s: f"{s.name}-{getattr(s, 'mode', '')}")
def test_a_federation_of_one_client_equals_one_learner(stream, strategy, privacy):
    stream, make = short(stream), maker(stream, strategy, privacy=privacy)
    alone = make(0)
    alone.fit(stream)
    server = run_federation(make, [stream], Federation(clients=1, rounds=3))
    assert outcome(server.learner) == outcome(alone)
    assert alone.matrix[0][0] > 0


def test_a_folder_changes_neither_the_model_nor_the_ledger(stream, tmp_path):
    stream, make = (
        short(stream, 2),
        maker(stream, Combine(EWC(strength=9.0), Replay(memory_size=30)), privacy=SIMULATED),
    )
    alone = make(0)
    alone.folder = tmp_path / "alone"
    alone.owner = "client-0"  # what a federation calls its only client
    alone.fit(stream)
    server = run_federation(
        make, [stream], Federation(clients=1, rounds=3), folder=tmp_path / "many"
    )
    assert outcome(server.learner) == outcome(alone)
    ledger = (tmp_path / "alone" / "ledger.jsonl").read_text()
    assert (tmp_path / "many" / "clients" / "000" / "ledger.jsonl").read_text() == ledger
    assert ledger.count("gradient") >= 6


def test_rounds_without_steps_charge_nothing(stream, tmp_path):
    stream, make = short(stream, 1), maker(stream, Naive(), privacy=SIMULATED, iterations=2)
    alone = make(0)
    alone.folder = tmp_path / "alone"
    alone.owner = "client-0"  # what a federation calls its only client
    alone.fit(stream)
    server = run_federation(
        make, [stream], Federation(clients=1, rounds=3), folder=tmp_path / "many"
    )
    assert outcome(server.learner) == outcome(alone)
    ledger = (tmp_path / "alone" / "ledger.jsonl").read_text()
    assert (tmp_path / "many" / "clients" / "000" / "ledger.jsonl").read_text() == ledger


@pytest.mark.parametrize("reset", [False, True])
def test_momentum_and_schedule_continue_over_rounds(stream, reset):
    make = maker(
        stream,
        Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
        reset_optimizer=reset,
        scheduler=lambda optimizer, steps: CosineAnnealingLR(optimizer, T_max=steps),
    )
    stream = short(stream, 2)
    alone = make(0)
    alone.fit(stream)
    assert outcome(
        run_federation(make, [stream], Federation(clients=1, rounds=3)).learner
    ) == outcome(alone)


class Normed(nn.Module):
    """A classifier with running statistics and a counter."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12))
        self.feature_size = 12
        self.head = nn.Linear(12, 10)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def normed(number):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Normed()
    return Learner(
        model=model,
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=6,
        blocks=2,
    )


def test_batch_counters_stay_local_and_running_means_are_shared(stream):
    stream = short(stream, 2)
    alone = normed(0)
    alone.fit(stream)
    server = run_federation(normed, [stream], Federation(clients=1, rounds=2))
    assert "body.2.num_batches_tracked" not in shared(server.learner.model)
    assert int(server.learner.model.body[2].num_batches_tracked) == 0
    assert torch.equal(server.learner.model.body[2].running_mean, alone.model.body[2].running_mean)
    assert server.learner.matrix == alone.matrix
    two = run_federation(
        normed, dirichlet(stream, clients=2, alpha=1.0), Federation(clients=2, rounds=2)
    )
    assert np.isfinite(two.learner.matrix).all()


@pytest.mark.parametrize("aggregator", [FedAdam(eta=0.5), FedAvgM(server_momentum=0.9)])
def test_an_aggregator_averages_buffers_and_never_steps_them(stream, aggregator):
    streams = dirichlet(short(stream, 1), clients=2, alpha=5.0, min_size=8)
    received = []

    def listen(message):
        if message.metadata.message_type == "train" and message.metadata.src_node_id:
            received.append(message.content["arrays"]["body.2.running_var"].numpy())

    federation = Federation(clients=2, rounds=2, aggregator=aggregator)
    server = run_federation(normed, streams, federation, listen=listen)
    sizes = [each[0].train.declared_size for each in streams]
    mean = sum(n * each for n, each in zip(sizes, received[-2:], strict=True)) / sum(sizes)
    found = server.learner.model.body[2].running_var
    assert found.min() > 0
    np.testing.assert_allclose(found.numpy(), mean, rtol=1e-6)


def test_bulyan_collects_no_garbage_for_each_reply(stream, monkeypatch):
    """Flower collects it for each reply, which takes seconds in a process with torch."""
    calls = []
    monkeypatch.setattr("flwr.app.message.arrayrecord.gc.collect", lambda: calls.append(1))
    streams = iid(short(stream, 1), clients=7, min_size=4)
    make = maker(stream, Naive(), iterations=1, blocks=1)
    for steps in ([], [NearestNeighbours(hostile=1)]):
        federation = Federation(
            clients=7,
            rounds=1,
            aggregator=Bulyan(num_malicious_nodes=1),
            pre_aggregators=steps,
        )
        assert run_federation(make, streams, federation).learner.matrix
    assert not calls


# --------------------------------------------------------------------------- many clients


def test_ten_clients_repeat_exactly_with_and_without_a_folder(stream, tmp_path):
    streams = dirichlet(short(stream, 2), clients=10, alpha=0.5, min_size=8)
    make = maker(
        stream, EWC(strength=50.0), iterations=10, optimizer=partial(torch.optim.Adam, lr=0.02)
    )
    federation = Federation(clients=10, rounds=2)
    first, again = (run_federation(make, streams, federation) for _ in range(2))
    disk = run_federation(make, streams, federation, folder=tmp_path)
    assert outcome(first.learner) == outcome(again.learner) == outcome(disk.learner)
    assert first.learner.matrix[0][0] > 90


def test_a_round_averages_parameters_by_declared_sizes(stream):
    """The expected parameters come from a direct loop over learners."""
    streams = dirichlet(short(stream, 1), clients=3, alpha=0.5, min_size=8)
    make = maker(stream, Naive(), iterations=4, blocks=1)
    models = []
    weights = []
    for number, own in enumerate(streams):
        learner = make(number)
        learner.client = number
        learner.fit(own)
        models.append(learner.model.state_dict())
        weights.append(own[0].train.declared_size)
    server = run_federation(make, streams, Federation(clients=3, rounds=1))
    for name, value in server.learner.model.state_dict().items():
        mean = sum(w * m[name].double() for w, m in zip(weights, models, strict=True)) / sum(
            weights
        )
        torch.testing.assert_close(value, mean.float(), atol=1e-6, rtol=1e-5)


def test_fisher_information_is_the_weighted_mean_over_clients(stream):
    """The expected values are the releases of each client alone at the same global parameters."""
    streams = dirichlet(short(stream, 1), clients=3, alpha=0.5, min_size=8)
    make = maker(stream, EWC(strength=1.0), iterations=4, blocks=1)
    server = run_federation(make, streams, Federation(clients=3, rounds=1))
    total = sum(s[0].train.declared_size for s in streams)
    expected = 0.0
    for number, own in enumerate(streams):
        learner = make(number)
        learner.prepare(own)
        learner.begin(0)
        load_shared(learner.model, shared(server.learner.model))
        learner.finish()
        expected = (
            expected
            + own[0].train.declared_size / total * learner.state["fisher/head.weight"].double()
        )
    torch.testing.assert_close(
        server.learner.state["fisher/head.weight"], expected.float(), atol=1e-8, rtol=1e-4
    )
    for name, value in server.learner.model.named_parameters():
        fisher = server.learner.state[f"fisher/{name}"]
        torch.testing.assert_close(
            server.learner.state[f"pull/{name}"], fisher * value.detach(), atol=1e-9, rtol=1e-4
        )


@pytest.mark.parametrize(
    "aggregator", [FedAvg(), FedAdam(eta=0.05), FedAvgM(server_momentum=0.5), FedMedian()]
)
def test_aggregators_accept_fewer_nodes_than_their_defaults(stream, aggregator):
    streams = dirichlet(short(stream, 1), clients=2, alpha=5.0, min_size=8)
    federation = Federation(clients=2, rounds=2, fraction=0.5, aggregator=aggregator)
    matrix = fit_federated(maker(stream, Naive()), streams, federation)
    assert matrix.shape == (1, 1)
    assert matrix.dtype == torch.float64
    assert float(matrix) > 0
    assert aggregator.min_available_nodes == 2


# --------------------------------------------------------------------------- sampling


def test_the_clients_of_a_round_depend_only_on_the_seed():
    federation = Federation(clients=10, rounds=4, fraction=0.3, seed=1)
    torch.manual_seed(0)
    cohorts = [federation.cohort(e, r) for e in range(5) for r in range(4)]
    torch.manual_seed(99)
    assert cohorts == [federation.cohort(e, r) for e in range(5) for r in range(4)]
    assert all(len(set(c)) == 3 and c == sorted(c) and set(c) <= set(range(10)) for c in cohorts)
    assert len({tuple(c) for c in cohorts}) > 10
    assert set().union(*cohorts) == set(range(10))
    assert cohorts != [replace(federation, seed=2).cohort(e, r) for e in range(5) for r in range(4)]
    assert Federation(clients=10, rounds=1, fraction=0.01).cohort(0, 0) == federation_of_one(10)


def federation_of_one(clients):
    return Federation(clients=clients, rounds=1, fraction=1 / clients).cohort(0, 0)


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "changes,error,text",
    [
        ({"clients": 0}, ConfigError, "federation.clients = 0"),
        ({"rounds": 0}, ConfigError, "federation.rounds = 0"),
        ({"fraction": 0.0}, ConfigError, "federation.fraction = 0.0"),
        ({"fraction": 1.5}, ConfigError, "federation.fraction = 1.5"),
        ({"mode": "secure"}, PrivacyError, "federation.mode = 'secure'"),
        ({"mode": "central"}, PrivacyError, "federation.mode = 'central'"),
        ({"aggregator": FedProx()}, ConfigError, "FedProx is not allowed: its proximal term"),
        (
            {"aggregator": DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2)},
            ConfigError,
            "from the ledger",
        ),
    ],
)
def test_an_invalid_federation_is_refused_in_one_line(changes, error, text):
    with pytest.raises(error, match=text) as caught:
        Federation(**{"clients": 2, "rounds": 2, **changes})
    assert "\n" not in str(caught.value)


def test_run_federation_refuses_wrong_streams_engine_or_folder(stream):
    make = maker(stream, Naive())
    federation = Federation(clients=2, rounds=1)
    with pytest.raises(
        ConfigError, match="streams = 1 is not allowed; allowed: one for each of 2 clients"
    ):
        run_federation(make, [stream], federation)
    with pytest.raises(ConfigError, match="engine = 'dask'"):
        run_federation(make, [stream] * 2, federation, engine="dask")
    with pytest.raises(ConfigError, match="folder = None"):
        run_federation(make, [stream] * 2, federation, engine="ray")


def test_an_aggregator_failure_is_a_federation_error(stream):
    with pytest.raises(FederationError, match=r"aggregator FedAvg failed: .*`participants`"):
        fit_federated(
            maker(stream, Naive()),
            [short(stream, 1)],
            Federation(clients=1, rounds=1, aggregator=FedAvg(weighted_by_key="participants")),
        )


def test_a_result_that_is_not_finite_never_becomes_the_model(stream):
    class Overflowing(FedAvg):
        def aggregate_train(self, server_round, replies):
            result, metrics = super().aggregate_train(server_round, replies)
            return to_record({n: each * torch.inf for n, each in tensors_in(result)}), metrics

    def tensors_in(record):
        return ((name, torch.from_numpy(array.numpy())) for name, array in record.items())

    own = short(stream, 1)
    make = maker(stream, Naive(), iterations=1, blocks=1)
    federation = Federation(clients=1, rounds=1, aggregator=Overflowing())
    server = Server(learner=make(0), stream=own, federation=federation)
    app = client_app(lambda number: (make(number), own))
    told = "aggregator Overflowing returned NaN or infinite numbers in "
    with (
        InProcessGrid(app, 1).running() as grid,
        pytest.raises(FederationError, match=told),
    ):
        server.serve(grid)
    assert all(each.isfinite().all() for each in server.learner.model.state_dict().values())


def test_the_server_holds_no_training_record(stream):
    server = Server(
        learner=maker(stream, Naive(), privacy=SIMULATED, folder=Path("x"))(0),
        stream=stream,
        federation=Federation(clients=1, rounds=1),
    )
    assert [len(e.train) for e in server.stream] == [0] * 5
    assert [e.train.declared_size for e in server.stream] == [len(e.train) for e in stream]
    assert (server.learner.privacy, server.learner.folder) == (None, None)


@pytest.mark.parametrize("built", ["by run_federation", "by the user's app"])
def test_privacy_refuses_one_record_at_two_clients(stream, built):
    """Each client's ledger counts only its own use of the record, and no ledger counts the sum."""
    one = short(stream, 1)
    make = maker(one, Naive(), privacy=SIMULATED)
    federation = Federation(clients=2, rounds=1, quorum=1.0)
    told = "partition 'experience-0' of client 0 and partition 'experience-0' of client 1 contain"
    if built == "by run_federation":
        with pytest.raises(GuardError, match=told):
            run_federation(make, [one] * 2, federation)
        run_federation(maker(one, Naive(), iterations=1, blocks=1), [one] * 2, federation)
        return
    server = Server(learner=make(0), stream=one, federation=federation)
    app = client_app(lambda client: (make(client), one))
    with pytest.raises(GuardError, match=told), InProcessGrid(app, 2).running() as grid:
        server.serve(grid)


def test_a_federation_prints_the_progress_of_its_exchanges(stream, capsys):
    told = []
    run_federation(
        maker(stream, Naive(), iterations=2, blocks=2),
        dirichlet(short(stream, 1), clients=2, alpha=1.0),
        Federation(clients=2, rounds=2),
        progress=lambda *replies: told.append(replies),
        show_progress=True,
    )
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "training 25 %",
        "training 50 %",
        "training 75 %",
        "training 100 %",
    ]
    assert "experience 1/1, round 2/2, reply 1/2" in lines[1]
    assert "accuracy" in lines[-1]
    assert set(told) == {(1, 2), (2, 2)}
