"""Clients of a federation that each hold the records of one value of an attribute."""

from dataclasses import replace

import pandas
import pytest
import torch

from perdure.data import by_attribute, by_domain, from_arrays, from_pandas, split
from perdure.errors import ConfigError, DataError, PrivacyError

WARD = torch.tensor([0, 1, 2] * 20)
"""Ward of each record; the ward 2 has no record of the later half."""
WARD[30:][WARD[30:] == 2] = 0
HALF = (torch.arange(60) >= 30).long()


def stream_of(**changes):
    data = from_arrays(
        torch.rand(60, 3), torch.arange(60) % 2, ids=torch.arange(60) + 500, test=0.2, seed=1
    )
    rows = data.train.ids - 500
    tests = data.test.ids - 500
    train = replace(data.train, attributes={"ward": WARD[rows], "half": HALF[rows]}, **changes)
    test = replace(data.test, attributes={"ward": WARD[tests], "half": HALF[tests]})
    return by_domain(replace(data, train=train, test=test), "half", order=(0, 1))


def test_each_client_holds_the_records_of_its_value():
    stream = stream_of()
    clients = by_attribute(stream, "ward", clients=3)
    for index, whole in enumerate(stream):
        for ward, client in enumerate(clients):
            ids = client[index].train.ids
            assert torch.equal(ids, whole.train.ids[whole.train.attributes["ward"] == ward])
            assert client[index].train.partition == f"client-{ward}/experience-{index}"
            assert client[index].train.declared_size == len(ids)
            assert client[index].test is whole.test
    assert len(clients[2][1].train) == 0, "a gap"
    assert clients[0].assigned_by_record is False


def test_given_values_choose_the_clients_and_their_order():
    stream = stream_of()
    (first, second) = by_attribute(stream, "ward", clients=2, values=[2, 0])
    whole = by_attribute(stream, "ward", clients=3)
    assert torch.equal(first[0].train.ids, whole[2][0].train.ids)
    assert torch.equal(second[1].train.ids, whole[0][1].train.ids)


@pytest.mark.parametrize("clients", [1, 2, 4])
def test_another_number_of_clients_than_values_is_refused(clients):
    with pytest.raises(
        ConfigError,
        match=rf"clients = {clients} is not allowed; allowed: one .* of ward, which are 0, 1, 2;",
    ):
        by_attribute(stream_of(), "ward", clients=clients)


@pytest.mark.parametrize("values", [(0, 1), (0, 1, 1), (0, 1, 2, 3)])
def test_values_that_do_not_fit_the_clients_are_refused(values):
    with pytest.raises(ConfigError, match=r"values = .* allowed: 3 values of ward, each once"):
        by_attribute(stream_of(), "ward", clients=3, values=values)


def test_an_unknown_attribute_is_refused_with_the_known_ones():
    with pytest.raises(DataError, match=r"no attribute 'wing'; its attributes: ward, half"):
        by_attribute(stream_of(), "wing", clients=3)


def test_declared_sizes_and_gaps_depend_on_no_record():
    sizes = [[10, 0], [8, 9], [7, 3]]
    clients = by_attribute(stream_of(), "ward", clients=3, exact=False, client_sizes=sizes)
    declared = [[each.train.declared_size for each in client] for client in clients]
    assert declared == sizes
    assert not any(each.train.size_counted for client in clients[1:] for each in client)
    assert len(clients[0][1].train) == 0, "a declared gap leaves its records out"
    assert clients[0].assigned_by_record is True
    fewer = stream_of()
    fewer = replace(
        fewer,
        experiences=tuple(
            replace(e, train=e.train.take(e.train.ids != e.train.ids[0])) for e in fewer
        ),
    )
    again = by_attribute(fewer, "ward", clients=3, exact=False, client_sizes=sizes)
    for mine, theirs in zip(clients, again, strict=True):
        for more, less in zip(mine, theirs, strict=True):
            assert set(less.train.ids.tolist()) <= set(more.train.ids.tolist())
            assert more.train.placed_by == less.train.placed_by != ""


@pytest.mark.parametrize(
    ("exact", "sizes", "words"),
    [
        (True, [[1, 1]] * 3, "None with exact=True"),
        (False, None, "public sizes for every client"),
        (False, [[1, 1]] * 2, "3 rows .one per client. of 2 sizes from 0"),
        (False, [[1, 1], [1, 1], [0, 0]], "a size above 0 in each"),
        (False, [[1, 1], [1, 1], [1, -1]], "sizes from 0"),
    ],
)
def test_sizes_that_do_not_fit_the_split_are_refused(exact, sizes, words):
    with pytest.raises(ConfigError, match=f"client_sizes = .*allowed: .*{words}"):
        by_attribute(stream_of(), "ward", clients=3, exact=exact, client_sizes=sizes)


def test_declared_sizes_need_declared_values():
    """Without them a further record may give others other numbers."""
    table = pandas.DataFrame(
        {"age": range(40), "ward": ["west", "east"] * 20, "ill": [0, 0, 1, 1] * 10, "id": range(40)}
    )
    found = from_pandas(table, target="ill", ids="id", group="ward", test=0.2)
    stream = split(found, scenario="class", experiences=2)
    assert len(by_attribute(stream, "group", clients=2)) == 2
    sizes = [[9, 9], [9, 9]]
    with pytest.raises(PrivacyError, match=r"values of group were found .* declare all values"):
        by_attribute(stream, "group", clients=2, exact=False, client_sizes=sizes)
    named = {"ward": ["east", "west"]}
    declared = from_pandas(table, target="ill", ids="id", group="ward", test=0.2, categories=named)
    stream = split(declared, scenario="class", experiences=2)
    parts = by_attribute(stream, "group", clients=2, exact=False, client_sizes=sizes)
    assert parts[0].assigned_by_record is True
