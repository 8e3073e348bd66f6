"""Arrays that hold a tensor: equal to Flower's arrays in bits, fields and bytes, and isolated
between receivers.
"""

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg

from helpers.federations import maker, outcome, short
from perdure.data.client_splits import dirichlet
from perdure.federated import Federation, Server, client_app, run_federation
from perdure.federated.flower_adapter import InProcessGrid
from perdure.federated.held_arrays import copied, held, read_only
from perdure.strategies import EWC

TENSORS = {
    "turned": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).T,
    "strange": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
    "number": torch.tensor(3),
    "half": torch.ones(2).half(),
    "wide": torch.tensor([1e-300], dtype=torch.float64),
    "flags": torch.tensor([True, False]),
    "none": torch.empty(0, 4),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_held_array_behaves_like_an_array_of_flower(name):
    tensor = TENSORS[name]
    own = Array(np.ascontiguousarray(tensor.numpy()).reshape(tensor.shape))
    mine = held({"a": tensor})["a"]
    assert (mine.dtype, mine.shape, mine.stype) == (own.dtype, own.shape, own.stype)
    assert mine.data == own.data
    assert mine.deflate() == own.deflate()
    assert mine.object_id == own.object_id
    assert mine.numpy().tobytes() == own.numpy().tobytes()
    assert (mine.numpy().dtype, mine.numpy().shape) == (own.numpy().dtype, own.numpy().shape)
    assert read_only(mine).numpy().tobytes() == read_only(own).numpy().tobytes()
    make, given = mine.__reduce__()[:2]  # what an engine with processes of its own sends
    sent = make(*given)
    assert (type(sent), sent) == (Array, own)


def test_held_arrays_are_copied_when_stored_and_read():
    tensor = torch.zeros(3)
    array = held({"a": tensor})["a"]
    tensor.fill_(1.0)
    array.numpy()[:] = 2.0
    assert array.numpy().tolist() == [0.0, 0.0, 0.0]


def test_writing_into_a_copied_message_changes_only_the_copy():
    content = RecordDict(
        {
            "arrays": held({"a": torch.zeros(2), "b": torch.zeros(2)}),
            "plain": ArrayRecord({"w": Array(np.zeros(2))}),
            "task": ConfigRecord({"round": 1, "names": ["x"]}),
            "metrics": MetricRecord({"n": [1, 2]}),
        }
    )
    other = copied(content)
    assert [type(record) for record in other.values()] == [type(r) for r in content.values()]
    other["arrays"]["a"].data = Array(np.ones(2)).data
    other["arrays"]["b"] = Array(np.ones(2))
    other["plain"]["w"].data = Array(np.ones(2)).data
    other["task"]["round"] = 2
    other["task"]["names"].append("y")
    other["metrics"]["n"][0] = 9
    del other["metrics"]
    assert other["arrays"]["a"].numpy().tolist() == [1.0, 1.0]
    assert other["plain"]["w"].numpy().tolist() == [1.0, 1.0]
    assert content["arrays"]["a"].numpy().tolist() == [0.0, 0.0]
    assert content["arrays"]["b"].numpy().tolist() == [0.0, 0.0]
    assert content["plain"]["w"].numpy().tolist() == [0.0, 0.0]
    assert dict(content["task"]) == {"round": 1, "names": ["x"]}
    assert dict(content["metrics"]) == {"n": [1, 2]}


def serialised(app):
    """Return an app that is called with serialised messages, as by an engine over a network."""

    def through_bytes(content):
        for record in content.values():
            if isinstance(record, ArrayRecord):
                for name, array in record.items():
                    record[name] = Array(array.dtype, array.shape, array.stype, array.data)

    served = ClientApp()
    for register in (served.query("partition"), served.train(), served.train("finish")):

        @register
        def handle(message: Message, context):
            through_bytes(message.content)
            reply = app(message, context)
            if not reply.has_error():
                through_bytes(reply.content)
            return reply

    return served


@pytest.mark.parametrize(("aggregator", "arrays"), [(FedAvg(), 0), (FedAdam(eta=0.05), 16)])
def test_in_process_messages_serialise_no_array_of_a_client(
    stream, monkeypatch, aggregator, arrays
):
    """Other aggregators serialise arrays themselves: FedAdam a mean and a step, of four arrays in
    two rounds.
    """
    saved = []
    save = np.save

    def counted(file, array, **options):
        saved.append(array)
        return save(file, array, **options)

    streams = dirichlet(short(stream, 1), clients=4, alpha=5.0, min_size=8)
    make = maker(stream, EWC(strength=1.0), iterations=2, blocks=1)
    monkeypatch.setattr(np, "save", counted)
    run_federation(make, streams, Federation(clients=4, rounds=2, aggregator=aggregator))
    assert len(saved) == arrays


def test_serialised_messages_give_a_bit_identical_federation(stream):
    streams = dirichlet(short(stream, 2), clients=3, alpha=5.0, min_size=8)
    make = maker(stream, EWC(strength=1.0), iterations=4, blocks=1)
    federation = Federation(clients=3, rounds=2)
    here = outcome(run_federation(make, streams, federation).learner)

    app = client_app(lambda number: (make(number), streams[number]))
    server = Server(learner=make(0), stream=streams[0], federation=federation)
    with InProcessGrid(serialised(app), 3).running() as grid:
        server.serve(grid)
    assert outcome(server.learner) == here
