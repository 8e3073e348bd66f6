"""Weights of groups in training, and measures of groups on public test records."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from helpers.learners import SIMULATED, bits, same_bits
from helpers.toy_data import records
from perdure.data import Dataset, Groups, GroupWeights, split
from perdure.doctor.rules.unequal_groups import UnequalGroups
from perdure.doctor.trace import Trace
from perdure.errors import ConfigError, DataError, PrivacyError
from perdure.learner import Learner, group_measures
from perdure.learner.group_measures import measures_of
from perdure.models import mlp
from perdure.strategies import SLDA, Naive, Replay

DECLARED = GroupWeights(attribute="half", counts=(1, 3))


def grouped(n, **options):
    made = records(n, **options)
    return replace(made, attributes={"half": made.ids // 4 % 2})


@pytest.fixture(scope="module")
def stream():
    data = Dataset(
        name="toy",
        train=grouped(400),
        test=grouped(80, first_id=400, partition="toy-test"),
        num_classes=4,
        input_shape=(1, 4, 6),
    )
    return split(data, scenario="class", experiences=2)


def trained(stream, *, strategy=None, **options):
    given = {"iterations": 3, "batch_size": 16, "optimizer": partial(torch.optim.SGD, lr=0.5)}
    learner = Learner(
        model=mlp(input_shape=(1, 4, 6), num_classes=4, hidden=(8,), seed=0),
        strategy=strategy or Naive(),
        show_progress=False,
        **given | options,
    )
    learner.fit(stream)
    return learner


def test_one_step_takes_the_weighted_gradient(stream):
    whole = len(stream[0].train)
    first = replace(stream, experiences=stream.experiences[:1])
    learner = trained(first, iterations=1, batch_size=whole, group_weights=DECLARED)
    own = mlp(input_shape=(1, 4, 6), num_classes=4, hidden=(8,), seed=0)
    rows = stream[0].train
    logits = own(rows.inputs).index_fill(1, torch.tensor([2, 3]), -1e9)
    weights = torch.tensor([2.0, 2.0 / 3.0])[rows.attributes["half"]]
    (nn.functional.cross_entropy(logits, rows.labels, reduction="none") * weights).mean().backward()
    for mine, theirs in zip(learner.model.parameters(), own.parameters(), strict=True):
        assert torch.allclose(mine, theirs - 0.5 * theirs.grad, atol=1e-6)


def test_equal_counts_change_no_bit(stream):
    equal = GroupWeights(attribute="half", counts=(7, 7))
    plain, weighted = (
        trained(stream, strategy=Replay(memory_size=20), group_weights=each)
        for each in (None, equal)
    )
    assert same_bits(bits(plain.params), bits(weighted.params))


def test_memory_keeps_the_weights_of_its_rows(stream, tmp_path):
    learner = trained(
        stream, strategy=Replay(memory_size=20), group_weights=DECLARED, folder=tmp_path
    )
    tensors, _ = learner.session.held.snapshot()
    group = tensors["memory.ids"] // 4 % 2
    assert torch.allclose(tensors["memory.weights"], torch.tensor([2.0, 2.0 / 3.0])[group])
    assert learner.fingerprint["group_weights.counts"] == [1.0, 3.0]


def test_declared_weights_cost_no_epsilon_but_other_noise(stream):
    stream = replace(stream, assigned_by_record=True)
    plain, weighted = (
        trained(stream, privacy=SIMULATED, group_weights=each) for each in (None, DECLARED)
    )
    spent = [each.private_sum.ledger.statement(1e-4).epsilon for each in (plain, weighted)]
    assert spent[0] == spent[1]
    assert not same_bits(bits(plain.params), bits(weighted.params))
    with pytest.raises(PrivacyError, match="count private records"):
        trained(stream, privacy=SIMULATED, group_weights=GroupWeights(attribute="half"))


def test_strategies_without_gradients_refuse_weights(stream):
    with pytest.raises(ConfigError, match="allowed: a strategy with gradients"):
        trained(stream, strategy=SLDA(), group_weights=DECLARED)


def test_measures_of_groups_equal_their_definitions():
    draws = torch.Generator().manual_seed(0)
    predicted, labels, group = (torch.randint(0, 2, (60,), generator=draws) for _ in range(3))
    groups = Groups(attribute="sex", names=("f", "m"))
    found = measures_of(
        predicted=predicted, labels=labels, group=group, groups=groups, num_classes=2
    )
    rates = {}
    for number, name in enumerate(groups.names):
        own = group == number
        assert found.records[name] == int(own.sum())
        assert found.accuracy[name] == pytest.approx(
            float((predicted == labels)[own].float().mean())
        )
        rates[name] = [
            float(predicted[own & at].float().mean())
            for at in (labels == labels, labels == 1, labels == 0)
        ]
    gaps = [abs(one - other) for one, other in zip(*rates.values(), strict=True)]
    assert found.demographic_parity_difference == pytest.approx(gaps[0])
    assert found.equalized_odds_difference == pytest.approx(max(gaps[1:]))


def test_group_measures_are_of_public_test_records(stream):
    learner = trained(stream)
    first, _ = group_measures(learner, stream, Groups(attribute="half"))
    assert first.records == {"0": 20, "1": 20} and first.selection_rate is None
    assert first.accuracy_difference == pytest.approx(
        abs(first.accuracy["0"] - first.accuracy["1"])
    )
    assert group_measures(learner, stream, Groups(attribute="half", positive=3))[1].selection_rate
    with pytest.raises(ConfigError, match="positive = 4 is not allowed; allowed: a class, 0 to 3"):
        group_measures(learner, stream, Groups(attribute="half", positive=4))
    with pytest.raises(DataError, match="has no attribute 'other'; its attributes: half"):
        group_measures(learner, stream, Groups(attribute="other"))
    private = trained(replace(stream, assigned_by_record=True), privacy=SIMULATED)
    with pytest.raises(PrivacyError, match="training records"):
        shown = stream.with_test(0, stream[0].train)
        group_measures(private, shown, Groups(attribute="half"))


def test_the_rule_names_the_group_that_is_selected_less():
    labels = torch.arange(200) % 2
    group = (torch.arange(200) >= 100).long()
    groups = Groups(attribute="sex", names=("f", "m"))
    blank = Trace(experience=0, steps=0, done=0, private=True, names=(), matrices=())
    rule = UnequalGroups()
    assert rule.watch(blank) is None

    def found(predicted):
        measured = measures_of(
            predicted=predicted, labels=labels, group=group, groups=groups, num_classes=2
        )
        return rule.watch(replace(blank, groups=measured, group_counts=((50.0, 50.0),) * 2))

    assert found(labels) is None
    finding = found(labels * (group | (torch.arange(200) % 4 == 1).long()))
    assert "25% of the public test records of sex f are selected, and 50% of m" in finding.evidence
    assert finding.remedy.changes == {
        "training.group_weights": {"attribute": "sex", "class_counts": [[50.0, 50.0], [50.0, 50.0]]}
    }
