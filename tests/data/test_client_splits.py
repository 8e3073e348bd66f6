from dataclasses import replace

import pytest
import torch

from perdure.data.client_splits import dirichlet, iid
from perdure.data.datasets.digits import digits
from perdure.data.scenarios import permuted, split
from perdure.errors import ConfigError


@pytest.fixture(scope="module")
def stream():
    return split(digits(), scenario="class", experiences=5)


def sizes(streams):
    return torch.tensor([[len(e.train) for e in stream] for stream in streams])


def test_every_record_goes_to_exactly_one_client(stream):
    parts = dirichlet(stream, clients=7, alpha=0.3, min_size=5)
    for e in stream:
        ids = torch.cat([part[e.index].train.ids for part in parts])
        assert sorted(ids.tolist()) == sorted(e.train.ids.tolist())


def test_a_client_split_keeps_inputs_and_labels_with_their_ids(stream):
    whole = {int(i): (x, int(y)) for i, x, y in zip(*rows(stream[2].train), strict=True)}
    part = dirichlet(stream, clients=3, alpha=1.0)[1][2].train
    assert len(part)
    for i, x, y in zip(*rows(part), strict=True):
        assert torch.equal(whole[int(i)][0], x)
        assert whole[int(i)][1] == int(y)


def rows(records):
    return records.ids, records.inputs, records.labels


@pytest.mark.parametrize("alpha", [0.01, 0.5, 100.0])
def test_every_client_has_min_size_records_in_every_experience(stream, alpha):
    assert sizes(dirichlet(stream, clients=10, alpha=alpha, min_size=12)).min() >= 12


def test_min_size_is_refused_above_the_records_per_client(stream):
    smallest = min(len(e.train) for e in stream)
    fit = smallest // 10
    assert sizes(dirichlet(stream, clients=10, alpha=0.05, min_size=fit)).min() >= fit
    with pytest.raises(ConfigError, match=rf"min_size = {fit + 1} .* at most {fit}"):
        dirichlet(stream, clients=10, alpha=0.05, min_size=fit + 1)


def test_client_partitions_have_names_and_declared_sizes(stream):
    part = dirichlet(stream, clients=4, alpha=1.0)[3]
    assert [e.train.partition for e in part] == [f"client-3/experience-{i}" for i in range(5)]
    assert all(e.train.declared_size == len(e.train) for e in part)


def test_each_client_gets_all_test_records_and_stream_settings(stream):
    part = dirichlet(stream, clients=4, alpha=1.0)[0]
    assert all(mine.test is whole.test for mine, whole in zip(part, stream, strict=True))
    assert (part.num_classes, part.scenario, part.input_shape) == (10, "class", stream.input_shape)
    assert part.assigned_by_record is False
    assert dirichlet(stream, clients=4, alpha=1.0, exact=False)[0].assigned_by_record is True


def test_a_client_split_depends_only_on_the_seed(stream):
    first, again, other = (
        dirichlet(stream, clients=5, alpha=0.5, seed=s)[0][0].train.ids for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_smaller_alpha_gives_more_unequal_clients(stream):
    def imbalance(parts):
        """Return the mean over classes of the largest client's share."""
        counts = torch.stack(
            [torch.bincount(p[0].train.labels, minlength=10)[:2] for p in parts]
        ).double()
        return float((counts / counts.sum(0)).amax(0).mean())

    low = torch.tensor(
        [imbalance(dirichlet(stream, clients=10, alpha=0.05, seed=s)) for s in range(8)]
    ).mean()
    high = torch.tensor(
        [imbalance(dirichlet(stream, clients=10, alpha=100.0, seed=s)) for s in range(8)]
    ).mean()
    assert low > 0.6
    assert 0.1 < high < 0.25


def test_label_shares_follow_the_dirichlet_distribution(stream):
    """A client's share over seeds has mean 1/K and variance (K-1) / (K^2 (K a + 1)). The bounds are
    4 sigma, and the seeds are fixed.
    """
    clients = 4
    alpha = 0.5
    shares = []
    for seed in range(120):
        parts = dirichlet(stream, clients=clients, alpha=alpha, seed=seed)
        counts = torch.tensor([int((p[0].train.labels == 0).sum()) for p in parts]).double()
        shares.append(counts / counts.sum())
    first = torch.stack(shares)[:, 0]
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))
    assert abs(float(first.mean()) - 1 / clients) < 4 * (variance / len(first)) ** 0.5
    assert 0.6 * variance < float(first.var()) < 1.6 * variance


def test_iid_gives_clients_shares_of_equal_size(stream):
    counts = sizes(iid(stream, clients=5, seed=3)).double()
    expected = counts.sum(0) / 5
    assert ((counts - expected).abs() < 4 * expected.sqrt()).all()


def test_a_record_in_two_experiences_stays_with_one_client():
    for scenario in ("domain", "class"):
        again = permuted(digits(), experiences=3, scenario=scenario)
        for part in dirichlet(again, clients=4, alpha=0.2, min_size=10):
            first, *later = (sorted(e.train.ids.tolist()) for e in part)
            assert all(ids == first for ids in later)


def test_removing_a_record_moves_no_other_to_another_client():
    data = digits()
    less = replace(data, train=data.train.take(torch.arange(len(data.train)) != 17))
    gone = int(data.train.ids[17])
    whole, without = (
        dirichlet(split(d, scenario="class", experiences=5), clients=4, alpha=5.0, seed=2)
        for d in (data, less)
    )
    for a, b in zip(whole, without, strict=True):
        for e, f in zip(a, b, strict=True):
            assert set(e.train.ids.tolist()) - {gone} == set(f.train.ids.tolist())


@pytest.mark.parametrize(
    "field,value", [("alpha", 0.0), ("alpha", float("nan")), ("clients", 0), ("min_size", 0)]
)
def test_dirichlet_refuses_an_out_of_range_value_by_name(stream, field, value):
    with pytest.raises(ConfigError, match=f"^{field} = "):
        dirichlet(stream, **{"clients": 3, "alpha": 1.0, field: value})


# ---------------------------------------------------------------- by the record's own hash


def declared(streams):
    """(clients, experiences) declared sizes."""
    return torch.tensor([[e.train.declared_size for e in stream] for stream in streams])


def test_hashed_splits_give_min_size_records_in_expectation(stream):
    plain, evened = (
        dirichlet(stream, clients=10, alpha=0.1, min_size=m, seed=1, exact=False) for m in (1, 12)
    )
    assert declared(plain).min() < 12 <= declared(evened).min()
    assert declared(evened).sum(0).tolist() == pytest.approx([len(e.train) for e in stream], abs=5)
    # the sizes that come out are near those declared: classes of digits are about equal
    gap = (sizes(evened) - declared(evened)).abs()
    assert (gap <= 5 * declared(evened).sqrt() + 5).all()


def test_a_min_size_that_is_already_met_changes_no_split(stream):
    plain, low = (dirichlet(stream, clients=4, alpha=5.0, min_size=m, exact=False) for m in (1, 2))
    assert all(
        torch.equal(a.train.ids, b.train.ids)
        for one, other in zip(plain, low, strict=True)
        for a, b in zip(one, other, strict=True)
    )


def test_client_sizes_follow_the_declared_total_not_the_records(stream):
    parts = iid(stream, clients=5, exact=False, declared_size=(1000, 500, 500, 500, 500))
    assert declared(parts).tolist() == [[200, 100, 100, 100, 100]] * 5
    less = replace(
        stream,
        experiences=tuple(
            replace(e, train=e.train.take(torch.arange(40)).declared(250)) for e in stream
        ),
    )
    assert declared(iid(less, clients=5, exact=False)).unique().tolist() == [50]


def test_client_sizes_can_be_declared_one_by_one(stream):
    given = [[7, 8, 9, 10, 11], [20, 21, 22, 23, 24]]
    parts = iid(stream, clients=2, exact=False, client_sizes=given)
    assert declared(parts).tolist() == given
    with pytest.raises(ConfigError, match=r"client_sizes = .* 2 rows .one per client. of 5 sizes"):
        iid(stream, clients=2, exact=False, client_sizes=given[:1])


def test_min_size_above_the_declared_records_is_refused(stream):
    with pytest.raises(ConfigError, match=r"min_size = 11 .* at most 10: experience 1 has 40 decl"):
        iid(stream, clients=4, min_size=11, exact=False, declared_size=(44, 40, 44, 44, 44))


@pytest.mark.parametrize("given", [{"declared_size": 100}, {"client_sizes": [[1] * 5] * 2}])
def test_exact_splits_refuse_declared_sizes(stream, given):
    with pytest.raises(ConfigError, match=r"None with exact=True.*use exact=False"):
        iid(stream, clients=2, **given)


def test_hashed_splits_keep_copies_of_a_record_with_one_client():
    for scenario in ("domain", "task"):
        again = permuted(digits(), experiences=3, scenario=scenario)
        for part in dirichlet(again, clients=4, alpha=0.2, min_size=10, exact=False):
            first, *later = ((sorted(e.train.ids.tolist()), e.train.declared_size) for e in part)
            assert all(other == first for other in later)
