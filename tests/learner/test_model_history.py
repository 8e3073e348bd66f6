"""A trained model carries its history: no new learner, folder or copy starts from nothing."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from helpers.learners import SIMULATED
from perdure.data.scenarios import permuted
from perdure.errors import ConfigError, LedgerError, PrivacyError
from perdure.learner.model_history import trainings_of
from perdure.privacy.settings import Privacy
from perdure.strategies import EWC, Naive

DELTA = 1e-5


@pytest.fixture
def trained(learner_of, toy_stream):
    """A learner that was trained without a folder."""

    def make(privacy=SIMULATED, **changes):
        learner = learner_of(privacy=privacy, **changes)
        learner.fit(toy_stream())
        return learner

    return make


def spent(learner):
    return learner.private_sum.ledger.epsilon(delta=DELTA)


@pytest.mark.parametrize("first", [None, SIMULATED], ids=["plain", "private"])
@pytest.mark.parametrize("then", [None, SIMULATED], ids=["to plain", "to private"])
def test_a_trained_model_is_not_trained_again_unasked(trained, learner_of, toy_stream, first, then):
    model = trained(first).model
    with pytest.raises(ConfigError, match=r"trained already .* allowed: .*warm_start=True"):
        learner_of(model=model, privacy=then).fit(toy_stream())


def test_a_learner_is_not_fitted_twice_unasked(trained, toy_stream):
    learner = trained(None)
    with pytest.raises(ConfigError, match="warm_start=True"):
        learner.fit(toy_stream())


@pytest.mark.parametrize("how", ["itself", "copy", "part"])
def test_a_warm_start_carries_over_what_was_spent(trained, learner_of, toy_stream, tmp_path, how):
    first = trained()
    alone = spent(first)
    given = {
        "itself": lambda: first.model,
        "copy": lambda: copy.deepcopy(first.model),
        "part": lambda: nn.Sequential(first.model, nn.Linear(4, 4)),
    }[how]()
    again = learner_of(model=given, privacy=SIMULATED, warm_start=True, folder=tmp_path)
    again.fit(toy_stream())
    twice = [*first.private_sum.ledger.charges("experience-0")] * 2
    from perdure.privacy.accounting.calibration import epsilon

    assert spent(again) == pytest.approx(epsilon(twice, delta=DELTA), rel=1e-6)
    assert spent(again) > 1.2 * alone
    assert "training before this ledger counted" in str(again.private_sum.ledger.statement(DELTA))


def test_bare_weights_start_without_history_and_the_statement_says_so(
    trained, learner_of, toy_stream, toy_model
):
    first = trained()
    bare = toy_model(toy_stream())
    bare.load_state_dict(first.model.state_dict())
    learner = learner_of(model=bare, privacy=SIMULATED)
    learner.fit(toy_stream())
    assert spent(learner) == pytest.approx(spent(first))
    statement = learner.private_sum.ledger.statement(DELTA)
    assert "training before this ledger not counted" in str(statement)


def test_a_third_learner_carries_both_histories(trained, learner_of, toy_stream):
    first = trained()
    learners = [first]
    for _ in range(2):
        model = learners[-1].model
        learners.append(learner_of(model=model, privacy=SIMULATED, warm_start=True))
        learners[-1].fit(toy_stream())
    steps = [
        sum(charge.steps for charge in each.private_sum.ledger.charges("experience-0"))
        for each in learners
    ]
    assert steps == [steps[0], 2 * steps[0], 3 * steps[0]]


@pytest.mark.deep(reason="full replay: calibrates a whole stream three times")
def test_a_budget_counts_what_a_warm_start_carries(trained, learner_of, toy_stream):
    first = trained()
    target = replace(SIMULATED, noise_multiplier=None, epsilon=2 * spent(first), delta=DELTA)
    fresh = learner_of(privacy=target)
    fresh.fit(toy_stream())
    again = learner_of(model=first.model, privacy=target, warm_start=True)
    again.fit(toy_stream())
    assert spent(again) <= 2 * spent(first)
    assert again.private_sum.noise_multiplier > fresh.private_sum.noise_multiplier


def test_a_warm_start_is_resumed_with_the_same_charges(trained, learner_of, toy_stream, tmp_path):
    """In another process the weights come bare; what was carried stands in the ledger."""
    first = trained()
    start = first.model.state_dict()
    start = {name: value.clone() for name, value in start.items()}
    target = replace(SIMULATED, noise_multiplier=None, epsilon=2 * spent(first), delta=DELTA)
    options = {"privacy": target, "warm_start": True, "folder": tmp_path}

    def stop(point, learner):
        if point == "experience.begin" and learner.position.experience == 1:
            raise KeyError

    with pytest.raises(KeyError):
        learner_of(model=first.model, callbacks=[stop], **options).fit(toy_stream())
    bare = copy.deepcopy(first.model)
    bare.load_state_dict(start)
    for part in bare.modules():
        vars(part).pop("_perdure_training", None)
    again = learner_of(model=bare, **options)
    again.fit(toy_stream())
    own = again.private_sum.ledger
    assert spent(first) < spent(again) <= 2 * spent(first)
    assert sum(entry.purpose.startswith("spent before") for entry in own.entries) == 2


def test_records_under_a_new_name_are_taken_for_those_exposed_most(trained, learner_of, toy_data):
    first = trained()
    stream = permuted(toy_data, experiences=2)
    again = learner_of(model=first.model, stream=stream, privacy=SIMULATED, warm_start=True)
    again.fit(stream)
    ledger = again.private_sum.ledger
    names = [experience.train.partition for experience in stream]
    assert not set(names) & set(first.private_sum.ledger.partitions)
    for name in names:
        assert ledger.epsilon([name], delta=DELTA) > spent(first)


def test_a_partition_of_another_size_is_not_taken_for_the_same(trained, learner_of, toy_stream):
    model = trained().model
    stream = toy_stream()
    first = stream[0]
    other = replace(first, train=replace(first.train, declared_size=20))
    stream = replace(stream, experiences=(other, stream[1]))
    with pytest.raises(LedgerError, match="was declared with 24 records, now 20"):
        learner_of(model=model, privacy=SIMULATED, warm_start=True).prepare(stream)


def test_what_no_ledger_counts_does_not_become_private(trained, learner_of, toy_stream):
    model = trained(None).model
    with pytest.raises(PrivacyError, match="trained without privacy on experience-0, experience-1"):
        learner_of(model=model, privacy=SIMULATED, warm_start=True).prepare(toy_stream())
    learner_of(model=model, warm_start=True).fit(toy_stream())


def test_a_simulated_history_does_not_become_a_release(trained, learner_of, toy_stream, tmp_path):
    model = trained().model
    secret = Privacy(noise_multiplier=1.0)
    with pytest.raises(PrivacyError, match="simulated noise, which hides nothing"):
        learner_of(model=model, privacy=secret, warm_start=True, folder=tmp_path).prepare(
            toy_stream()
        )


def test_one_model_in_two_learners_is_refused_when_the_second_begins(learner_of, toy_stream):
    learners = [learner_of(privacy=SIMULATED)]
    learners.append(learner_of(model=learners[0].model, privacy=SIMULATED))
    for learner in learners:
        learner.prepare(toy_stream())
        learner.begin(0)
    learners[0].train(range(2))
    with pytest.raises(ConfigError, match="trained already"):
        learners[1].train(range(2))


def test_a_model_that_was_restored_carries_its_history(learner_of, toy_stream, tmp_path):
    learner_of(EWC(strength=1.0), privacy=SIMULATED, folder=tmp_path).fit(toy_stream())
    again = learner_of(EWC(strength=1.0), privacy=SIMULATED, folder=tmp_path)
    again.prepare(toy_stream())
    assert trainings_of(again.model) == []
    again.resume()
    (training,) = trainings_of(again.model)
    assert training.entries == again.private_sum.ledger.entries
    again.close()
    other = learner_of(Naive(), model=again.model, privacy=SIMULATED, warm_start=True)
    other.fit(toy_stream())
    assert spent(other) > spent(again)


def test_a_mark_is_no_part_of_the_weights(trained, toy_stream):
    model = trained().model
    assert trainings_of(model)
    assert not any("perdure" in name for name in model.state_dict())
    assert trainings_of(copy.deepcopy(model))[0].entries == trainings_of(model)[0].entries
    assert torch.equal(copy.deepcopy(model)(torch.zeros(1, 5)), model(torch.zeros(1, 5)))
