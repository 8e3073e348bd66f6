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
    logits,
)
from perdure.errors import ConfigError
from perdure.strategies import NCM, SLDA


@pytest.mark.reference
@pytest.mark.parametrize("shrinkage", [0.01, 0.5])
def test_slda_equals_discriminant_analysis_of_scikit_learn(shrinkage):
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    features, labels = everything()
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(
        features.numpy(), labels.numpy()
    )
    learner = alone(SLDA(shrinkage=shrinkage, normalise=False))
    torch.testing.assert_close(
        learner.state["weight"].T, torch.from_numpy(reference.coef_), rtol=1e-4, atol=1e-2
    )
    priors = torch.from_numpy(reference.priors_).log()  # the paper has none
    torch.testing.assert_close(
        learner.state["bias"], torch.from_numpy(reference.intercept_) - priors, rtol=1e-5, atol=1e-3
    )
    expected = reference.decision_function(features_of_tests().numpy()) - priors.numpy()
    assert logits(learner).argmax(1).tolist() == expected.argmax(1).tolist()
    assert accuracy(learner) > 0.9


def test_unscaled_slda_shrinks_towards_the_identity():
    features, labels = everything()
    means = torch.stack([features[labels == c].mean(0) for c in range(10)])
    around = features - means[labels]
    covariance = 0.7 * around.T @ around / len(features) + 0.3 * torch.eye(features.shape[1])
    expected = torch.linalg.solve(covariance, means.T)
    found = alone(SLDA(shrinkage=0.3, scaled=False, normalise=False)).state
    torch.testing.assert_close(found["weight"], expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        found["bias"], -0.5 * (expected * means.T).sum(0), rtol=1e-6, atol=1e-8
    )


def test_slda_with_shrinkage_1_equals_the_nearest_mean():
    near = alone(NCM(normalise=False))
    shrunk = alone(SLDA(shrinkage=1.0, scaled=False, normalise=False))
    torch.testing.assert_close(logits(shrunk), logits(near))


@pytest.mark.parametrize("strategy", [SLDA(), SLDA(normalise=False, scaled=False)], ids=repr)
def test_slda_logits_do_not_depend_on_order_or_client_split(strategy):
    assert difference(strategy) < 1e-5


def test_private_slda_makes_one_release_per_experience():
    learner = alone(SLDA(), privacy=SIMULATED)
    entries = learner.private_sum.ledger.entries
    assert [list(entry.scope) for entry in entries] == [
        [f"experience-{index}"] for index in range(5)
    ]
    assert [entry.clip_norm for entry in entries] == pytest.approx(
        [math.sqrt(1 + 0.7**2 + 0.5**2)] * 5
    )
    assert logits(learner).isfinite().all() and float(learner.state["noisy"]) == 5


@pytest.mark.parametrize("value", [0.0, 1.5, math.nan])
def test_slda_refuses_an_invalid_shrinkage(value):
    with pytest.raises(ConfigError, match=r"slda\.shrinkage"):
        SLDA(shrinkage=value)
