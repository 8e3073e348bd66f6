"""Messages of a federation: contents of replies, combination of states, and exact bits."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.federations import SIMULATED, hard, maker, short
from perdure.contract.state import State
from perdure.data import check_finite
from perdure.errors import FederationError, PrivacyError, StrategyError
from perdure.federated import Federation, Server, client_app, combine, run_federation
from perdure.federated.client_store import FRESH
from perdure.federated.flower_adapter import InProcessGrid, recall, remind
from perdure.federated.messages import from_record, load_shared, shared, to_record
from perdure.strategies import EWC, Combine, LwF, Naive

# --------------------------------------------------------------------------- what a client says


def task(**changes):
    return ConfigRecord(
        {"experience": 0, "round": 0, "rounds": 2, "exchange": 0, "previous": FRESH, "private": 1}
        | changes
    )


@pytest.mark.parametrize(
    "kind,records",
    [
        ("train", {"arrays", "metrics", "exchange", "ledger"}),
        ("train.finish", {"state", "metrics", "exchange", "ledger"}),
    ],
)
def test_a_private_reply_holds_only_releases_and_declared_sizes(stream, kind, records):
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
        assert list(reply.content["arrays"]) == [
            name for name, _ in make(0).model.named_parameters()
        ]


def test_combined_state_is_sent_once_per_client_and_experience(stream):
    """The client's own path during an experience must not be overwritten by the server's state from
    its start.
    """
    streams, federation = hard(stream)
    make = maker(stream, EWC(strength=1.0))
    app = client_app(lambda number: (make(number), streams[number]))
    seen = []

    def listen(message, context):
        content = message.content
        if "task" in content and "exchange" in content["task"]:
            asked = content["task"]
            seen.append(
                (
                    context.node_config["partition-id"],
                    asked["experience"],
                    asked["exchange"],
                    "state" in content,
                )
            )
        return app(message, context)

    with InProcessGrid(listen, 4).running() as grid:
        Server(learner=make(0), stream=streams[0], federation=federation).serve(grid)
    for client in range(4):
        for experience in range(2):
            got = [
                state
                for number, e, _, state in sorted(seen, key=lambda s: s[2])
                if (number, e) == (client, experience)
            ]
            assert got == [True] + [False] * (len(got) - 1)
    trained = [[n for n, _, exchange, _ in seen if exchange == x] for x in range(8)]
    assert [len(cohort) for cohort in trained] == [2, 2, 2, 4, 2, 2, 2, 4]


@pytest.mark.parametrize(
    "privacy,text", [(None, "the label is 'Jane'"), (SIMULATED, "see the client's log")]
)
def test_a_failing_client_stops_the_run_with_name_and_reason(stream, privacy, text):
    streams, federation = hard(stream)

    def fail(point, learner):
        if point == "step.done" and learner.client == 1:
            raise ValueError("the label is 'Jane'\nand more")

    with pytest.raises(
        FederationError, match=rf"^client 1 stopped: ValueError: {text}; 3 of 4 asked"
    ):
        run_federation(
            maker(stream, Naive(), privacy=privacy, callbacks=[fail]),
            streams,
            replace(federation, fraction=1.0),
        )


def test_a_privacy_error_of_a_client_stops_the_federation(stream):
    class Raw(Naive):
        def after_experience(self, curator, params, state):
            curator.raw("to look at them")
            return state

    streams, federation = hard(stream)
    with pytest.raises(PrivacyError, match=r"^client 0: see the client's log; 0 of"):
        run_federation(maker(stream, Raw(), privacy=SIMULATED), streams, federation)


# --------------------------------------------------------------------------- states and records


def states(*rows, rule="mean", dtype=torch.float32):
    return [State({"a": torch.tensor(row, dtype=dtype)}, {"a": rule}) for row in rows]


def test_server_combine_averages_means_and_adds_increments():
    mean = combine(None, states([1.0, 2.0], [3.0, 6.0]), [1, 3])
    assert mean["a"].tolist() == [2.5, 5.0]
    assert mean.rules == {"a": "mean"}
    (old,) = states([10.0], rule="sum")
    assert combine(old, states([11.0], [14.0], rule="sum"), [1, 99])["a"].tolist() == [15.0]
    assert combine(None, states([11.0], [14.0], rule="sum"), [1, 1])["a"].tolist() == [25.0]
    (old,) = states([1], rule="sum", dtype=torch.int64)
    assert combine(old, states([3], [4], rule="sum", dtype=torch.int64), [1, 1])["a"].tolist() == [
        6
    ]


def test_server_combine_skips_local_and_refuses_integer_means():
    state = State({"a": torch.ones(1), "b": torch.ones(1)}, {"a": "sum", "b": "local"})
    assert list(combine(None, [state, state], [1, 1])) == ["a"]
    with pytest.raises(StrategyError, match=r"'a' is torch\.int64"):
        combine(None, states([1], [2], dtype=torch.int64), [1, 1])


@pytest.mark.parametrize("rule", ["sum", "mean"])
def test_server_combine_returns_a_single_state_unchanged(rule):
    (new,) = states([0.1, -0.0, float("nan"), 1e-45], rule=rule)
    (old,) = states([1e8, 1.0, 1.0, 3.0], rule=rule)
    assert combine(old, [new], [7])["a"].numpy().tobytes() == new["a"].numpy().tobytes()


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3), min_size=2, max_size=5
    ),
    seed=st.integers(0, 9),
    rule=st.sampled_from(["sum", "mean"]),
)
@pytest.mark.property
def test_server_combine_does_not_depend_on_the_client_order(rows, seed, rule):
    weights = [float(i + 1) for i in range(len(rows))]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    (old,) = states([0.5, 0.25, 2.0], rule=rule)
    one = combine(old, states(*rows, rule=rule), weights)["a"]
    other = combine(old, states(*(rows[i] for i in order), rule=rule), [weights[i] for i in order])[
        "a"
    ]
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-3)
    alike = states(*[rows[0]] * 3)
    assert torch.equal(combine(None, alike, [0.1, 0.7, 3.0])["a"], alike[0]["a"])


def test_array_records_keep_names_order_dtypes_and_bits():
    tensors = {
        "z": torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).T,
        "a": torch.tensor(3),
        "half": torch.ones(2).half(),
        "wide": torch.tensor([1e-300], dtype=torch.float64),
        "none": torch.empty(0, 4),
    }
    back = from_record(to_record(tensors))
    assert list(back) == list(tensors)
    assert all(back[n].dtype == t.dtype and torch.equal(back[n], t) for n, t in tensors.items())
    back["z"].zero_()
    assert tensors["z"].abs().sum() > 0
    with pytest.raises(FederationError, match="half is bfloat16"):
        to_record({"half": torch.ones(1, dtype=torch.bfloat16)})


def test_shared_parameters_of_another_shape_are_refused():
    model = nn.Linear(2, 3)
    with pytest.raises(FederationError, match="bias"):
        load_shared(model, {"weight": torch.zeros(3, 2)})
    with pytest.raises(FederationError, match="weight"):
        load_shared(model, {"weight": torch.zeros(2, 3), "bias": torch.zeros(3)})


@pytest.mark.parametrize(
    "value,kind",
    [
        ({"w": np.ones((2, 2), np.float32), "b": np.float32(3)}, "dict"),
        ([np.zeros(3), np.ones(1)], "list"),
    ],
)
def test_the_state_of_an_aggregator_is_restored_on_resume(value, kind):
    aggregator = FedAvg()
    other = FedAvg()
    aggregator.memory = value
    aggregator.last = ArrayRecord({"w": torch.full((2,), 0.1)})
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


@pytest.mark.parametrize("spoilt", ["value", "label"])
def test_the_server_gets_no_value_of_an_invalid_private_record(stream, spoilt, caplog):
    """The holder's data check quotes a record, and runs while the client is built."""
    one = short(stream, 1)

    def make(client):
        train = one[0].train
        inputs, labels = train.inputs.clone(), train.labels.clone()
        if spoilt == "value":
            inputs[17].view(-1)[3] = float("nan")
        else:
            labels[17] = 9
        changed = replace(one[0], train=replace(train, inputs=inputs, labels=labels))
        own = replace(one, experiences=(changed,))
        check_finite([own])
        return maker(one, Naive(), privacy=SIMULATED)(client), own

    heard = []

    def listen(message):
        heard.extend([message.error.reason] if message.has_error() else [])

    server = Server(
        learner=maker(one, Naive(), privacy=SIMULATED)(0),
        stream=one,
        federation=Federation(clients=1, rounds=1),
    )
    with (
        pytest.raises(FederationError, match="node 1: DataError: see the client's log"),
        InProcessGrid(client_app(make), 1, None, listen).running() as grid,
    ):
        server.serve(grid)
    assert heard == ["DataError: see the client's log"]
    assert ("row 17" if spoilt == "value" else "labels [9]") in caplog.text
