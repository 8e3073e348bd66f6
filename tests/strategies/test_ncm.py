import math

import pytest
import torch

from helpers.order_invariance import (
    SIMULATED,
    accuracy,
    alone,
    difference,
    everything,
    features_of_tests,
    learner_of,
    logits,
    stream_of,
)
from perdure.strategies import NCM


@pytest.mark.reference
# a filter no image answers to
@pytest.mark.filterwarnings("ignore:self.within_class_std_dev_ has at least 1 zero")
def test_ncm_equals_nearest_centroid_of_scikit_learn():
    from sklearn.neighbors import NearestCentroid

    features, labels = everything()
    reference = NearestCentroid().fit(features.numpy(), labels.numpy())
    learner = alone(NCM(normalise=False))
    torch.testing.assert_close(
        learner.state["weight"].T, torch.from_numpy(reference.centroids_), rtol=1e-5, atol=1e-6
    )
    assert (
        logits(learner).argmax(1).tolist()
        == reference.predict(features_of_tests().numpy()).tolist()
    )
    assert accuracy(learner) > 0.8


def test_ncm_logits_equal_distances_up_to_a_constant():
    learner = alone(NCM(normalise=False))
    f = features_of_tests()
    distances = (f[:, :, None] - learner.state["weight"]).square().sum(1)
    gap = logits(learner).double() + distances / 2
    torch.testing.assert_close(gap, gap[:, :1].expand_as(gap), rtol=1e-4, atol=1e-4)


def test_normalised_ncm_predicts_by_the_angle():
    features, labels = everything()
    unit = features / features.norm(dim=1, keepdim=True)
    means = torch.stack([unit[labels == c].mean(0) for c in range(10)])
    cosines = torch.nn.functional.cosine_similarity(features_of_tests()[:, None], means, dim=2)
    found = logits(alone(NCM()))
    torch.testing.assert_close(found + 0.5, cosines.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", [NCM(), NCM(normalise=False)], ids=repr)
def test_ncm_logits_do_not_depend_on_order_or_client_split(strategy):
    assert difference(strategy) < 1e-5


def test_ncm_never_predicts_a_class_without_records():
    learner = learner_of(NCM(normalise=False))
    learner.prepare(stream_of())
    learner.begin(0)
    learner.finish()
    weight = learner.state["weight"]
    bias = learner.state["bias"]
    assert (
        torch.equal(weight[:, 2:], torch.zeros_like(weight[:, 2:])) and float(bias[2:].max()) < -1e8
    )
    assert float(bias[:2].min()) > -1e8


def test_private_ncm_makes_one_release_per_experience():
    learner = alone(NCM(), privacy=SIMULATED)
    entries = learner.private_sum.ledger.entries
    assert [list(entry.scope) for entry in entries] == [
        [f"experience-{index}"] for index in range(5)
    ]
    assert [entry.clip_norm for entry in entries] == pytest.approx([math.sqrt(1 + 0.25**2)] * 5)
    assert accuracy(learner) > accuracy(alone(NCM())) - 0.1
