"""CORAL: the distance of two covariances, and what its target must be."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from perdure import Combine, Learner, Privacy
from perdure.errors import ConfigError, GuardError, StrategyError
from perdure.strategies import EWC, Coral, Naive
from perdure.strategies.coral import covariance_distance
from perdure.testing.conformance import CHECKS
from perdure.testing.fixtures import FEATURES, StrategyFixture


@pytest.fixture(scope="module")
def target_of(tmp_path_factory):
    def write(*shape, name="inputs"):
        path = tmp_path_factory.mktemp("target") / "target.safetensors"
        save_file({name: torch.rand(*shape, generator=torch.Generator().manual_seed(0))}, path)
        return str(path)

    return write


@pytest.fixture
def learner_of(toy_stream, toy_model):
    def make(strategy, **options):
        adam = partial(torch.optim.Adam, lr=0.02)
        given = {"optimizer": adam, "iterations": 40, "batch_size": 32} | options
        return Learner(model=toy_model(toy_stream()), strategy=strategy, **given)

    return make


def test_the_distance_is_that_of_the_covariances():
    draws = torch.Generator().manual_seed(0)
    one, other = torch.randn(9, 4, generator=draws), 2 * torch.randn(6, 4, generator=draws)
    valid = torch.ones(9, dtype=torch.bool)
    valid[-2:] = False
    expected = (torch.cov(one[:7].T) - torch.cov(other.T)).square().sum() / (4 * 16)
    found = covariance_distance(one, valid, other, torch.ones(6, dtype=torch.bool))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("check", ["declared", "alone", "pure", "vmap"])
def test_coral_with_a_target_keeps_the_contract(target_of, check):
    """The checks of every strategy run without a target; these with one."""
    fixture = StrategyFixture(
        strategy=Coral(target=target_of(5, FEATURES), strength=0.5), scenario="class"
    )
    assert not CHECKS[check](fixture)


def test_coral_brings_the_covariances_together(learner_of, toy_stream, target_of):
    stream = replace(toy_stream(), experiences=toy_stream().experiences[:1])
    path = target_of(30, *stream.input_shape)

    def distance(strategy):
        learner = learner_of(strategy)
        learner.fit(stream)
        inputs = (stream[0].test.inputs, load_file(path)["inputs"])
        rows = [learner.model.features(each).detach() for each in inputs]
        everyone = [torch.ones(len(each), dtype=torch.bool) for each in rows]
        return float(covariance_distance(rows[0], everyone[0], rows[1], everyone[1]))

    assert distance(Coral(target=path, strength=1000.0)) < 0.5 * distance(Naive())
    both = learner_of(Combine(Coral(target=path), EWC(strength=1.0)))
    assert both.fit(stream).isfinite().all()


def test_coral_is_refused_under_privacy(learner_of, toy_stream, target_of):
    learner = learner_of(Coral(), privacy=Privacy(noise_multiplier=1.0, seed=0))
    with pytest.raises(GuardError, match="Coral couples the records of a batch"):
        learner.fit(toy_stream())


def test_a_target_that_cannot_be_used_is_refused(learner_of, toy_stream, target_of, tmp_path):
    shape = toy_stream().input_shape
    for path, words in (
        (str(tmp_path / "none.safetensors"), r"coral\.target = .* cannot be used"),
        (target_of(4, *shape, name="rows"), r'cannot be used.*tensor "inputs"'),
        (target_of(1, *shape), "at least 2 rows"),
    ):
        with pytest.raises(ConfigError, match=words):
            learner_of(Coral(target=path)).prepare(toy_stream())
    with pytest.raises(StrategyError, match="the target of Coral has rows of"):
        learner_of(Coral(target=target_of(4, 7))).fit(toy_stream())
    with pytest.raises(ConfigError, match="a finite number, 0 or more"):
        Coral(strength=-1.0)
