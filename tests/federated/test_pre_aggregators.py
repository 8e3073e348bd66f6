"""PreAggregator of updates: formulas against loops, hostile updates, and bad settings."""

import pytest
import torch

from helpers.federations import maker, short
from perdure.data.client_splits import iid
from perdure.errors import ConfigError, FederationError, RunError
from perdure.federated import Federation, run_federation
from perdure.federated.pre_aggregators import Buckets, ClipUpdates, NearestNeighbours, mixed
from perdure.strategies import Naive


def models(n, seed=0):
    place = torch.Generator().manual_seed(seed)
    return [
        {"w": torch.randn(3, 2, generator=place), "b": torch.randn(2, generator=place)}
        for _ in range(n)
    ]


BASE = {"w": torch.full((3, 2), 0.5), "b": torch.zeros(2)}


def flat(model):
    return torch.cat([model["w"].flatten(), model["b"]])


def place(seed=0):
    return torch.Generator().manual_seed(seed)


def test_nearest_neighbours_equal_a_loop_over_the_updates():
    own = models(7)
    found, _ = mixed(own, BASE, [NearestNeighbours(hostile=2)], place())
    rows = torch.stack([flat(model) for model in own])
    for i, model in enumerate(found):
        near = (rows - rows[i]).norm(dim=1).argsort()[:5]
        torch.testing.assert_close(flat(model), rows[near].mean(0))


def test_nearest_neighbours_leave_a_far_update_out():
    own = [{"w": 0.1 * model["w"], "b": 0.1 * model["b"]} for model in models(7)]
    own[3] = {"w": own[3]["w"] + 1e4, "b": own[3]["b"]}
    found, weights = mixed(own, BASE, [NearestNeighbours(hostile=1)], place())
    assert weights[:, 3].count_nonzero() == 1 and weights[3, 3] == pytest.approx(1 / 6)
    assert all(flat(model).abs().max() < 1 for i, model in enumerate(found) if i != 3)


def test_buckets_average_every_update_once():
    own = models(7)
    found, weights = mixed(own, BASE, [Buckets(size=3)], place(4))
    assert (weights > 0).sum(1).tolist() == [3, 3, 1]
    assert ((weights > 0).sum(0) == 1).all()
    rows = torch.stack([flat(model) for model in own])
    for model, weight in zip(found, weights, strict=True):
        torch.testing.assert_close(flat(model), rows[weight > 0].mean(0))
    assert torch.equal(weights, mixed(own, BASE, [Buckets(size=3)], place(4))[1])
    assert not torch.equal(weights, mixed(own, BASE, [Buckets(size=3)], place(5))[1])


@pytest.mark.parametrize("norm", [None, 1.5])
def test_clipped_updates_have_at_most_the_bound(norm):
    own = models(5)
    own[0] = {"w": own[0]["w"] * 100, "b": own[0]["b"]}
    lengths = torch.stack([flat(model) - flat(BASE) for model in own]).norm(dim=1)
    bound = float(lengths.median()) if norm is None else norm
    found, _ = mixed(own, BASE, [ClipUpdates(norm=norm)], place())
    for model, before, length in zip(found, own, lengths, strict=True):
        update = flat(model) - flat(BASE)
        torch.testing.assert_close(
            update, (flat(before) - flat(BASE)) * min(1.0, bound / float(length))
        )


def test_steps_are_applied_one_after_another():
    own = models(6)
    steps = [ClipUpdates(), NearestNeighbours(hostile=2)]
    once, _ = mixed(own, BASE, steps[:1], place())
    twice, _ = mixed(once, BASE, steps[1:], place())
    both, _ = mixed(own, BASE, steps, place())
    for mine, theirs in zip(both, twice, strict=True):
        torch.testing.assert_close(flat(mine), flat(theirs))


def test_too_few_updates_are_refused():
    with pytest.raises(FederationError, match="allowed: more than 4 clients a round"):
        mixed(models(4), BASE, [NearestNeighbours(hostile=2)], place())


@pytest.mark.parametrize(
    ("make", "allowed"),
    [
        (lambda: NearestNeighbours(hostile=0), "whole numbers from 1"),
        (lambda: Buckets(size=1), "whole numbers from 2"),
        (lambda: ClipUpdates(norm=0.0), "a number above 0, or None"),
        (lambda: Buckets(size="2"), "a whole number"),
    ],
)
def test_mixing_settings_out_of_range_are_refused(make, allowed):
    with pytest.raises(ConfigError, match=allowed):
        make()


def test_one_bucket_of_all_clients_equals_fedavg_of_equal_sizes(stream):
    streams = iid(short(stream, 1), clients=3, declared_size=300, exact=False)
    trained = []
    for steps in ([], [Buckets(size=3)]):
        federation = Federation(clients=3, rounds=2, pre_aggregators=steps)
        trained.append(run_federation(maker(stream, Naive()), streams, federation).learner)
    for mine, theirs in zip(*(each.model.parameters() for each in trained), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_run_resumes_with_its_pre_aggregators_only(stream, tmp_path):
    streams = iid(short(stream, 1), clients=3, declared_size=300, exact=False)
    own = Federation(clients=3, rounds=1, pre_aggregators=[ClipUpdates(norm=1.0)])
    run_federation(maker(stream, Naive()), streams, own, folder=tmp_path)
    other = Federation(clients=3, rounds=1, pre_aggregators=[ClipUpdates(norm=2.0)])
    with pytest.raises(RunError, match="pre_aggregators"):
        run_federation(maker(stream, Naive()), streams, other, folder=tmp_path)
