"""Fast FedAvg over held arrays: bit-identical to Flower, and Flower itself for other replies."""

import numpy as np
import pytest
import torch
from flwr.app import Array, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, FedAvgM
from flwr.supercore.task_identity import TaskIdentity

from perdure.federated.averaging import PIECE, HeldFedAvg
from perdure.federated.flower_adapter import InProcessGrid
from perdure.federated.held_arrays import HeldArray, held


@pytest.fixture(autouse=True)
def identity():
    """Set the process fields that Flower needs to create messages."""
    with InProcessGrid(None, 1).running():
        assert TaskIdentity.run_id == 1
        yield


def tensors(client):
    rng = torch.Generator().manual_seed(client)
    return {
        "wide": torch.randn(7, 5, generator=rng, dtype=torch.float64),
        "weight": torch.randn(40, 3, generator=rng) * 10 ** float(client - 2),
        "half": torch.randn(9, generator=rng).half(),
        "number": torch.randn((), generator=rng),
        "none": torch.empty(0, 3),
        "large": torch.randn(3, PIECE, generator=rng)[:, 1:],  # no whole number of pieces
    }


def replies(sizes=(3, 50, 7), **more):
    asked = Message(RecordDict({}), 1, "train")
    return [
        Message(
            RecordDict(
                {
                    "arrays": held(tensors(client)),
                    "metrics": MetricRecord({"num-examples": size, **more}),
                }
            ),
            reply_to=asked,
        )
        for client, size in enumerate(sizes)
    ]


def test_fast_averaging_is_bit_identical_to_flower():
    mine, metrics = HeldFedAvg(FedAvg()).aggregate_train(1, replies())
    own, _ = FedAvg().aggregate_train(1, replies())
    assert list(mine) == list(own)
    assert dict(metrics) == {}
    for name, array in mine.items():
        assert type(array) is HeldArray
        assert (array.dtype, tuple(array.shape)) == (own[name].dtype, tuple(own[name].shape))
        assert array.numpy().tobytes() == own[name].numpy().tobytes()


def test_averaging_does_not_change_the_replies():
    given = replies()
    HeldFedAvg(FedAvg()).aggregate_train(1, given)
    for client, reply in enumerate(given):
        for name, value in tensors(client).items():
            assert np.array_equal(reply.content["arrays"][name].numpy(), value.numpy())


def test_replies_with_unequal_arrays_are_averaged_by_flower():
    given = replies(loss=2.0)
    _, metrics = HeldFedAvg(FedAvg()).aggregate_train(1, given)
    assert dict(metrics) == {"loss": 2.0}

    given = replies()
    given[1].content["arrays"]["weight"] = Array(tensors(1)["weight"].numpy())
    arrays, _ = HeldFedAvg(FedAvg()).aggregate_train(1, given)
    own, _ = FedAvg().aggregate_train(1, replies())
    assert type(arrays["weight"]) is Array
    assert all(arrays[name].data == own[name].data for name in own)
    assert HeldFedAvg(FedAvg()).aggregate_train(1, []) == (None, None)


def test_only_plain_fedavg_is_replaced_by_the_fast_average():
    given = FedAvg(weighted_by_key="rows", fraction_train=0.5)
    assert vars(HeldFedAvg(given)) == vars(given)
    assert HeldFedAvg.replaces(given)
    assert not HeldFedAvg.replaces(FedAvgM())
    assert not HeldFedAvg.replaces(FedAvg(train_metrics_aggr_fn=lambda *_: MetricRecord()))
