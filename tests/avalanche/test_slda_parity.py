"""SLDA against Avalanche's streaming LDA, on the same records."""

import pytest
import torch
from torch import nn

from helpers.avalanche_harness import BATCH, adam, quiet
from perdure.avalanche.benchmarks import from_avalanche
from perdure.learner.learner import Learner
from perdure.strategies.slda import SLDA

pytestmark = [pytest.mark.reference, pytest.mark.slow]


def test_slda_means_and_covariance_ignore_the_record_order(avalanche, benchmark, toy_model):
    """Avalanche updates the covariance around the current mean, and divides by the number of
    records of all classes for each class.
    """
    made = benchmark("class")
    stream = from_avalanche(made)
    model = toy_model(stream)
    learner = Learner(
        model=model,
        strategy=SLDA(shrinkage=1e-2, scaled=False, normalise=False),
        optimizer=adam,
        epochs=1,
    )
    learner.fit(stream)
    theirs = avalanche.training.StreamingLDA(
        slda_model=Body(model),
        criterion=nn.CrossEntropyLoss(),
        input_size=6,
        num_classes=4,
        shrinkage_param=1e-2,
        train_mb_size=BATCH,
        eval_mb_size=64,
        evaluator=quiet(),
    )
    for experience in made.train_stream:
        theirs.train(experience)
    with torch.no_grad():
        inputs, labels = (
            torch.cat([getattr(e.train, what) for e in stream]) for what in ("inputs", "labels")
        )
        features = model.features(inputs)
    means = learner.state["cross"].T / learner.state["totals"][:, None]
    torch.testing.assert_close(means.float(), theirs.muK, atol=1e-5, rtol=1e-4)
    within = features - theirs.muK[labels]
    covariance = within.T @ within / len(within)
    ours = 0.99 * covariance + 0.01 * torch.eye(6)
    torch.testing.assert_close(
        torch.linalg.inv(ours) @ theirs.muK.T, learner.state["weight"].float(), atol=1e-2, rtol=1e-3
    )
    with torch.no_grad():
        agree = (
            (theirs.predict(features).argmax(1) == learner.predictor(1, after=1)(inputs).argmax(1))
            .float()
            .mean()
        )
    assert agree > 0.9
    assert (theirs.Sigma - covariance).abs().max() > 0.01 * covariance.abs().max()


class Body(nn.Module):
    """The features of a model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model.features(x)
