"""Frozen, partial and full fine-tuning by the names of parameters."""

import pytest
import torch
from torch import nn

from helpers.learners import SIMULATED, bits, same_bits
from perdure.errors import ConfigError
from perdure.strategies import EWC, Naive


def moved(learner, stream):
    """Return the names of the parameters that training changed."""
    before = bits(dict(learner.model.named_parameters()))
    learner.fit(stream)
    after = dict(learner.model.named_parameters())
    return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("privacy", [None, SIMULATED])
@pytest.mark.parametrize("strategy", [Naive(), EWC(strength=10.0)])
def test_only_the_chosen_parameters_are_trained(learner_of, toy_stream, strategy, privacy):
    learner = learner_of(strategy, fine_tune="head", privacy=privacy)
    assert moved(learner, toy_stream()) == {"head.weight", "head.bias"}


def test_beginnings_of_names_choose_parameters(learner_of, toy_stream):
    learner = learner_of(fine_tune=("head.b", "body."))
    assert "head.weight" not in moved(learner, toy_stream())
    every = set(dict(learner.model.named_parameters()))
    again = learner_of(model=learner.model, fine_tune="all", warm_start=True)
    assert moved(again, toy_stream()) == every


def test_an_unknown_beginning_is_refused_with_the_names(learner_of):
    with pytest.raises(ConfigError, match=r"'tail\.'.*allowed: beginnings of body\..*head\.weight"):
        learner_of(fine_tune=("head.", "tail."))
    with pytest.raises(ConfigError, match="at least one beginning of a name"):
        learner_of(fine_tune=())


def test_fine_tuning_is_part_of_the_settings_of_a_run(learner_of, toy_stream, tmp_path):
    learner = learner_of(fine_tune="head", folder=tmp_path)
    learner.prepare(toy_stream())
    assert learner.fingerprint["fine_tune"] == "head"
    assert learner.session.options == {"fine_tune": "head"}
    learner.close()


def test_a_frozen_body_keeps_its_running_statistics(learner_of, toy_stream):
    stream = toy_stream()
    width = stream[0].train.inputs[0].numel()

    def model():
        torch.manual_seed(0)
        body = nn.Sequential(nn.Flatten(), nn.Linear(width, 6), nn.BatchNorm1d(6), nn.ReLU())
        return nn.Sequential(body, nn.Linear(6, stream.num_classes))

    plain, frozen = model(), model()
    learner_of(model=plain).fit(stream)
    learner_of(model=frozen, fine_tune=("1.",)).fit(stream)
    start = model()[0][2].running_mean
    assert not torch.equal(plain[0][2].running_mean, start)
    assert torch.equal(frozen[0][2].running_mean, start)
    assert not same_bits(bits(frozen[1].state_dict()), bits(model()[1].state_dict()))
