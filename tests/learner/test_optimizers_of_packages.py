"""Optimisers of other packages: curvature-based ones, their state in checkpoints, and refusals."""

from functools import partial

import pytest
import pytorch_optimizer
import torch

from helpers.learners import SIMULATED, bits, same_bits
from perdure.errors import ConfigError
from perdure.experiment import parse
from perdure.strategies import Naive

SOAP = partial(pytorch_optimizer.SOAP, lr=0.01, precondition_frequency=2)
SHAMPOO = partial(pytorch_optimizer.Shampoo, lr=0.01)


class Stop(Exception):  # noqa: N818
    """An exception in place of a power failure."""


def stop_in_second_block(point, learner):
    if point == "block.begin" and learner.position.step > 0:
        raise Stop


@pytest.mark.parametrize(
    ("optimizer", "privacy"),
    [(SOAP, None), (SHAMPOO, SIMULATED)],
    ids=["soap", "shampoo with privacy"],
)
def test_a_preconditioned_run_resumes_to_the_same_bits(
    learner_of, toy_stream, tmp_path, optimizer, privacy
):
    given = {"optimizer": optimizer, "privacy": privacy, "blocks": 2}
    whole = learner_of(folder=tmp_path / "whole", **given)
    whole.fit(toy_stream())
    with pytest.raises(Stop):
        learner_of(folder=tmp_path / "half", callbacks=[stop_in_second_block], **given).fit(
            toy_stream()
        )
    resumed = learner_of(folder=tmp_path / "half", **given)
    resumed.fit(toy_stream())
    assert same_bits(bits(resumed.snapshot().tensors), bits(whole.snapshot().tensors))
    mine = resumed.current_optimizer.state_dict()["state"][0]
    theirs = whole.current_optimizer.state_dict()["state"][0]
    assert {n: type(v) for n, v in mine.items()} == {n: type(v) for n, v in theirs.items()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pytorch_optimizer.AdaHessian, "AdaHessian cannot step from one gradient"),
        (pytorch_optimizer.AliG, "AliG cannot step from one gradient"),
        (pytorch_optimizer.ScalableShampoo, "state pre_conditioner .* 'PreConditioner'"),
        (pytorch_optimizer.LBFGS, "optimizer = 'LBFGS' .* one dense gradient"),
    ],
)
def test_an_optimizer_that_cannot_be_used_is_refused(learner_of, toy_stream, make, message):
    with pytest.raises(ConfigError, match=message):
        learner_of(Naive(), optimizer=make).prepare(toy_stream())


def config(optimizer):
    return f"""
name = "soap"
[training]
optimizer = "{optimizer}"
learning_rate = 0.003
optimizer_options = {{precondition_frequency = 5}}
epochs = 1
[[arms]]
strategy = "naive"
"""


def test_a_config_names_an_optimizer_of_a_package():
    made = parse(config("pytorch_optimizer:SOAP")).training.factory()([torch.zeros(2, 2)])
    assert type(made) is pytorch_optimizer.SOAP
    (group,) = made.param_groups
    assert (group["lr"], group["precondition_frequency"]) == (0.003, 5)


def test_a_config_refuses_an_optimizer_that_is_not_installed():
    with pytest.raises(ConfigError, match=r"cannot be imported .* perdure\[optimizers\]"):
        parse(config("no_such_package:SOAP"))
