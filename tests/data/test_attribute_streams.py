"""Streams by time and by domain: the record's own attribute decides its experience."""

from dataclasses import replace

import pytest
import torch

from perdure.data import by_domain, by_time, joint
from perdure.errors import ConfigError, DataError


def with_attributes(data, **of_ids):
    """Return the data set with attributes computed from the ids."""
    parts = {
        part: replace(
            getattr(data, part),
            attributes={name: of(getattr(data, part).ids) for name, of in of_ids.items()},
        )
        for part in ("train", "test")
    }
    return replace(data, **parts)


@pytest.fixture
def timed(toy_data):
    return with_attributes(
        toy_data, time=lambda ids: (ids % 10).float(), domain=lambda ids: ids % 3
    )


def found(stream, attribute):
    """Return the attribute's values in each experience, for training and test records."""
    return [
        [sorted(set(part.attributes[attribute].tolist())) for part in (each.train, each.test)]
        for each in stream
    ]


def test_by_time_cuts_train_and_test_data_at_the_boundaries(timed):
    stream = by_time(timed, boundaries=(3, 8))
    times = [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0, 6.0, 7.0], [8.0, 9.0]]
    assert found(stream, "time") == [[each, each] for each in times]
    assert stream.assigned_by_record is True and stream.scenario == "domain"
    assert [each.classes for each in stream] == [(0, 1, 2, 3)] * 3
    assert len({each.train.partition for each in stream}) == 3


def test_by_time_with_quantiles_is_not_assigned_by_record(timed):
    stream = by_time(timed, experiences=4)
    assert stream.assigned_by_record is False
    assert all(each.train.placed_by == "" for each in stream)
    own = [times for times, _ in found(stream, "time")]
    assert [time for each in own for time in each] == list(range(10)) and all(own)
    skewed = with_attributes(timed, time=lambda ids: (ids > 45).long() + (ids > 46).long())
    assert [len(each.train) for each in by_time(skewed, experiences=3)] == [46, 1, 1]


def test_by_domain_keeps_the_given_order_of_domains(timed):
    stream = by_domain(timed, order=(2, 0, 1))
    assert found(stream, "domain") == [[[2], [2]], [[0], [0]], [[1], [1]]]
    assert stream.assigned_by_record is True
    assert by_domain(timed).assigned_by_record is False
    named = by_domain(replace(timed, categories={"domain": ("a", "b", "c", "d")}))
    assert named.assigned_by_record is True
    assert [len(each.train) for each in named] == [16, 16, 16, 0]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda d: by_time(d), ConfigError, "exactly one of experiences and boundaries"),
        (lambda d: by_time(d, experiences=11), ConfigError, "1 to 10, the number of different"),
        (lambda d: by_time(d, boundaries=(3, 3)), ConfigError, "ascending times"),
        (lambda d: by_time(d, experiences=2, attribute="age"), DataError, "its attributes: time"),
        (lambda d: by_domain(d, order=(0, 1)), DataError, "domain 2 is in no experience"),
        (lambda d: by_domain(d, order=(0, 1, 0, 2)), ConfigError, "each once"),
        (
            lambda d: by_time(with_attributes(d, time=lambda ids: ids / (ids > 4)), experiences=2),
            DataError,
            r"has no time in row 0 \(1 in all\)",
        ),
    ],
)
def test_an_invalid_cut_by_attribute_is_refused_in_one_line(timed, build, error, message):
    with pytest.raises(error, match=message) as refused:
        build(timed)
    assert "\n" not in str(refused.value)


def test_the_joint_stream_has_all_records_in_one_experience(toy_data):
    (whole,) = joint(toy_data, declared_size=50)
    assert torch.equal(whole.train.ids, toy_data.train.ids) and whole.test is toy_data.test
    assert whole.train.declared_size == 50 and whole.classes == (0, 1, 2, 3)
