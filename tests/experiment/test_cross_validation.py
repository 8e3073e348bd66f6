"""Cross-validation by record id, and noisy labels found by cross-validated probabilities."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from sklearn.model_selection import GroupKFold, KFold, StratifiedKFold

from helpers.learners import SIMULATED
from perdure.data import Records, permuted
from perdure.errors import ConfigError, GuardError, PrivacyError
from perdure.experiment import cross_validate, find_label_issues
from perdure.experiment.folds import folds
from perdure.learner import Learner
from perdure.models import mlp
from perdure.strategies import Naive

SHUFFLED = KFold(3, shuffle=True, random_state=0)


def make(**options):
    return Learner(
        model=mlp(input_shape=(5,), num_classes=4, hidden=(), seed=0),
        optimizer=partial(torch.optim.SGD, lr=0.5),
        **{"strategy": Naive(), "iterations": 20, "batch_size": 16} | options,
    )


def test_each_fold_has_all_copies_of_a_record_on_one_side(toy_data):
    stream = permuted(toy_data, experiences=2, seed=0)
    held = []
    for fold in folds(stream, SHUFFLED):
        learnt = torch.cat([each.train.ids for each in fold])
        tested = torch.cat([each.test.ids for each in fold])
        assert not torch.isin(learnt, tested).any()
        assert torch.equal(*(each.test.ids.sort().values for each in fold))
        held.append(fold[0].test.ids)
    assert torch.equal(torch.cat(held).sort().values, toy_data.train.ids)


def test_scores_are_those_of_learners_trained_on_each_fold(toy_stream):
    stream = toy_stream()
    found = cross_validate(make, stream, splitter=SHUFFLED)
    expected = [float(make().fit(fold)[-1].mean()) for fold in folds(stream, SHUFFLED)]
    assert found.scores == pytest.approx(expected)
    scores = torch.tensor(expected, dtype=torch.float64)
    assert found.mean == pytest.approx(float(scores.mean()))
    assert found.standard_error == pytest.approx(float(scores.std()) / 3**0.5)


def test_cross_validation_refuses_private_and_used_learners(toy_stream):
    with pytest.raises(PrivacyError, match="cross-validation reads held-out records"):
        cross_validate(lambda: make(privacy=SIMULATED), toy_stream(), splitter=SHUFFLED)
    used = make()
    with pytest.raises(ConfigError, match="of an earlier fold"):
        cross_validate(lambda: used, toy_stream(), splitter=SHUFFLED)


def test_a_splitter_that_does_not_fit_is_refused(toy_stream):
    for splitter in (KFold(60), StratifiedKFold(13), GroupKFold(2), 5):
        with pytest.raises(ConfigError, match=r"splitter = .*allowed: a splitter") as caught:
            cross_validate(make, toy_stream(), splitter=splitter)
        assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def noisy():
    place = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    inputs = 4 * torch.eye(5)[labels] + 0.3 * torch.randn(80, 5, generator=place)
    given = labels.clone()
    given[:8] = (labels[:8] + 1) % 4
    return Records(inputs=inputs, labels=given, ids=torch.arange(80) * 7), labels


def test_flipped_labels_of_separate_classes_are_found(noisy):
    records, true = noisy
    found = find_label_issues(make, records)
    assert sorted(found.ids.tolist()) == [7 * row for row in range(8)]
    assert torch.equal(found.suggested, true[found.ids // 7])
    assert (found.scores.diff() >= 0).all() and found.scores.max() < 0.5
    kept = found.without(records)
    assert len(kept) == 72 and not torch.isin(kept.ids, found.ids).any()


def test_a_search_for_label_issues_is_refused_under_privacy(noisy, toy_stream):
    with pytest.raises(PrivacyError, match="a search for label issues reads"):
        find_label_issues(lambda: make(privacy=SIMULATED), noisy[0])
    stream = toy_stream()
    cleaned = replace(stream[0].train, coupled_by="find_label_issues(...).without(records)")
    stream = replace(stream, experiences=(replace(stream[0], train=cleaned), stream[1]))
    with pytest.raises(GuardError, match="made by find_label_issues"):
        make(privacy=SIMULATED).fit(stream)
