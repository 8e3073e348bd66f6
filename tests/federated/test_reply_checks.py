"""Hostile replies are rejected with client, field and reason, and change nothing else."""

import copy
import logging
import math

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.federations import SIMULATED, maker, outcome, short
from helpers.hostile_clients import serve, spoilt_app, without
from perdure.data import dirichlet
from perdure.federated import Federation, Server, client_app
from perdure.federated.flower_adapter import InProcessGrid
from perdure.federated.reply_checks import Expected, ReplyChecks
from perdure.strategies import EWC

FEDERATION = Federation(clients=4, rounds=1)


@pytest.fixture(scope="module")
def parties(stream):
    streams = dirichlet(short(stream, 2), clients=4, alpha=5.0, min_size=8, exact=False)
    return maker(stream, EWC(strength=10.0), iterations=1, blocks=1), streams


def tensors_of(record):
    return {name: array.numpy() for name, array in record.items()}


def changed(record, change):
    """Return a spoiler that changes every array of a record."""

    def spoil(reply, message):
        if record in reply.content:
            own = tensors_of(reply.content[record])
            reply.content[record] = ArrayRecord({n: Array(change(a)) for n, a in own.items()})
        return reply

    return spoil, record


def first(record, change):
    """Return a spoiler that changes the first array of a record."""

    def spoil(reply, message):
        if record in reply.content:
            name = next(iter(reply.content[record]))
            reply.content[record][name] = Array(change(reply.content[record][name].numpy()))
        return reply

    return spoil, record


def sized(number):
    def spoil(reply, message):
        if "metrics" in reply.content and "num-examples" in reply.content["metrics"]:
            reply.content["metrics"]["num-examples"] = number
        return reply

    return spoil, "both"


def spoilt_entry(array, value):
    array = array.copy()
    array.reshape(-1)[0] = value
    return array


def replayed():
    """Return a spoiler that sends the first update again in every later round."""
    kept = []

    def spoil(reply, message):
        if "arrays" in reply.content:
            kept.append(copy.deepcopy(reply.content))
            return Message(copy.deepcopy(kept[0]), reply_to=message)
        return reply

    return spoil, "later arrays"


def nothing(reply, message):
    return reply if "partition" in reply.content.get("metrics", {}) else None


def other_source(reply, message):
    if message.metadata.message_type == "train":
        reply.metadata.__dict__["_src_node_id"] = 3
    return reply


def other_message(reply, message):
    """Claim the reply and the request of node 3, which the app can change, too."""
    if message.metadata.message_type == "train":
        for part in (reply.metadata.__dict__, message.metadata.__dict__):
            part["_src_node_id"] = part["_dst_node_id"] = 3
        reply.metadata.__dict__["_reply_to_message_id"] = "7"
    return reply


def claimed(record, shape):
    """Return a spoiler whose array claims a huge shape in its header."""
    import io

    def spoil(reply, message):
        if record in reply.content:
            name = next(iter(reply.content[record]))
            header = io.BytesIO()
            np.lib.format.write_array_header_1_0(
                header, {"descr": "<f4", "fortran_order": False, "shape": shape}
            )
            reply.content[record][name] = Array(
                "float32", shape, "numpy.ndarray", header.getvalue()
            )
        return reply

    return spoil, record


def added(reply, message):
    if "arrays" in reply.content:
        reply.content["more"] = ArrayRecord({"w": Array(np.zeros(2))})
    return reply


HOSTILE = {
    "nan": (*first("arrays", lambda a: spoilt_entry(a, np.nan)), "NaN, infinite"),
    "inf": (*first("arrays", lambda a: spoilt_entry(a, np.inf)), "NaN, infinite"),
    "broadcast": (*first("arrays", lambda a: a[:1]), "shape (1, 64)"),
    "int64": (*changed("arrays", lambda a: a.astype(np.int64)), "int64"),
    "complex64": (*changed("arrays", lambda a: a.astype(np.complex64)), "complex64"),
    "size-1000": (*sized(-1000), "is -1000"),
    "size1e12": (*sized(10**12), "the declared size"),
    "size-nan": (*sized(math.nan), "is nan"),
    "replay": (*replayed(), "exchange: is 0"),
    "x1e6": (*changed("arrays", lambda a: a * np.float32(1e6)), "times the median"),
    "none": (nothing, "both", "returned NoneType"),
    "source": (other_source, "arrays", "it says that it is node 3"),
    "message": (other_message, "arrays", "it says that it is node 3"),
    "state": (*changed("state", lambda a: a * np.float32(1e23)), "above"),
    "state-nan": (*first("state", lambda a: spoilt_entry(a, np.nan)), "NaN, infinite"),
    "huge": (*claimed("arrays", (10**12,)), "has shape (1000000000000,)"),
    "more": (added, "arrays", "has the records"),
}


REFERENCES = {}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_reply_is_rejected_and_changes_nothing(parties, tmp_path, case, caplog):
    spoils, which, told = HOSTILE[case]
    make, streams = parties
    hit = {"both": ("train", "train.finish"), "arrays": ("train",), "state": ("train.finish",)}
    kinds = hit.get(which, ("train",))
    seen = []

    def gone(reply, message):
        kind = message.metadata.message_type
        seen.append(kind)
        wrong = kind in kinds and (which != "later arrays" or seen.count("train") > 1)
        return without(reply, message) if wrong else reply

    if which not in REFERENCES:
        reference = serve(make, streams, FEDERATION, gone, folder=tmp_path / "gone")
        REFERENCES[which] = outcome(reference.learner), len(reference.absences)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "perdure"):
        server = serve(make, streams, FEDERATION, spoils, folder=tmp_path / "hostile")
    assert (outcome(server.learner), len(server.absences)) == REFERENCES[which]
    assert {each.client for each in server.absences} == {1}
    assert all(told in each.reason for each in server.absences), server.absences[0].reason
    assert caplog.text.count("goes on without client 1") == len(server.absences)


def test_a_hostile_private_client_reports_another_ledger(stream):
    """The client is rejected alone, and honest clients go on with their ledgers."""
    streams = dirichlet(short(stream, 1), clients=3, alpha=5.0, min_size=8, exact=False)

    def spoil(reply, message):
        if "ledger" in reply.content:
            reply.content["ledger"] = ConfigRecord({"head": "no head"})
        return reply

    make = maker(stream, EWC(strength=1.0), iterations=2, blocks=1, privacy=SIMULATED)
    server = serve(make, streams, Federation(clients=3, rounds=1), spoil)
    assert {(each.client, each.cause, each.field) for each in server.absences} <= {
        (1, "rejected", "ledger"),
        (1, "failed", ""),
    }
    assert sorted(server.heads.texts) == ["0", "2"]


# --------------------------------------------------------------------------- the bounds


def replies_of(updates, size=5):
    asked = Message(RecordDict({}), 1, "train")
    return {
        client: Message(
            RecordDict(
                {
                    "arrays": ArrayRecord({"w": Array(np.asarray(value, np.float32))}),
                    "metrics": MetricRecord({"num-examples": size}),
                    "exchange": ConfigRecord({"exchange": 4}),
                }
            ),
            reply_to=asked,
        )
        for client, value in enumerate(updates)
    }


def expected(**changes):
    own = {"record": "arrays", "tensors": {"w": torch.zeros(2)}, "exchange": 4, "private": False}
    return Expected(**own | {"sizes": {}} | changes)


@pytest.fixture
def identity():
    with InProcessGrid(None, 1).running():
        yield


def test_updates_are_bounded_by_the_median_or_as_declared(identity):
    checks = ReplyChecks()
    accepted, rejected = checks.accept(replies_of([[1, 0], [2, 0], [3, 0], [0, 301]]), expected())
    assert (list(accepted), list(rejected)) == ([0, 1, 2], [3])
    assert rejected[3].field == "update"
    assert checks.norms == [1.0, 2.0, 3.0]
    # two updates have no median of their own, and are compared with earlier ones
    accepted, _ = checks.accept(replies_of([[1, 0], [0, 1e6]]), expected())
    assert list(accepted) == [0]
    declared = expected(max_update_norm=2.5)
    accepted, rejected = ReplyChecks().accept(replies_of([[1, 0], [2, 0], [3, 0]]), declared)
    assert (list(accepted), list(rejected)) == ([0, 1], [2])
    assert "federation.max_update_norm" in str(rejected[2])


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e30])
def test_norms_are_those_of_float64_at_every_size(identity, size):
    rng = torch.Generator().manual_seed(0)
    start = size * torch.randn(200_000, generator=rng)
    update = start + size * torch.randn(200_000, generator=rng)
    checks = ReplyChecks()
    checks.accept(replies_of([update.tolist()]), expected(tensors={"w": start}))
    exact = torch.linalg.vector_norm(update - start, dtype=torch.float64)
    assert checks.norms == pytest.approx([float(exact)], rel=1e-6)


def test_two_clients_go_on_after_they_have_converged(parties):
    """Their last updates are tiny, and the first ones of the next experience are not."""
    make, streams = parties

    def converged(reply, message):
        task = message.content["task"]
        if "arrays" in reply.content and task["experience"] == 0:
            before, after = (tensors_of(each.content["arrays"]) for each in (message, reply))
            reply.content["arrays"] = ArrayRecord(
                {n: Array(before[n] + np.float32(1e-4) * (after[n] - before[n])) for n in before}
            )
        return reply

    def app(message, context):
        client = context.node_config["partition-id"]
        return spoilt_app(honest, converged, client)(message, context)

    honest = client_app(lambda number: (make(number), streams[number]))
    sizes = [[each.train.declared_size for each in own] for own in streams[:2]]
    federation = Federation(clients=2, rounds=2)
    server = Server(learner=make(0), stream=streams[0], federation=federation, sizes=sizes)
    with InProcessGrid(app, 2).running() as grid:
        server.serve(grid)
    assert server.absences == []


def test_two_updates_are_bounded_by_the_largest_earlier_one(identity):
    checks = ReplyChecks([1e-4, 3.0, 1e-4])
    accepted, rejected = checks.accept(replies_of([[1, 0], [0, 301]]), expected())
    assert (list(accepted), list(rejected)) == ([0], [1])
    assert "100 times the largest accepted norm" in str(rejected[1])


def test_a_size_is_bounded_by_the_declared_size(identity):
    bounded = expected(sizes={0: 5, 1: 4})
    accepted, rejected = ReplyChecks().accept(replies_of([[1, 0], [2, 0], [3, 0]]), bounded)
    assert (list(accepted), list(rejected)) == ([0, 2], [1])
    assert rejected[1].field == "metrics num-examples"


# --------------------------------------------------------------------------- random mutations

VALUES = st.one_of(
    st.floats(width=32),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0, -1, 10**12, math.nan, math.inf, -math.inf, 1e300]),
)
DTYPES = ["int64", "float64", "float16", "complex64", "bool", ">f4", "U3", "O"]
SHAPES = [(), (0,), (1,), (1, 64), (64, 16), (10**4,)]
MUTATIONS = st.one_of(
    st.tuples(st.just("number"), VALUES),
    st.tuples(st.just("scaled"), VALUES),
    st.tuples(st.just("entry"), VALUES),
    st.tuples(st.just("dtype"), st.sampled_from(DTYPES)),
    st.tuples(st.just("shape"), st.sampled_from(SHAPES)),
    st.tuples(st.just("bytes"), st.binary(max_size=200)),
    st.tuples(st.just("torn"), st.integers(0, 400)),
    st.tuples(st.just("stype"), st.text(max_size=8)),
    st.tuples(st.just("name"), st.text(max_size=8)),
    st.tuples(st.just("drop"), st.sampled_from(["arrays", "state", "metrics", "exchange"])),
    st.tuples(st.just("swap"), st.sampled_from(["arrays", "state", "metrics", "exchange"])),
    st.tuples(st.just("exchange"), VALUES),
    st.tuples(st.just("source"), st.integers(-3, 9)),
)


def mutated(reply, kind, value):
    """Change one part of a reply; a part that it does not have stays absent."""
    content = reply.content
    if kind == "source":
        reply.metadata.__dict__["_src_node_id"] = value
    elif kind in ("drop", "swap") and value in content:
        del content[value]
        if kind == "swap":
            content[value] = MetricRecord({"num-examples": 3})
    elif kind == "exchange":
        content["exchange"] = MetricRecord({"exchange": value})
    elif kind == "number":
        content["metrics"]["num-examples"] = value
    else:
        record = content["arrays"] if "arrays" in content else content["state"]
        name = next(iter(record))
        array = record[name].numpy()
        data = Array(array).data
        own = ("float32", array.shape, "numpy.ndarray")
        with np.errstate(all="ignore"):
            record[name] = {
                "scaled": lambda: Array(array * np.float32(value)),
                "entry": lambda: Array(spoilt_entry(array, np.float32(value))),
                "dtype": lambda: Array(array.astype(value)) if value != "O" else Array(*own, b"O"),
                "shape": lambda: Array(np.zeros(value, np.float32)),
                "bytes": lambda: Array(*own, value),
                "torn": lambda: Array(*own, data[: len(data) - value]),
                "stype": lambda: Array("float32", array.shape, value, data),
                "name": lambda: record[name],
            }[kind]()
        if kind == "name":
            record[value] = record.pop(name)
    return reply


def check_a_mutation(parties, kind, value, at):
    make, streams = parties

    def spoil(reply, message):
        turn = message.content["task"].get("exchange", -1)
        return mutated(reply, kind, value) if turn == at else reply

    server = serve(make, streams, Federation(clients=4, rounds=1), spoil)
    assert {each.client for each in server.absences} <= {1}
    assert len(server.learner.matrix) == 2
    for each in (*server.learner.params.values(), *server.learner.state.values()):
        assert torch.isfinite(each).all()


def mutations(number):
    return settings(
        max_examples=number,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


@mutations(8)
@given(mutation=MUTATIONS, at=st.integers(0, 3))
@pytest.mark.property
def test_a_mutated_reply_never_stops_the_server(parties, mutation, at):
    check_a_mutation(parties, *mutation, at)


@pytest.mark.deep(reason="chaos: 200 mutated replies, each in a federation of its own")
@mutations(200)
@given(mutation=MUTATIONS, at=st.integers(0, 3))
@pytest.mark.property
def test_200_mutated_replies_never_stop_the_server(parties, mutation, at):
    check_a_mutation(parties, *mutation, at)
