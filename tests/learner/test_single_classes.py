"""Experiences of one class, whose loss is always 0, are refused before training."""

from functools import partial

import pytest
import torch

from perdure.data.records import Records
from perdure.data.scenarios import split
from perdure.errors import ConfigError, StrategyError
from perdure.learner.learner import Learner
from perdure.strategies import (
    ERACE,
    EWC,
    L2P,
    CODAPrompt,
    Combine,
    CWRStar,
    LoRA,
    Naive,
    PackNet,
    find,
    names,
)

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.fixture
def ones(toy_data):
    """Return a function from a scenario to four experiences of one class each."""
    return lambda scenario="class": split(toy_data, scenario=scenario, experiences=4)


@pytest.fixture
def learner_of(toy_model):
    def make(strategy, stream):
        model = strategy.small_model(input_shape=stream.input_shape, num_classes=stream.num_classes)
        return Learner(
            model=model or toy_model(stream),
            strategy=strategy,
            optimizer=SGD,
            iterations=2,
            batch_size=8,
        )

    return make


@pytest.mark.parametrize("name", names())
def test_an_experience_with_one_class_is_refused_in_training(ones, toy_data, learner_of, name):
    stream = ones("task")
    learner = learner_of(find(name).example(), stream)
    pairs = split(toy_data, scenario="task", experiences=2)
    if learner.strategy.plan(pairs[0]).train:
        with pytest.raises((ConfigError, StrategyError), match=r"experience 0\b.* class"):
            learner.prepare(stream)
    else:
        learner.prepare(stream)
    assert not learner.position.begun


@pytest.mark.parametrize(
    "strategy",
    [
        PackNet(),
        CODAPrompt(),
        L2P(),
        LoRA(),
        CWRStar(),
        ERACE(memory_size=12, update="experience"),
        Combine(EWC(strength=1.0), PackNet()),
    ],
    ids=lambda strategy: strategy.name,
)
def test_a_loss_over_the_new_classes_needs_two_new_classes(ones, learner_of, strategy):
    stream = ones()
    text = "learns nothing from experience 0, whose only class is 0: .*2 classes or more"
    with pytest.raises(StrategyError, match=text) as caught:
        learner_of(strategy, stream).prepare(stream)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("strategy", [Naive(), ERACE(memory_size=12)])
def test_experiences_of_one_class_are_learnt_over_all_classes(ones, learner_of, strategy):
    stream = ones()
    learner = learner_of(strategy, stream)
    before = {name: value.clone() for name, value in learner.params.items()}
    learner.fit(stream)
    assert all(not torch.equal(before[name], value) for name, value in learner.params.items())


def test_a_stream_with_one_class_in_all_is_refused(toy_model):
    records = Records(inputs=torch.randn(8, 5), labels=torch.zeros(8, dtype=torch.int64))
    from perdure.data.experience import Experience, Stream

    one = Experience(index=0, train=records, test=records, classes=(0,))
    stream = Stream(
        experiences=(one,), num_classes=1, scenario="domain", name="one", input_shape=(5,)
    )
    learner = Learner(model=toy_model(stream), strategy=Naive(), optimizer=SGD, iterations=2)
    with pytest.raises(ConfigError, match="experience 0 of one has one class, 0"):
        learner.prepare(stream)


def test_packnet_refuses_a_model_without_weights_for_all_tasks(toy_data, toy_model):
    stream = split(toy_data, scenario="class", experiences=2)
    strategy = PackNet(pruned_share=0.001)
    learner = Learner(model=toy_model(stream), strategy=strategy, optimizer=SGD, iterations=2)
    with pytest.raises(StrategyError, match=r"no weight left for experience 1 of 2.*larger model"):
        learner.prepare(stream)
