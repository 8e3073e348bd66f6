"""Data made by hand are checked like the results of the library's functions."""

import re
from functools import partial

import numpy as np
import pytest
import torch
import torchvision

from perdure.data import (
    Dataset,
    Experience,
    Records,
    Stream,
    blurry,
    by_domain,
    dirichlet,
    from_arrays,
    iid,
    joint,
    online,
    permuted,
    repetition,
    rotated,
    split,
)
from perdure.errors import ConfigError

ROWS = np.random.default_rng(0).normal(size=(40, 3))
LABELS = np.arange(40) % 2


def refused(message: str, make, *args, **settings) -> None:
    """Assert that the call raises one line that contains the message."""
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        make(*args, **settings)
    assert "\n" not in str(caught.value)


def test_a_data_set_made_by_hand_refuses_an_invalid_field():
    data = from_arrays(ROWS, LABELS, ids=range(40))
    settings = {"name": "mine", "num_classes": 2, "input_shape": (3,)}
    refused("mine has id", Dataset, train=data.train, test=data.train, **settings)
    refused("train of data set mine is a ndarray", Dataset, train=ROWS, test=data.test, **settings)
    empty = data.test.take(torch.arange(0))
    refused("mine has no test records", Dataset, train=data.train, test=empty, **settings)


@pytest.mark.parametrize("value", [torchvision.datasets.FakeData(3), [ROWS], {"x": ROWS}, None])
def test_stream_parts_made_by_hand_refuse_fields_of_another_type(value):
    records = from_arrays(ROWS, LABELS).train
    settings = {"index": 0, "classes": (0, 1)}
    given = f"is a {type(value).__name__}; allowed: a perdure.Records"
    refused(f"train of experience 0 {given}", Experience, train=value, test=records, **settings)
    refused(f"test of experience 0 {given}", Experience, train=records, test=value, **settings)
    stream = {"name": "mine", "scenario": "domain", "num_classes": 2, "input_shape": (3,)}
    refused("allowed: a perdure.Experience", Stream, experiences=(value,), **stream)
    refused("inputs are a", Records, inputs=value, labels=records.labels)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("ids are torch.float32", {"ids": torch.zeros(4)}),
        ("labels are one number", {"labels": torch.tensor(1)}),
        ("labels are torch.float32; convert them with labels.long()", {"labels": torch.zeros(4)}),
        ("perdure.data.from_arrays takes arrays and lists", {"labels": np.zeros(4)}),
    ],
)
def test_records_made_by_hand_refuse_an_invalid_field(message, settings):
    good = {"inputs": torch.zeros(4, 2), "labels": torch.zeros(4, dtype=torch.int64)}
    refused(message, Records, **{**good, **settings})


def test_an_experience_refuses_test_inputs_of_another_type():
    one = from_arrays(ROWS, LABELS).train
    two = Records(inputs=one.inputs.double(), labels=one.labels)
    message = "training inputs of shape (3,) in torch.float32 and test inputs of shape (3,) in"
    refused(message, Experience, index=0, train=one, test=two, classes=(0, 1))


@pytest.mark.parametrize("value", [torchvision.datasets.FakeData(3), [ROWS], {"x": ROWS}, None])
def test_scenarios_refuse_objects_that_are_not_a_data_set(value):
    for make in (
        partial(split, scenario="class", experiences=2),
        partial(permuted, experiences=2),
        partial(repetition, experiences=2),
        partial(blurry, experiences=2),
        by_domain,
        joint,
        rotated,
    ):
        refused(f"data is a {type(value).__name__}; allowed: a perdure.data.Dataset", make, value)
    for cut in (
        partial(online, chunk=3),
        partial(iid, clients=2),
        partial(dirichlet, clients=2, alpha=1.0),
    ):
        refused(f"stream is a {type(value).__name__}; allowed: a perdure.Stream", cut, value)
