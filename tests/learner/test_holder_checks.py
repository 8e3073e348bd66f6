"""Checks for the data's holder before a private run: invalid values, and a large delta."""

import warnings
from dataclasses import replace

import pytest
import torch

from helpers.learners import SIMULATED
from perdure.data import iid
from perdure.errors import DataError


def spoilt(stream, value, *, index=1, row=5, column=2):
    inputs = stream[index].train.inputs.clone()
    inputs[row, column] = value
    changed = replace(stream[index], train=replace(stream[index].train, inputs=inputs))
    return replace(
        stream,
        experiences=tuple(changed if e.index == index else e for e in stream),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_the_error_names_row_and_column_of_a_bad_private_value(learner_of, toy_stream, value):
    stream = spoilt(toy_stream(), value)
    number = int(stream[1].train.ids[5])
    text = rf"experience 1 of split-blobs has {value} in row 5 \(record id {number}\), column 2 of "
    learner = learner_of(privacy=SIMULATED)
    with pytest.raises(DataError, match=text) as caught:
        learner.fit(stream)
    assert "\n" not in str(caught.value) and "repair or leave out the row" in str(caught.value)
    assert learner.position.step == 0 and not learner.position.begun


def test_the_curator_accepts_private_records_with_nan(learner_of, toy_stream):
    """An error would reveal something about the record."""
    learner = learner_of(privacy=SIMULATED)
    learner.prepare(spoilt(toy_stream(), float("nan"), index=0))
    learner.begin(0)
    learner.train(range(3))
    assert learner.position.step == 3


def test_training_that_fails_without_privacy_names_the_nan_row(learner_of, toy_stream):
    """No value is checked before training, and the error does not blame the learning rate."""
    learner = learner_of(iterations=40)
    with pytest.raises(DataError, match=r"experience 0 .* has nan in row 5 .*, column 2 of"):
        learner.fit(spoilt(toy_stream(), float("nan"), index=0))
    assert learner.position.step < 40


@pytest.mark.parametrize("privacy", [None, SIMULATED])
def test_test_inputs_with_nan_are_refused_before_training(learner_of, toy_stream, privacy):
    stream = toy_stream()
    test = replace(stream[1].test, inputs=stream[1].test.inputs.clone())
    test.inputs[3, 2] = float("nan")
    parts = (stream[0], replace(stream[1], test=test))
    with pytest.raises(DataError, match=r"experience 1 .* nan in row 3 .* of its test inputs"):
        learner_of(iterations=3, privacy=privacy).fit(replace(stream, experiences=parts))


def test_a_record_in_training_and_test_data_is_refused(learner_of, toy_stream):
    stream = toy_stream()
    mixed = replace(stream[1], test=stream[0].train.take(torch.arange(5)), classes=(0, 1, 2, 3))
    mixed = replace(stream, experiences=(stream[0], mixed))
    with pytest.raises(DataError, match=r"experience 1 .* of its test records and among the train"):
        learner_of(iterations=3).fit(mixed)


def test_a_federation_checks_values_before_contacting_the_server(learner_of, toy_stream):
    from perdure.federated import Federation, run_federation

    streams = iid(toy_stream(), clients=2, exact=False)
    streams[1] = spoilt(streams[1], float("nan"), index=0)
    make = lambda number: learner_of(privacy=SIMULATED)  # noqa: E731
    with pytest.raises(DataError, match=r"experience 0 .* row 5 \(record id \d+\), column 2 of"):
        run_federation(make, streams, Federation(clients=2, rounds=1))


def test_check_finite_finds_bad_pixels_and_accepts_tokens(toy_stream):
    from perdure.data import check_finite

    stream = toy_stream()
    train = replace(stream[0].train, inputs=torch.zeros(len(stream[0].train), 2, 3, 4))
    train.inputs[7, 1, 2, 3] = float("nan")
    test = replace(stream[0].test, inputs=torch.zeros(len(stream[0].test), 2, 3, 4))
    pictures = replace(stream, experiences=(replace(stream[0], train=train, test=test),))
    with pytest.raises(DataError, match=r"nan in row 7 \(record id \d+\), column 1, 2, 3 of"):
        check_finite([stream, pictures])
    tokens = replace(train, inputs=torch.zeros(len(train), 5, dtype=torch.int64))
    test = replace(test, inputs=torch.zeros(len(test), 5, dtype=torch.int64))
    check_finite([replace(stream, experiences=(replace(stream[0], train=tokens, test=test),))])


# ---------------------------------------------------------------- delta


def warned(learner_of, stream, delta):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner = learner_of(privacy=replace(SIMULATED, delta=delta))
        learner.prepare(stream)
    return [str(one.message) for one in caught], learner


def test_delta_of_1_over_the_number_of_records_warns_once(learner_of, toy_stream):
    stream = toy_stream()
    records = sum(e.train.declared_size for e in stream)
    texts, learner = warned(learner_of, stream, 1 / records)
    assert len(texts) == 1
    assert texts[0].startswith(f"privacy.delta = {1 / records:g} is not below 1 / {records}, ")
    assert "whole ones may leak" in str(learner.private_sum.ledger.statement(1 / records))
    assert warned(learner_of, stream, 0.99 / records)[0] == []


def test_a_record_in_two_experiences_counts_once_for_delta(learner_of, toy_data):
    from perdure.data import online, permuted, split
    from perdure.learner.private_setup import declared_records

    data = replace(toy_data, train=toy_data.train.declared(600))
    copies = permuted(data, experiences=3)
    pieces = online(split(data, scenario="class", experiences=2), chunk=60, exact=False)
    assert declared_records(copies) == 600
    assert declared_records(pieces) == 600
