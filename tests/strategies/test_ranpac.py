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
from perdure.contract.context import Spec
from perdure.errors import ConfigError, PrivacyError, StrategyError
from perdure.privacy.settings import Privacy
from perdure.strategies import RanPAC

RAW = RanPAC(ridge=0.5, normalise=False)


@pytest.mark.reference
def test_ranpac_equals_ridge_regression_of_scikit_learn():
    from sklearn.linear_model import Ridge

    features, labels = everything()
    reference = Ridge(alpha=0.5, fit_intercept=False).fit(
        features.numpy(), torch.eye(10)[labels].double().numpy()
    )
    learner = alone(RAW)
    torch.testing.assert_close(
        learner.state["weight"], torch.from_numpy(reference.coef_.T), rtol=1e-4, atol=1e-5
    )
    expected = torch.from_numpy(reference.predict(features_of_tests().numpy())).float()
    torch.testing.assert_close(logits(learner), expected, rtol=1e-5, atol=1e-5)
    assert accuracy(learner) > 0.93


@pytest.mark.reference
def test_the_ranpac_bias_is_a_constant_column_of_features():
    from sklearn.linear_model import Ridge

    features, labels = everything()
    unit = features / features.norm(dim=1, keepdim=True)
    wider = torch.cat([unit, torch.full((len(unit), 1), 0.5)], 1)
    reference = Ridge(alpha=0.01, fit_intercept=False).fit(
        wider.numpy(), torch.eye(10)[labels].double().numpy()
    )
    found = alone(RanPAC(ridge=0.01, bias=0.5)).state["weight"]
    torch.testing.assert_close(found, torch.from_numpy(reference.coef_.T), rtol=1e-3, atol=1e-5)


@pytest.mark.reference
def test_ranpac_equals_recursive_least_squares_of_acil():
    """The reference uses the Woodbury identity, one experience after another, from the inverse of
    the ridge alone.
    """
    learner = learner_of(RAW)
    d = learner.model.feature_size
    inverse = torch.eye(d, dtype=torch.float64) / 0.5
    weight = torch.zeros(d, 10, dtype=torch.float64)
    for experience in stream_of():
        with torch.no_grad():
            f = learner.model.features(experience.train.inputs).double()
        targets = torch.eye(10, dtype=torch.float64)[experience.train.labels]
        inner = torch.linalg.inv(torch.eye(len(f), dtype=torch.float64) + f @ inverse @ f.T)
        inverse = inverse - inverse @ f.T @ inner @ f @ inverse
        weight = weight + inverse @ f.T @ (targets - f @ weight)
    torch.testing.assert_close(alone(RAW).state["weight"], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "strategy",
    [RAW, RanPAC(), RanPAC(ridge=1e-6, bias=1.0), RanPAC(projection=300, seed=4)],
    ids=repr,
)
def test_ranpac_logits_do_not_depend_on_order_or_client_split(strategy):
    """Features are float32 and rounded by the shape of their batch; a small ridge amplifies it."""
    assert difference(strategy) < (1e-5 if strategy.ridge >= 1e-3 else 1e-3)


def test_ranpac_without_the_last_experience_has_other_logits():
    """The comparison of orders cannot miss a head of fewer records."""
    few = learner_of(RAW)
    base = logits(alone(RAW))
    few.prepare(stream_of())
    for index in range(4):
        few.begin(index)
        few.finish()
    assert float((logits(few) - base).abs().max() / base[:, :8].abs().max()) > 1e-2


def test_ranpac_changes_no_parameter_and_stores_no_record():
    learner = learner_of(RAW)
    before = {name: value.detach().clone() for name, value in learner.params.items()}
    learner.fit(stream_of())
    assert all(torch.equal(value, learner.params[name]) for name, value in before.items())
    assert learner.curator.stored == 0


def test_the_ranpac_projection_depends_only_on_the_seed():
    strategy = RanPAC(projection=200, seed=4, normalise=False)
    first, again, other = (
        learner_of(RanPAC(projection=200, seed=s, normalise=False)) for s in (4, 4, 5)
    )
    for learner in (first, again, other):
        learner.prepare(stream_of())
    drawn = first.state["projection"]
    assert (
        drawn.shape == (first.model.feature_size, 200)
        and first.state.rules["projection"] == "local"
    )
    assert torch.equal(drawn, again.state["projection"]) and not torch.equal(
        drawn, other.state["projection"]
    )
    assert abs(float(drawn.mean())) < 0.02 and abs(float(drawn.std()) - 1) < 0.02
    x = stream_of()[0].test.inputs
    expected = (first.model.features(x) @ drawn).clamp(min=0)
    torch.testing.assert_close(strategy.features(first.session.forward, x, first.state), expected)


def test_private_ranpac_makes_one_release_per_experience():
    learner = alone(RanPAC(bias=0.5), privacy=SIMULATED)
    entries = learner.private_sum.ledger.entries
    assert [(entry.purpose, entry.steps, list(entry.scope)) for entry in entries] == [
        ("release:sums of features", 1, [f"experience-{index}"]) for index in range(5)
    ]
    length = math.sqrt(1.25)
    assert [entry.clip_norm for entry in entries] == pytest.approx(
        [math.sqrt(length**4 + 0.49 * length**2)] * 5
    )
    assert float(learner.state["noisy"]) == 5
    assert 5 < learner.private_sum.ledger.worst(1e-5)[1] <= 8


def test_ranpac_does_not_clip_normalised_features():
    """With nearly no noise the released sums are the exact sums."""
    exact = alone(RanPAC(bias=0.5)).state
    noised = alone(
        RanPAC(bias=0.5), privacy=Privacy(noise_multiplier=1e-3, release_noise=1e-3, seed=0)
    ).state
    for name in ("gram", "cross"):
        torch.testing.assert_close(noised[name], exact[name], rtol=1e-3, atol=1e-3)


def test_private_ranpac_still_classifies_digits():
    """178 records per class allow a budget of 8 with few features."""
    assert accuracy(alone(RanPAC(projection=24), privacy=SIMULATED)) > 0.5


def test_private_ranpac_refuses_features_without_a_bound():
    with pytest.raises(
        PrivacyError, match=r"RanPAC .*no bound; set normalise=True, or declare a bound with bound="
    ):
        alone(RAW, privacy=SIMULATED)
    bounded = alone(RanPAC(normalise=False, bound=2.0), privacy=SIMULATED)
    assert [e.clip_norm for e in bounded.private_sum.ledger.entries] == pytest.approx(
        [math.sqrt(1.49)] * 5  # of features over their bound
    )


def test_private_ranpac_clients_add_up_their_noise_counts():
    from perdure.data.client_splits import iid
    from perdure.federated import Federation, run_federation

    def make(number):
        return learner_of(RanPAC(projection=16), privacy=Privacy(noise_multiplier=1.0, seed=3))

    server = run_federation(
        make, iid(stream_of(), clients=2, exact=False), Federation(clients=2, rounds=1)
    )
    assert float(server.learner.state["noisy"]) == 10


def test_ranpac_refuses_a_model_without_feature_size():
    spec = Spec(params={}, num_classes=3, num_experiences=2, feature_size=0, scenario="class")
    with pytest.raises(StrategyError, match="feature_size"):
        RanPAC(projection=4, bias=1.0).init(spec)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, "ranpac.ridge = 0.0"),
        ({"ridge": math.inf}, "ranpac.ridge = inf"),
        ({"bias": -1.0}, "ranpac.bias = -1.0"),
        ({"projection": -1}, "ranpac.projection = -1"),
        ({"bound": 1.0}, "ranpac.bound = 1.0.*normalise=True"),
        ({"bound": -1.0, "normalise": False}, "ranpac.bound = -1.0"),
    ],
)
def test_ranpac_refuses_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        RanPAC(**options)
