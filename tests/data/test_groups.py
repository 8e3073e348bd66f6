"""Weights of groups of records: their formulas, and what they refuse."""

from dataclasses import replace

import pytest
import torch

from perdure.data import Groups, GroupWeights, Records, split
from perdure.data.groups import weighted
from perdure.errors import ConfigError, DataError, PrivacyError

GROUP = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0])
LABELS = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0])


def records(**changes):
    given = {"inputs": torch.rand(8, 3), "labels": LABELS, "attributes": {"sex": GROUP}}
    return Records(**given | changes)


def test_group_weights_give_every_group_the_same_total():
    weights = GroupWeights(attribute="sex", counts=(5, 3)).of(records())
    totals = [float(weights[g == GROUP].sum()) for g in (0, 1)]
    assert totals == pytest.approx([4.0, 4.0])
    counted = GroupWeights(attribute="sex").declared(records(), 2)
    assert counted == GroupWeights(attribute="sex", counts=(5.0, 3.0))


def test_reweighing_makes_group_and_class_independent():
    chosen = GroupWeights(attribute="sex", counts="reweighing").declared(records(), 2)
    assert chosen.class_counts == ((2.0, 3.0), (2.0, 1.0))
    weights = chosen.of(records())
    cells = torch.zeros(2, 2).index_put((GROUP, LABELS), weights, accumulate=True)
    margins = cells.sum(1, keepdim=True) * cells.sum(0, keepdim=True) / cells.sum()
    assert torch.allclose(cells, margins) and float(weights.sum()) == pytest.approx(8.0)


def test_an_empty_cell_has_the_weight_one():
    chosen = GroupWeights(attribute="sex", class_counts=((2, 3), (2, 0)))
    at = (GROUP == 1) & (LABELS == 1)
    assert chosen.of(records())[at].tolist() == [1.0]


def test_weights_follow_their_records_through_a_selection():
    own = replace(records(), weights=torch.arange(8.0))
    assert own.take(torch.tensor([5, 2])).weights.tolist() == [5.0, 2.0]
    assert records().take(slice(0, 2)).weights is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"counts": (1.0, 0.0)}, "one declared number above 0 for each group"),
        ({"counts": ()}, "one declared number above 0 for each group"),
        ({"class_counts": ((1.0, 2.0), (1.0,))}, "one row for each group"),
        ({"class_counts": ((0.0, 0.0),)}, "one row for each group"),
        ({"counts": (1.0, 2.0), "class_counts": ((1.0,),)}, "left out beside class_counts"),
    ],
)
def test_group_weights_refuse_numbers_that_do_not_fit(changes, words):
    with pytest.raises(ConfigError, match=words):
        GroupWeights(attribute="sex", **changes)


@pytest.mark.parametrize(
    ("given", "chosen", "error", "words"),
    [
        ({"attributes": {}}, {}, DataError, "has no attribute 'sex'; its attributes: none"),
        ({"attributes": {"sex": GROUP - 1}}, {}, DataError, "whole numbers from 0"),
        ({"attributes": {"sex": GROUP / 2}}, {}, DataError, "whole numbers from 0"),
        ({}, {"counts": (8.0,)}, ConfigError, "allowed: one for each value"),
        ({}, {"class_counts": ((5.0,), (3.0,))}, ConfigError, "allowed: one for each value"),
    ],
)
def test_group_weights_refuse_records_without_a_count(given, chosen, error, words):
    with pytest.raises(error, match=words):
        weights = GroupWeights(attribute="sex", **chosen)
        (weights.declared(records(**given), 2) if weights.counted else weights).of(records(**given))


def test_counted_groups_are_refused_under_privacy(toy):
    grouped = replace(toy.train, attributes={"sex": toy.train.ids % 2})
    stream = split(replace(toy, train=grouped), scenario="class", experiences=2)
    for counts in ("balanced", "reweighing"):
        with pytest.raises(PrivacyError, match="count private records"):
            weighted(stream, GroupWeights(attribute="sex", counts=counts), private=True)
    declared = GroupWeights(attribute="sex", counts=(200, 200))
    made = weighted(stream, declared, private=True)
    assert bool((made[0].train.weights == 1).all())
    with pytest.raises(ConfigError, match="allowed: one of the two"):
        weighted(made, declared, private=True)


def test_weights_are_in_all_experiences_or_in_none(toy):
    stream = split(toy, scenario="class", experiences=2)
    first = replace(stream[0].train, weights=torch.ones(len(stream[0].train)))
    half = replace(stream, experiences=(replace(stream[0], train=first), stream[1]))
    with pytest.raises(ConfigError, match="weights in all experiences, or none"):
        weighted(half, None, private=False)
    with pytest.raises(DataError, match="finite numbers from 0"):
        replace(first, weights=-first.weights)


def test_groups_have_names_or_numbers():
    groups = Groups(attribute="sex", names=("Female", "Male"))
    assert [groups.name_of(g) for g in range(3)] == ["Female", "Male", "2"]
