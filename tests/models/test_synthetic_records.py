"""Synthetic records from the generator of a trained model."""

import pytest
import torch

from perdure.errors import ConfigError
from perdure.models import generative, mlp, synthetic_records


@pytest.fixture(scope="module")
def model():
    classifier = mlp(input_shape=(1, 2, 3), num_classes=4, hidden=(5,), seed=0)
    return generative(classifier, input_shape=(1, 2, 3), latent=2, hidden=(6,), seed=0)


def test_synthetic_records_are_labelled_by_the_classifier(model):
    made = synthetic_records(model, count=30, seed=1)
    assert made.inputs.shape == (30, 1, 2, 3) and bool(
        ((made.inputs > 0) & (made.inputs < 1)).all()
    )
    assert torch.equal(made.labels, model(made.inputs).argmax(1))
    assert len(torch.unique(made.ids)) == 30 and made.declared_size == 30


def test_synthetic_records_follow_from_the_seed(model):
    first, again, other = (synthetic_records(model, count=5, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.ids, again.ids)
    assert not torch.isin(first.ids, other.ids).any()
    assert not torch.equal(first.inputs, other.inputs)


def test_a_private_learner_would_refuse_synthetic_records(model):
    assert synthetic_records(model, count=1).coupled_by == "synthetic_records(...)"


def test_a_model_without_generator_is_refused(model):
    with pytest.raises(ConfigError, match=r"model = 'Classifier' .*generative"):
        synthetic_records(mlp(input_shape=(3,), num_classes=2, seed=0), count=1)
    with pytest.raises(ConfigError, match="count = 0"):
        synthetic_records(model, count=0)
