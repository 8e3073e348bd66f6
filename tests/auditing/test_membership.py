import math

import pytest
import torch
from sklearn.metrics import roc_auc_score

from perdure import Learner, Privacy, Records
from perdure.auditing.membership import (
    MembershipResult,
    area_under_curve,
    halves,
    likelihood_ratio,
    lira,
    logit_confidence,
    true_positives,
)
from perdure.data.datasets.digits import digits
from perdure.data.experience import Experience, Stream
from perdure.errors import ConfigError
from perdure.models.classifiers import mlp
from perdure.strategies.naive import Naive


def test_every_record_is_in_half_of_the_shadow_models():
    seen = halves(11, 6, seed=0)
    assert seen.sum(0).tolist() == [3] * 11
    assert not torch.equal(seen[0], seen[2])
    assert torch.equal(seen[0], ~seen[1])


def test_the_confidence_is_the_logit_of_the_label_probability():
    logits = torch.tensor([[1.0, 2.0, 0.5], [30.0, -30.0, 0.0]])
    records = Records(inputs=torch.zeros(2, 1), labels=torch.tensor([1, 0]))
    p = logits.double().softmax(1)[[0, 1], records.labels]
    torch.testing.assert_close(
        logit_confidence(lambda x: logits, records)[0], (p[0] / (1 - p[0])).log()
    )
    assert logit_confidence(lambda x: logits, records)[1] == pytest.approx(30.0)


def test_the_lira_score_is_the_log_ratio_of_two_normals():
    place = torch.Generator().manual_seed(0)
    shadows = torch.randn(6, 5, generator=place).double()
    target = torch.randn(5, generator=place).double()
    seen = halves(5, 6, seed=1)
    logs = []
    for mask in (seen, ~seen):
        own = [shadows[mask[:, i], i] for i in range(5)]
        mean = torch.stack([values.mean() for values in own])
        deviation = torch.stack([values.var() for values in own]).mean().sqrt()
        logs.append(torch.distributions.Normal(mean, deviation).log_prob(target))
    torch.testing.assert_close(likelihood_ratio(target, shadows, seen), logs[0] - logs[1])


@pytest.mark.reference
def test_the_auc_equals_scikit_learn_also_with_ties():
    place = torch.Generator().manual_seed(0)
    inside = torch.randint(3, 9, (40,), generator=place)
    outside = torch.randint(0, 7, (60,), generator=place)
    labels = [1] * 40 + [0] * 60
    scores = torch.cat([inside, outside])
    assert area_under_curve(inside, outside) == pytest.approx(roc_auc_score(labels, scores))


def test_true_positive_rate_is_taken_at_a_false_positive_rate():
    inside = torch.tensor([5.0, 3.0, 0.5, 9.0])
    outside = torch.tensor([4.0, 1.0, 2.0, 3.0])
    assert [true_positives(inside, outside, rate) for rate in (0.0, 0.25, 0.5, 1.0)] == [
        0.5,
        0.5,
        0.75,
        0.75,
    ]


def trainer(privacy=None, iterations=80, learning_rate=0.01):
    """Return a function from records and a seed to a classifier, trained on full batches with Adam,
    or with SGD under privacy.
    """
    optimizer = torch.optim.SGD if privacy else torch.optim.Adam

    def train(records, seed):
        only = Experience(
            index=0, train=records, test=records.take(slice(0)), classes=tuple(range(10))
        )
        learner = Learner(
            model=mlp(input_shape=(1, 8, 8), num_classes=10, hidden=(64,), seed=seed % 1000),
            strategy=Naive(),
            optimizer=lambda params: optimizer(params, lr=learning_rate),
            iterations=iterations,
            batch_size=len(records),
            seed=seed,
            privacy=privacy,
        )
        learner.prepare(
            Stream(
                name="d",
                scenario="class",
                experiences=(only,),
                num_classes=10,
                input_shape=(1, 8, 8),
                assigned_by_record=True,
            )
        )
        learner.begin(0)
        learner.train(learner.training.block(learner.position.experience, 0, 1))
        return learner.predictor(0, after=0)

    return train


def attacked(train):
    records = digits().train.take(slice(0, 400))
    members = torch.randperm(400, generator=torch.Generator().manual_seed(0)) < 200
    target = train(records.take(members), 1)
    return target, records, members, lira(target, train, records, members, shadows=8)


@pytest.mark.slow
@pytest.mark.statistical
def test_the_attack_finds_members_only_without_privacy():
    """The seed is fixed. Both areas have standard errors of about 0.03, so the thresholds are at
    least three of them away.
    """
    target, records, members, found = attacked(trainer())
    right = target(records.inputs).argmax(1) == records.labels
    assert right[members].all()
    assert found.auc > 0.62
    assert found.true_positive_rates[0.1] > 0.2
    *_, hidden = attacked(
        trainer(Privacy(epsilon=1.0, delta=1e-3, sampling_rate=0.5, seed=0), 30, 0.5)
    )
    assert 0.40 < hidden.auc < 0.60
    assert found.auc - hidden.auc > 4 * math.hypot(found.auc_error, hidden.auc_error)


def test_a_membership_result_prints_every_number():
    result = MembershipResult(
        auc=0.7123,
        auc_error=0.026,
        true_positive_rates={0.01: 0.09, 0.1: 0.335},
        records=400,
        shadows=8,
    )
    assert str(result) == (
        "membership inference (LiRA, 8 shadow models, 400 records): AUC 0.712 +- 0.026 (0.5 "
        "is guessing); "
        "true positives at false positives: 9.0 % at 1 %, 33.5 % at 10 %"
    )


@pytest.mark.parametrize("shadows", [0, 2, 5])
def test_lira_refuses_too_few_or_an_odd_number_of_shadows(shadows):
    records = Records(inputs=torch.zeros(4, 1), labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="shadows"):
        lira(
            lambda x: x,
            lambda r, s: lambda x: x,
            records,
            torch.tensor([True, False] * 2),
            shadows=shadows,
        )


@pytest.mark.parametrize("members", [[True] * 4, [False] * 4, [True, False]])
def test_lira_refuses_records_without_members_or_non_members(members):
    records = Records(inputs=torch.zeros(4, 1), labels=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ConfigError, match="members"):
        lira(lambda x: x, lambda r, s: lambda x: x, records, torch.tensor(members))
