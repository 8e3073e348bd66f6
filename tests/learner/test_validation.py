"""Validation during training: held out by record id, early stopping, and the best parameters."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers.learners import SIMULATED, bits, same_bits
from perdure.data import permuted
from perdure.errors import ConfigError, PrivacyError, RunError
from perdure.experiment.config import parse
from perdure.federated import Federation, fit_federated
from perdure.learner import EMA, Validation
from perdure.learner.validation import Validator
from perdure.strategies import Replay

FAST = partial(torch.optim.SGD, lr=3.0)
"""A rate with which the toy problem gets worse after it was learnt."""


@pytest.fixture
def fitted(learner_of, toy_stream):
    def fit(validation, **options):
        options = {"optimizer": FAST, "iterations": 20, "batch_size": 4} | options
        learner = learner_of(Replay(memory_size=12), validation=validation, **options)
        learner.fit(toy_stream())
        return learner

    return fit


def test_all_copies_of_a_record_are_on_one_side(toy_data):
    stream = permuted(toy_data, experiences=3)
    validator = Validator(Validation(share=0.25), stream, 0, private=False)
    held = [set(records.ids.tolist()) for records in validator.records]
    trained = [set(each.train.ids.tolist()) for each in validator.stream]
    assert held[0] == held[1] == held[2] and not held[0] & trained[0]
    assert len(held[0]) == round(0.25 * len(stream[0].train))
    sizes = [each.train.declared_size for each in validator.stream]
    assert sizes == [len(each.train) for each in validator.stream]


def test_validation_records_are_not_trained_on(fitted, toy_stream):
    seen = set()
    learner = fitted(
        Validation(share=0.25),
        callbacks=[
            lambda point, learner: (
                point == "experience.begin" and seen.update(learner.session.held.rows.ids.tolist())
            )
        ],
    )
    again = Validator(Validation(share=0.25), toy_stream(), learner.seed, private=False)
    held = {each for records in again.records for each in records.ids.tolist()}
    assert held and not held & seen


def test_training_stops_after_measurements_without_improvement(fitted):
    learner = fitted(Validation(share=0.25, every=2, patience=2))
    for experience in (0, 1):
        steps = [step for index, step, _ in learner.validated if index == experience]
        scores = [score for index, _, score in learner.validated if index == experience]
        assert steps == [2 * (number + 1) for number in range(len(steps))] and steps[-1] < 20
        best = scores.index(max(scores))
        assert len(scores) == best + 3


def test_the_best_parameters_end_the_experience(fitted):
    ends = {}

    def keep(point, learner):
        if point == "step.done" and learner.position.experience == 0:
            ends[learner.position.step] = bits(learner.model.state_dict())
        elif point == "experience.consolidated" and learner.position.experience == 0:
            ends["end"] = bits(learner.model.state_dict())

    learner = fitted(Validation(share=0.25, every=1, patience=3), callbacks=[keep])
    scores = [(score, -step) for index, step, score in learner.validated if index == 0]
    best = -max(scores)[1]
    assert best < len(scores)
    assert same_bits(ends["end"], ends[best])


def test_validation_alone_only_takes_records_away(fitted, learner_of, toy_stream):
    learner = fitted(Validation(share=0.25, patience=None, keep_best=False))
    stream = Validator(Validation(share=0.25), toy_stream(), 5, private=False).stream
    plain = learner_of(Replay(memory_size=12), optimizer=FAST, iterations=20, batch_size=4)
    plain.fit(stream)
    assert same_bits(bits(learner.model.state_dict()), bits(plain.model.state_dict()))
    assert len(learner.validated) == 20


class Stop(Exception):  # noqa: N818
    """An exception in place of a power failure."""


@pytest.mark.parametrize("number", [2, 5])
def test_a_run_with_validation_resumes_bit_identically(fitted, tmp_path, number):
    chosen = Validation(share=0.25, every=3, patience=3)
    options = {"blocks": 4, "averaging": EMA(decay=0.5)}
    left = [number]

    def stop(point, learner):
        left[0] -= point == "checkpoint.end"
        if left[0] == 0:
            raise Stop

    with pytest.raises(Stop):
        fitted(chosen, folder=tmp_path / "stopped", callbacks=[stop], **options)
    ends = [fitted(chosen, folder=folder, **options) for folder in (tmp_path / "stopped", None)]
    assert ends[0].validated == ends[1].validated and ends[0].matrix == ends[1].matrix
    one, other = (bits(each.snapshot().tensors) for each in ends)
    assert same_bits(one, other)


def test_another_validation_is_refused_on_resume(fitted, tmp_path):
    fitted(Validation(), folder=tmp_path)
    for other, name in ((None, "validation"), (Validation(patience=4), "validation.patience")):
        with pytest.raises(RunError, match=f"differs in .*{name}"):
            fitted(other, folder=tmp_path)


def test_validation_is_refused_in_the_folder_of_a_run_without(fitted, tmp_path):
    fitted(None, folder=tmp_path)
    with pytest.raises(RunError, match=r"differs in .*validation"):
        fitted(Validation(), folder=tmp_path)


def test_validation_by_held_out_records_is_refused_under_privacy(learner_of):
    with pytest.raises(PrivacyError, match="private records without noise; give public"):
        learner_of(validation=Validation(), privacy=SIMULATED)


def test_a_private_number_of_steps_cannot_depend_on_releases(learner_of, toy_stream):
    public = tuple(each.test for each in toy_stream())
    with pytest.raises(PrivacyError, match="patience = 3 is not allowed under privacy"):
        learner_of(validation=Validation(records=public), privacy=SIMULATED)


def test_public_records_choose_the_best_private_parameters(learner_of, toy_stream):
    stream = toy_stream()
    public = tuple(each.test for each in stream)
    ends = {}

    def keep(point, learner):
        if point == "block.end":
            place = (learner.position.experience, learner.position.step)
            ends[place] = bits(learner.model.state_dict())

    learner = learner_of(
        validation=Validation(records=public, patience=None),
        privacy=SIMULATED,
        blocks=2,
        callbacks=[keep],
    )
    learner.fit(stream)
    assert [each[:2] for each in learner.validated] == [*ends]
    last = {step: score for index, step, score in learner.validated if index == 1}
    best = max(last, key=last.get)
    assert same_bits(bits(learner.model.state_dict()), ends[1, best])


def test_private_training_records_are_no_validation_records(learner_of, toy_stream):
    stream = toy_stream()
    own = tuple(each.train for each in stream)
    learner = learner_of(validation=Validation(records=own, patience=None), privacy=SIMULATED)
    with pytest.raises(PrivacyError, match="are training records of a model with privacy"):
        learner.fit(stream)


def test_records_for_each_experience_are_needed(learner_of, toy_stream):
    stream = toy_stream()
    learner = learner_of(validation=Validation(records=(stream[0].test,)))
    with pytest.raises(ConfigError, match=r"validation.records = .* one for each of 2"):
        learner.fit(stream)


def test_validation_is_refused_in_a_federation(learner_of, toy_stream):
    federation = Federation(clients=1, rounds=1)
    with pytest.raises(ConfigError, match=r"client 0: Learner.validation=.* is not used"):
        fit_federated(
            lambda client: learner_of(validation=Validation()), [toy_stream()], federation
        )


CONFIG = """
name = "x"
[training]
epochs = 1
[training.validation]
share = 0.2
{rest}
[[arms]]
strategy = "naive"
"""


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        ("[federation]\nclients = 2", "no validation in a federation"),
        (
            "[privacy]\nepsilon = 1.0\n[[arms]]\nstrategy = 'ewc'\nstrength = 1.0\nprivate = true",
            "none for private arms",
        ),
    ],
)
def test_a_config_refuses_validation_where_it_cannot_be_used(rest, reason):
    assert parse(CONFIG.format(rest="")).training.validation.share == 0.2
    with pytest.raises(ConfigError, match=f"^training.validation = .*{reason}"):
        parse(CONFIG.format(rest=rest))


@pytest.mark.parametrize(
    ("name", "wrong"), [("share", 0.0), ("share", 1.0), ("every", 0), ("patience", 0)]
)
def test_wrong_validation_settings_are_refused(name, wrong):
    with pytest.raises(ConfigError, match=f"{name} = .* is not allowed"):
        replace(Validation(), **{name: wrong})


@pytest.mark.parametrize("records", ["x", [1], 3])
def test_validation_records_of_something_else_are_refused(records):
    with pytest.raises(ConfigError, match=r"validation.records = .* is not allowed"):
        Validation(records=records)


def test_a_run_refuses_to_resume_with_other_validation_records(fitted, toy_stream, tmp_path):
    stream = toy_stream()
    fitted(Validation(records=[each.test for each in stream], every=20), folder=tmp_path)
    other = [replace(each.test, inputs=each.test.inputs + 1) for each in stream]
    with pytest.raises(RunError, match=r"validation\.records"):
        fitted(Validation(records=other, every=20), folder=tmp_path)
