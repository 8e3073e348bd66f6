"""A training plan is made from public facts only."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from perdure.learner.learner import Learner
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive

PRIVATE = Privacy(noise_multiplier=1.0, seed=0)


@dataclass(frozen=True, kw_only=True)
class Looking(Naive):
    """A strategy that keeps the experiences that it plans."""

    kept: ClassVar[list] = []

    def plan(self, experience):
        self.kept.append(experience)
        return super().plan(experience)


@pytest.mark.parametrize("privacy", [None, PRIVATE], ids=["exact", "private"])
def test_the_plan_of_a_private_run_gets_no_training_record(privacy, toy_stream, toy_model):
    stream = toy_stream()
    Looking.kept.clear()
    learner = Learner(
        model=toy_model(stream),
        strategy=Looking(),
        optimizer=torch.optim.SGD,
        iterations=2,
        privacy=privacy,
    )
    learner.fit(stream)
    assert Looking.kept
    for seen in Looking.kept:
        own = stream[seen.index].train
        rows = (seen.train.inputs, seen.train.labels, seen.train.ids)
        assert seen.train.declared_size == own.declared_size
        assert seen.train.partition == own.partition and seen.classes == stream[seen.index].classes
        assert [len(value) for value in rows] == [0 if privacy else len(own)] * 3
        # a slice of nothing would still lead to the tensor that it was cut from
        assert not privacy or all(value.untyped_storage().nbytes() == 0 for value in rows)


def test_the_plan_of_an_experience_does_not_depend_on_privacy(toy_stream):
    stream = toy_stream()
    plans = [
        TrainingPlan(stream=stream, strategy=Naive(), batch_size=8, epochs=1, privacy=privacy)
        for privacy in (None, PRIVATE)
    ]
    assert plans[0].of(stream[1]) == plans[1].of(stream[1])
