from functools import partial

import pytest
import torch

from perdure.data.datasets.digits import digits
from perdure.data.scenarios import split
from perdure.learner.learner import Learner
from perdure.models.classifiers import cnn
from perdure.strategies import LUCIR, BiC, FeatureDistillation, ICaRL, LwF

TEACHERS = [
    LwF(),
    FeatureDistillation(strength=0.1),
    ICaRL(memory_size=20),
    BiC(memory_size=20),
    LUCIR(memory_size=20),
]


@pytest.mark.parametrize("strategy", TEACHERS, ids=lambda strategy: strategy.name)
def test_a_teacher_keeps_the_running_statistics_of_its_model(strategy):
    stream = split(digits(), scenario="class", experiences=5)
    head = "cosine" if strategy.name == "LUCIR" else "linear"
    model = cnn(
        input_shape=stream.input_shape, num_classes=10, seed=0, norm="batch", width=4, head=head
    )
    learner = Learner(
        model=model,
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.05),
        iterations=6,
        batch_size=16,
    )
    learner.prepare(stream)
    x = stream[0].test.inputs
    for index in (0, 1):
        learner.begin(index)
        learner.train(range(6))
        if index:
            break
        learner.finish()
        was = model.eval()(x)
    assert not torch.allclose(model.eval()(x), was, rtol=0.1)
    assert torch.equal(learner.session.forward.at(learner.state.group("teacher"))(x), was)


def test_teachers_of_group_norm_models_store_no_statistics():
    stream = split(digits(), scenario="class", experiences=5)
    model = cnn(input_shape=stream.input_shape, num_classes=10, seed=0, norm="group", width=4)
    learner = Learner(
        model=model, strategy=LwF(), optimizer=partial(torch.optim.SGD, lr=0.05), iterations=1
    )
    learner.prepare(stream)
    assert learner.state.group("teacher").keys() == dict(model.named_parameters()).keys()
