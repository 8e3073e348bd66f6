"""Class-incremental streams with repetition: classes return, and every record occurs once."""

import pytest
import torch

from helpers.toy_data import places
from perdure.data import repetition
from perdure.errors import ConfigError


def test_repetition_puts_every_record_in_one_experience(toy):
    stream = repetition(toy, experiences=8, repeat_probability=0.5, seed=1)
    shown = places(stream)
    assert set.union(*shown) == set(range(400)) and sum(map(len, shown)) == 400
    for each in stream:
        assert set(each.train.labels.tolist()) <= set(each.classes) and each.classes
    assert sum(len(each.classes) for each in stream) > 4 + 4
    assert stream.assigned_by_record and len({each.train.partition for each in stream}) == 8


def test_repetition_tests_a_class_in_its_first_experience(toy):
    stream = repetition(toy, experiences=8, repeat_probability=0.5, seed=1)
    met = set()
    for each in stream:
        new = set(each.classes) - met
        assert set(each.test.labels.tolist()) == new
        met |= new
    assert met == {0, 1, 2, 3}


def test_repetition_draws_classes_at_the_given_probabilities(toy):
    once = repetition(toy, experiences=30, first_probability=0.5, repeat_probability=1.0)
    for before, each in zip(once, list(once)[1:], strict=False):
        assert set(before.classes) <= set(each.classes)
    at_once = repetition(toy, experiences=3, first_probability=1.0, class_order=(2, 0, 1, 3))
    assert at_once[0].classes == (0, 1, 2, 3)
    counts = [
        len(each.classes)
        for seed in range(20)
        for each in list(repetition(toy, experiences=40, first_probability=1.0, seed=seed))[1:]
    ]
    # 0.2 of 4 classes, or one where there would be none: 0.8 + 0.8 ** 4; the seeds are fixed
    assert torch.tensor(counts).float().mean() == pytest.approx(0.8 + 0.8**4, abs=0.1)


def test_repetition_declares_the_expected_sizes(toy):
    data = type(toy)(**vars(toy) | {"train": toy.train.declared(400)})
    stream = repetition(data, experiences=5, repeat_probability=0.5)
    assert sum(each.train.declared_size for each in stream) == pytest.approx(400, abs=3)
    for each in stream:
        assert each.train.declared_size == pytest.approx(len(each.train), abs=40)


@pytest.mark.parametrize(
    ("field", "value"),
    [("experiences", 0), ("first_probability", 0.0), ("repeat_probability", 1.5)],
)
def test_repetition_refuses_invalid_arguments(toy, field, value):
    with pytest.raises(ConfigError, match=field):
        repetition(toy, **({"experiences": 3} | {field: value}))
