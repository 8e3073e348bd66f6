"""The toy problem for Avalanche and for a learner, with the same new rows."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from helpers.parties import opened_party
from perdure.avalanche.benchmarks import from_avalanche
from perdure.learner.learner import Learner
from perdure.strategies.naive import Naive

BATCH = 10
EPOCHS = 2


@pytest.fixture(scope="module")
def avalanche():
    """Import the package, which warns about packages of its own that are no longer maintained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import avalanche.training
    return avalanche


@pytest.fixture
def benchmark(avalanche, toy_data):
    """From a scenario to a benchmark of Avalanche with two experiences of 24 records."""
    options = {
        "class": {"task_labels": False},
        "task": {"task_labels": True},
        "domain": {"task_labels": False, "class_ids_from_zero_in_each_exp": True},
    }

    def make(scenario):
        parts = []
        for records in (toy_data.train, toy_data.test):
            parts.append(TensorDataset(records.inputs, records.labels))
            parts[-1].targets = records.labels.tolist()
        from avalanche.benchmarks import nc_benchmark

        return nc_benchmark(*parts, 2, shuffle=False, **options[scenario])

    return make


class SameBatches:
    """Give Avalanche the new rows that a learner draws in each experience."""

    def __init__(self, stream, model, epochs=EPOCHS):
        self.learner = Learner(
            model=model,
            strategy=Naive(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            epochs=epochs,
            batch_size=BATCH,
        )
        self.learner.prepare(stream)

    def before_training_exp(self, template, **_):
        learner = self.learner
        index = template.experience.current_experience
        held, _ = opened_party(learner.stream, learner.model, experience=index, batch_size=BATCH)
        drawn = [held.sample(step) for step in range(learner.training.steps(index))]
        template.dataloader = [
            [rows.inputs, rows.labels, torch.zeros_like(rows.labels)] for rows in drawn
        ]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


@pytest.fixture
def template(avalanche):
    """From a model and plugins to an Avalanche strategy."""

    def make(model, *plugins, kind=None, evaluator=None, **options):
        options = {"train_mb_size": BATCH, "train_epochs": 1, "eval_mb_size": 64} | options
        kind = kind or avalanche.training.templates.SupervisedTemplate
        return kind(
            model=model,
            optimizer=adam(model.parameters()),
            criterion=options.pop("criterion", nn.CrossEntropyLoss()),
            plugins=list(plugins),
            evaluator=evaluator or quiet(),
            **options,
        )

    return make


def quiet(*metrics):
    """An evaluator without loggers."""
    from avalanche.training.plugins import EvaluationPlugin

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return EvaluationPlugin(*metrics)


def accuracies():
    from avalanche.evaluation.metrics import accuracy_metrics

    return quiet(accuracy_metrics(experience=True))


def assert_close(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], msg=lambda text, name=name: f"{name}: {text}", **tolerance
        )


def learnt(strategy, benchmark, toy_model):
    """A learner that was trained on the benchmark, and its accuracy matrix."""
    stream = from_avalanche(benchmark)
    learner = Learner(
        model=toy_model(stream),
        strategy=strategy,
        optimizer=adam,
        epochs=EPOCHS,
        batch_size=BATCH,
        seed=0,
    )
    return learner, learner.fit(stream)
