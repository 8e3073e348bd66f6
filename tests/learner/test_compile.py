"""Models compiled by torch.compile: the option, its refusal, and the same results."""

import pytest
import torch

from helpers.learners import SIMULATED
from perdure.errors import ConfigError


def test_a_compiled_model_is_refused_under_privacy(learner_of):
    with pytest.raises(ConfigError, match="compile = True is not allowed; allowed: False under pr"):
        learner_of(compile=True, privacy=SIMULATED)


@pytest.mark.deep(reason="all devices: compiling takes half a minute")
def test_a_compiled_model_trains_to_the_same_weights(learner_of, toy_stream):
    learners = [learner_of(compile=compiled) for compiled in (False, True)]
    matrices = [each.fit(toy_stream()) for each in learners]
    plain, compiled = (each.model.state_dict() for each in learners)
    assert list(plain) == list(compiled)
    torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*matrices, equal_nan=True, rtol=0, atol=1.0)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
