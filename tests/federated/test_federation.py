from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedMedian,
    FedProx,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from perdure.errors import ConfigError, FederationError, PrivacyError, RunError, StrategyError
from perdure.federated import Federation, Server, client_app, combine, dirichlet, fit_federated, run_federation
from perdure.federated.grid import InProcessGrid
from perdure.federated.server import POINTS
from perdure.federated.state import FRESH, from_record, load_shared, recall, remind, shared, to_record
from perdure.learner import Learner
from perdure.models import mlp
from perdure.privacy.policy import Privacy
from perdure.strategies import EWC, Combine, Joint, LwF, Naive, Replay
from perdure.strategy import State

SIMULATED = Privacy(noise_multiplier=1.0, seed=5)


def maker(stream, strategy, **changes):
    """From a client's number to a learner of a small MLP; alike for all clients."""
    default = {"optimizer": partial(torch.optim.Adam, lr=2e-3), "iterations": 7, "blocks": 3, "batch_size": 16}

    def make(number):
        model = mlp(input_shape=stream.input_shape, num_classes=10, hidden=(16,), seed=3)
        return Learner(**{"model": model, "strategy": strategy, "seed": 11} | default | changes)

    return make


def short(stream, experiences=3):
    return replace(stream, experiences=stream.experiences[:experiences])


def outcome(learner):
    """Everything that must come out the same to the bit."""
    tensors = {f"model.{n}": t for n, t in learner.model.state_dict().items()}
    tensors |= {f"state.{n}": t for n, t in learner.state.items() if learner.state.rules[n] != "local"}
    return {name: value.numpy().tobytes() for name, value in tensors.items()}, learner.matrix


# --------------------------------------------------------------------------- one client is the learner alone

ALONE = [Naive(), EWC(strength=50.0), EWC(strength=50.0, mode="online"), LwF(), Replay(memory_size=40), Joint()]


@pytest.mark.parametrize("privacy", [None, SIMULATED], ids=["plain", "private"])
@pytest.mark.parametrize("strategy", ALONE, ids=lambda s: f"{s.name}-{getattr(s, 'mode', '')}")
def test_the_only_client_of_a_federation_gives_the_bits_of_the_learner_alone(stream, strategy, privacy):
    stream, make = short(stream), maker(stream, strategy, privacy=privacy)
    alone = make(0)
    alone.fit(stream)
    server = run_federation(make, [stream], Federation(clients=1, rounds=3))
    assert outcome(server.learner) == outcome(alone)
    assert alone.matrix[0][0] > 0


def test_with_a_folder_it_is_the_same_and_so_is_the_ledger(stream, tmp_path):
    stream, make = (
        short(stream, 2),
        maker(stream, Combine(EWC(strength=9.0), Replay(memory_size=30)), privacy=SIMULATED),
    )
    alone = make(0)
    alone.folder = tmp_path / "alone"
    alone.fit(stream)
    server = run_federation(make, [stream], Federation(clients=1, rounds=3), folder=tmp_path / "many")
    assert outcome(server.learner) == outcome(alone)
    ledger = (tmp_path / "alone" / "ledger.jsonl").read_text()
    assert (tmp_path / "many" / "clients" / "000" / "ledger.jsonl").read_text() == ledger
    assert ledger.count("gradient") >= 6


def test_more_rounds_than_steps_charge_nothing_for_the_empty_ones(stream, tmp_path):
    stream, make = short(stream, 1), maker(stream, Naive(), privacy=SIMULATED, iterations=2)
    alone = make(0)
    alone.folder = tmp_path / "alone"
    alone.fit(stream)
    server = run_federation(make, [stream], Federation(clients=1, rounds=3), folder=tmp_path / "many")
    assert outcome(server.learner) == outcome(alone)
    ledger = (tmp_path / "alone" / "ledger.jsonl").read_text()
    assert (tmp_path / "many" / "clients" / "000" / "ledger.jsonl").read_text() == ledger


@pytest.mark.parametrize("reset", [False, True])
def test_momentum_and_schedule_go_on_over_rounds(stream, reset):
    make = maker(
        stream, Naive(), optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9), reset_optimizer=reset,
        scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9),
    )  # fmt: skip
    stream, alone = short(stream, 2), make(0)
    alone.fit(stream)
    assert outcome(run_federation(make, [stream], Federation(clients=1, rounds=3)).learner) == outcome(alone)


class Normed(nn.Module):
    """A classifier with running statistics and a counter."""

    def __init__(self):
        super().__init__()
        self.body, self.feature_size = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.BatchNorm1d(12)), 12
        self.head = nn.Linear(12, 10)

    def features(self, x):
        return self.body(x)

    def forward(self, x):
        return self.head(self.features(x))


def normed(number):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = Normed()
    return Learner(model=model, strategy=Naive(), optimizer=partial(torch.optim.SGD, lr=0.1), iterations=6, blocks=2)


def test_counters_stay_with_the_client_and_running_statistics_travel(stream):
    stream, alone = short(stream, 2), normed(0)
    alone.fit(stream)
    server = run_federation(normed, [stream], Federation(clients=1, rounds=2))
    assert "body.2.num_batches_tracked" not in shared(server.learner.model)
    assert int(server.learner.model.body[2].num_batches_tracked) == 0
    assert torch.equal(server.learner.model.body[2].running_mean, alone.model.body[2].running_mean)
    assert server.learner.matrix == alone.matrix
    two = run_federation(normed, dirichlet(stream, clients=2, alpha=1.0), Federation(clients=2, rounds=2))
    assert np.isfinite(two.learner.matrix).all()


# --------------------------------------------------------------------------- many clients


def test_ten_clients_give_the_identical_result_twice_with_and_without_a_folder(stream, tmp_path):
    streams = dirichlet(short(stream, 2), clients=10, alpha=0.5, min_size=8)
    make = maker(stream, EWC(strength=50.0), iterations=10, optimizer=partial(torch.optim.Adam, lr=0.02))
    federation = Federation(clients=10, rounds=2)
    first, again = (run_federation(make, streams, federation) for _ in range(2))
    disk = run_federation(make, streams, federation, folder=tmp_path)
    assert outcome(first.learner) == outcome(again.learner) == outcome(disk.learner)
    assert first.learner.matrix[0][0] > 90


def test_a_round_is_the_average_weighted_by_declared_sizes(stream):
    """Against a direct loop over learners."""
    streams = dirichlet(short(stream, 1), clients=3, alpha=0.5, min_size=8)
    make = maker(stream, Naive(), iterations=4, blocks=1)
    models, weights = [], []
    for number, own in enumerate(streams):
        learner = make(number)
        learner.client = number
        learner.fit(own)
        models.append(learner.model.state_dict())
        weights.append(own[0].train.declared_size)
    server = run_federation(make, streams, Federation(clients=3, rounds=1))
    for name, value in server.learner.model.state_dict().items():
        mean = sum(w * m[name].double() for w, m in zip(weights, models, strict=True)) / sum(weights)
        torch.testing.assert_close(value, mean.float(), atol=1e-6, rtol=1e-5)


def test_fisher_information_is_the_weighted_mean_over_clients(stream):
    """Against the release of each client alone at the same global parameters."""
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
        expected = expected + own[0].train.declared_size / total * learner.state["fisher/head.weight"].double()
    torch.testing.assert_close(server.learner.state["fisher/head.weight"], expected.float(), atol=1e-8, rtol=1e-4)
    for name, value in server.learner.model.named_parameters():
        fisher = server.learner.state[f"fisher/{name}"]
        torch.testing.assert_close(server.learner.state[f"pull/{name}"], fisher * value.detach(), atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize("aggregator", [FedAvg(), FedAdam(eta=0.05), FedAvgM(server_momentum=0.5), FedMedian()])
def test_flower_aggregators_work_with_fewer_nodes_than_their_defaults_ask_for(stream, aggregator):
    streams = dirichlet(short(stream, 1), clients=2, alpha=5.0, min_size=8)
    federation = Federation(clients=2, rounds=2, fraction=0.5, aggregator=aggregator)
    matrix = fit_federated(maker(stream, Naive()), streams, federation)
    assert matrix.shape == (1, 1)
    assert matrix.dtype == torch.float64
    assert float(matrix) > 0
    assert aggregator.min_available_nodes == 2


# --------------------------------------------------------------------------- stopping and going on


class StoppedError(RuntimeError):
    pass


def stopping(point, times):
    """A callback that raises at the nth call at `point`."""
    left = [times]

    def callback(at, _):
        if at == point:
            left[0] -= 1
            if left[0] == 0:
                raise StoppedError(point)

    return callback


def hard(stream):
    """A federation with everything that has to be kept: moments everywhere, memory, clients left out."""
    streams = dirichlet(short(stream, 2), clients=4, alpha=0.5, min_size=8)
    aggregator = FedAdam(eta=0.02, beta_1=0.9, beta_2=0.99)
    return streams, Federation(clients=4, rounds=3, fraction=0.5, aggregator=aggregator, seed=2)


STRATEGY = Combine(EWC(strength=20.0), Replay(memory_size=30))


@pytest.fixture(scope="module", params=[None, SIMULATED], ids=["plain", "private"])
def reference(request, stream):
    streams, federation = hard(stream)
    make = maker(stream, STRATEGY, privacy=request.param)
    return request.param, outcome(run_federation(make, streams, federation).learner)


@pytest.mark.parametrize("point", POINTS)
def test_a_server_stopped_anywhere_goes_on_to_the_same_bits(stream, tmp_path, reference, point):
    privacy, expected = reference
    streams, federation = hard(stream)
    make = maker(stream, STRATEGY, privacy=privacy)
    for times in (1, 2):
        with pytest.raises(StoppedError):
            run_federation(make, streams, federation, folder=tmp_path, callbacks=[stopping(point, times)])
    assert outcome(run_federation(make, streams, federation, folder=tmp_path).learner) == expected


CLIENT_POINTS = [
    ("step.gradient", 9), ("block.end", 5), ("experience.consolidated", 3), ("experience.end", 4),
    ("checkpoint.begin", 8), ("checkpoint.end", 7), ("noise.drawn", 20), ("ledger.appended", 25),
]  # fmt: skip


@pytest.mark.parametrize("point,times", CLIENT_POINTS)
def test_a_client_stopped_anywhere_goes_on_to_the_same_bits(stream, tmp_path, reference, point, times):
    privacy, expected = reference
    if privacy is None and point.startswith(("noise", "ledger")):
        point = "step.done"
    streams, federation = hard(stream)
    make = maker(stream, STRATEGY, privacy=privacy, callbacks=[stopping(point, times)])
    with pytest.raises(FederationError, match=r"client \d stopped: StoppedError: "):
        run_federation(make, streams, federation, folder=tmp_path)
    make = maker(stream, STRATEGY, privacy=privacy)
    assert outcome(run_federation(make, streams, federation, folder=tmp_path).learner) == expected


def test_clients_that_outlive_their_server_go_back_to_where_the_next_one_starts(stream, tmp_path, reference):
    privacy, expected = reference
    streams, federation = hard(stream)
    make = maker(stream, STRATEGY, privacy=privacy)
    app = client_app(lambda number: (make(number), streams[number]), tmp_path)

    def server(*callbacks):
        own = {"learner": make(0), "stream": streams[0], "federation": federation, "folder": tmp_path}
        return Server(**own, callbacks=callbacks)

    with InProcessGrid(app, 4).running() as grid:
        for point in ("round.received", "experience.received", "round.received"):
            with pytest.raises(StoppedError):
                server(stopping(point, 2 if "round" in point else 1)).serve(grid)
        last = server()
        last.serve(grid)
    assert outcome(last.learner) == expected


def test_a_finished_run_is_not_run_again(stream, tmp_path):
    streams, federation = hard(stream)
    first = run_federation(maker(stream, Naive()), streams, federation, folder=tmp_path)
    again = run_federation(lambda number: maker(stream, Naive())(number), streams, federation, folder=tmp_path,
                           callbacks=[lambda point, server: pytest.fail(point)])  # fmt: skip
    assert outcome(first.learner) == outcome(again.learner)


def test_another_federation_may_not_take_over_the_folder(stream, tmp_path):
    streams, federation = hard(stream)
    run_federation(maker(stream, Naive()), streams, federation, folder=tmp_path)
    with pytest.raises(RunError, match=r"holds a run of .*'seed': 2"):
        run_federation(maker(stream, Naive()), streams, replace(federation, seed=3), folder=tmp_path)


def test_a_client_that_lost_its_state_says_so(stream, tmp_path):
    streams, federation = hard(stream)
    with pytest.raises(StoppedError):
        run_federation(
            maker(stream, Naive()), streams, federation, folder=tmp_path, callbacks=[stopping("evaluated", 1)]
        )
    for path in (tmp_path / "clients" / "002" / "checkpoint").glob("*"):
        path.unlink()
    with pytest.raises(FederationError, match=r"client 2 stopped: FederationError: no state after exchange \d is kept"):
        run_federation(maker(stream, Naive()), streams, federation, folder=tmp_path)


def test_nothing_on_disk_is_pickled_and_rows_are_private(stream, tmp_path):
    streams, federation = hard(stream)
    run_federation(maker(stream, STRATEGY, privacy=SIMULATED), streams, federation, folder=tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".head", ""}
    assert {path.parent.name for path in files if path.suffix == ".safetensors"} == {"checkpoint", "private"}
    assert sorted(path.name for path in (tmp_path / "clients").iterdir()) == ["000", "001", "002", "003"]
    assert not any(path.name == "key" for path in files)


# --------------------------------------------------------------------------- what a client says


def task(**changes):
    return ConfigRecord({"experience": 0, "round": 0, "rounds": 2, "exchange": 0, "previous": FRESH} | changes)


@pytest.mark.parametrize("kind,records", [("train", {"arrays", "metrics"}), ("train.finish", {"state", "metrics"})])
def test_under_privacy_a_reply_holds_releases_and_declared_numbers_only(stream, kind, records):
    stream = short(stream, 1)
    declared = replace(stream[0].train, declared_size=300)
    stream = replace(stream, experiences=(replace(stream[0], train=declared),))
    make = maker(stream, Combine(EWC(strength=1.0), LwF()), privacy=SIMULATED)
    with InProcessGrid(client_app(lambda number: (make(number), stream)), 1).running() as grid:
        content = RecordDict({"arrays": to_record(shared(make(0).model)), "task": task()})
        (reply,) = grid.send_and_receive([Message(content, 1, kind)])
    assert not reply.has_error(), reply.error
    assert set(reply.content) == records
    assert dict(reply.content["metrics"]) == {"num-examples": 300}
    assert len(stream[0].train) != 300
    if "state" in reply.content:
        assert {name.split("/")[0] for name in reply.content["state"]} == {"0.fisher", "0.pull"}
    else:
        assert list(reply.content["arrays"]) == [name for name, _ in make(0).model.named_parameters()]


def test_combined_state_is_sent_when_a_client_meets_the_experience_and_only_then(stream):
    """A client's own path through an experience must not be overwritten by what the server had at its start."""
    streams, federation = hard(stream)
    make = maker(stream, EWC(strength=1.0))
    app = client_app(lambda number: (make(number), streams[number]))
    seen = []

    def listen(message, context):
        content = message.content
        if "task" in content and len(content["task"]):
            asked = content["task"]
            seen.append(
                (context.node_config["partition-id"], asked["experience"], asked["exchange"], "state" in content)
            )
        return app(message, context)

    with InProcessGrid(listen, 4).running() as grid:
        Server(learner=make(0), stream=streams[0], federation=federation).serve(grid)
    for client in range(4):
        for experience in range(2):
            got = [
                state for number, e, _, state in sorted(seen, key=lambda s: s[2]) if (number, e) == (client, experience)
            ]
            assert got == [True] + [False] * (len(got) - 1)
    trained = [[n for n, _, exchange, _ in seen if exchange == x] for x in range(8)]
    assert [len(cohort) for cohort in trained] == [2, 2, 2, 4, 2, 2, 2, 4]


@pytest.mark.parametrize("privacy,text", [(None, "the label is 'Jane'"), (SIMULATED, "see the client's log")])
def test_a_failing_client_stops_the_run_with_its_name_and_reason(stream, privacy, text):
    streams, federation = hard(stream)

    def fail(point, learner):
        if point == "step.done" and learner.client == 1:
            raise ValueError("the label is 'Jane'\nand more")

    with pytest.raises(FederationError, match=rf"^client 1 stopped: ValueError: {text}$"):
        run_federation(
            maker(stream, Naive(), privacy=privacy, callbacks=[fail]), streams, replace(federation, fraction=1.0)
        )


def test_what_a_clients_privacy_refuses_stops_the_run_as_that(stream):
    class Raw(Naive):
        def after_experience(self, curator, params, state):
            curator.raw("to look at them")
            return state

    streams, federation = hard(stream)
    with pytest.raises(PrivacyError, match=r"^client 0: raw records were asked for"):
        run_federation(maker(stream, Raw(), privacy=SIMULATED), streams, federation)


# --------------------------------------------------------------------------- sampling


def test_cohorts_come_from_the_seed_and_have_their_size():
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


@settings(max_examples=30, deadline=None)
@given(clients=st.integers(1, 6), rounds=st.integers(1, 4), fraction=st.floats(0.1, 1.0), seed=st.integers(0, 99))
@pytest.mark.property
def test_the_previous_exchange_of_a_client_is_the_last_that_asked_it(clients, rounds, fraction, seed):
    federation = Federation(clients=clients, rounds=rounds, fraction=fraction, seed=seed)
    last = [FRESH] * clients
    for exchange in range(3 * (rounds + 1)):
        assert federation.previous(exchange) == last
        experience, number = divmod(exchange, rounds + 1)
        for client in range(clients) if number == rounds else federation.cohort(experience, number):
            last[client] = exchange


# --------------------------------------------------------------------------- states and records


def states(*rows, rule="mean", dtype=torch.float32):
    return [State({"a": torch.tensor(row, dtype=dtype)}, {"a": rule}) for row in rows]


def test_mean_is_weighted_and_sum_adds_increments():
    mean = combine(None, states([1.0, 2.0], [3.0, 6.0]), [1, 3])
    assert mean["a"].tolist() == [2.5, 5.0]
    assert mean.rules == {"a": "mean"}
    (old,) = states([10.0], rule="sum")
    assert combine(old, states([11.0], [14.0], rule="sum"), [1, 99])["a"].tolist() == [15.0]
    assert combine(None, states([11.0], [14.0], rule="sum"), [1, 1])["a"].tolist() == [25.0]
    (old,) = states([1], rule="sum", dtype=torch.int64)
    assert combine(old, states([3], [4], rule="sum", dtype=torch.int64), [1, 1])["a"].tolist() == [6]


def test_local_names_are_not_combined_and_integers_have_no_mean():
    state = State({"a": torch.ones(1), "b": torch.ones(1)}, {"a": "sum", "b": "local"})
    assert list(combine(None, [state, state], [1, 1])) == ["a"]
    with pytest.raises(StrategyError, match=r"'a' is torch\.int64"):
        combine(None, states([1], [2], dtype=torch.int64), [1, 1])


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_one_holder_is_taken_to_the_bit(rule):
    (new,) = states([0.1, -0.0, float("nan"), 1e-45], rule=rule)
    (old,) = states([1e8, 1.0, 1.0, 3.0], rule=rule)
    assert combine(old, [new], [7])["a"].numpy().tobytes() == new["a"].numpy().tobytes()


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=2, max_size=5),
    seed=st.integers(0, 9), rule=st.sampled_from(["sum", "mean"]),
)  # fmt: skip
@pytest.mark.property
def test_combination_does_not_depend_on_the_order_of_clients_and_keeps_what_all_agree_on(rows, seed, rule):
    weights = [float(i + 1) for i in range(len(rows))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    (old,) = states([0.5, 0.25, 2.0], rule=rule)
    one = combine(old, states(*rows, rule=rule), weights)["a"]
    other = combine(old, states(*(rows[i] for i in order), rule=rule), [weights[i] for i in order])["a"]
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-3)
    alike = states(*[rows[0]] * 3)
    assert torch.equal(combine(None, alike, [0.1, 0.7, 3.0])["a"], alike[0]["a"])


def test_records_keep_names_order_dtypes_and_bits():
    tensors = {
        "z": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).T, "a": torch.tensor(3),
        "half": torch.ones(2).half(), "wide": torch.tensor([1e-300], dtype=torch.float64), "none": torch.empty(0, 4),
    }  # fmt: skip
    back = from_record(to_record(tensors))
    assert list(back) == list(tensors)
    assert all(back[n].dtype == t.dtype and torch.equal(back[n], t) for n, t in tensors.items())
    back["z"].zero_()
    assert tensors["z"].abs().sum() > 0
    with pytest.raises(FederationError, match="half is bfloat16"):
        to_record({"half": torch.ones(1, dtype=torch.bfloat16)})


def test_a_model_of_another_shape_is_refused():
    model = nn.Linear(2, 3)
    with pytest.raises(FederationError, match="bias"):
        load_shared(model, {"weight": torch.zeros(3, 2)})
    with pytest.raises(FederationError, match="weight"):
        load_shared(model, {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)})


@pytest.mark.parametrize("value,kind", [
    ({"w": np.ones((2, 2), np.float32), "b": np.float32(3)}, "dict"), ([np.zeros(3), np.ones(1)], "list"),
])  # fmt: skip
def test_what_an_aggregator_remembers_survives(value, kind):
    aggregator, other = FedAvg(), FedAvg()
    aggregator.memory, aggregator.last = value, ArrayRecord({"w": torch.full((2,), 0.1)})
    tensors, kinds = recall(aggregator)
    assert kinds == {"memory": kind, "last": "record"}
    remind(other, tensors, kinds)
    pairs = zip(
        value.values() if kind == "dict" else value,
        other.memory.values() if kind == "dict" else other.memory,
        strict=True,
    )
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in pairs)
    assert torch.equal(from_record(other.last)["w"], torch.full((2,), 0.1))
    assert recall(FedAvg()) == ({}, {})


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize("changes,error,text", [
    ({"clients": 0}, ConfigError, "federation.clients = 0"),
    ({"rounds": 0}, ConfigError, "federation.rounds = 0"),
    ({"fraction": 0.0}, ConfigError, "federation.fraction = 0.0"),
    ({"fraction": 1.5}, ConfigError, "federation.fraction = 1.5"),
    ({"mode": "secure"}, PrivacyError, "federation.mode = 'secure'"),
    ({"mode": "central"}, PrivacyError, "federation.mode = 'central'"),
    ({"aggregator": FedProx()}, ConfigError, "FedProx is not allowed: its proximal term"),
    ({"aggregator": DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2)}, ConfigError, "from the ledger"),
])  # fmt: skip
def test_a_bad_federation_is_refused_in_one_line(changes, error, text):
    with pytest.raises(error, match=text) as caught:
        Federation(**{"clients": 2, "rounds": 2, **changes})
    assert "\n" not in str(caught.value)


def test_streams_engine_and_folder_must_fit(stream):
    make, federation = maker(stream, Naive()), Federation(clients=2, rounds=1)
    with pytest.raises(ConfigError, match="streams = 1 is not allowed; allowed: one for each of 2 clients"):
        run_federation(make, [stream], federation)
    with pytest.raises(ConfigError, match="engine = 'dask'"):
        run_federation(make, [stream] * 2, federation, engine="dask")
    with pytest.raises(ConfigError, match="folder = None"):
        run_federation(make, [stream] * 2, federation, engine="ray")


def test_an_aggregator_that_stops_is_a_federation_error(stream):
    with pytest.raises(FederationError, match=r"aggregator FedAvg stopped: .*`participants`"):
        fit_federated(
            maker(stream, Naive()), [short(stream, 1)],
            Federation(clients=1, rounds=1, aggregator=FedAvg(weighted_by_key="participants")),
        )  # fmt: skip


def test_the_server_sees_no_training_record(stream):
    server = Server(learner=maker(stream, Naive(), privacy=SIMULATED, folder=Path("x"))(0), stream=stream,
                    federation=Federation(clients=1, rounds=1))  # fmt: skip
    assert [len(e.train) for e in server.stream] == [0] * 5
    assert [e.train.declared_size for e in server.stream] == [len(e.train) for e in stream]
    assert (server.learner.privacy, server.learner.folder) == (None, None)
