"""Predictions and scores that a user asks a learner for."""

from dataclasses import replace

import pytest
import torch

from perdure.data.records import Records
from perdure.errors import ConfigError, PrivacyError
from perdure.learner import evaluate_with
from perdure.privacy.settings import Privacy
from perdure.strategies import ICaRL
from perdure.tasks import SingleLabel
from perdure.utils import chunking


@pytest.fixture(scope="module")
def rows():
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(0))


def test_learner_predict_uses_the_nearest_mean_of_icarl(learner_of, toy_stream):
    stream = toy_stream("class")
    learner = learner_of(ICaRL(memory_size=8), stream)
    learner.fit(stream)
    inputs = stream[0].test.inputs
    features = torch.nn.functional.normalize(learner.model.features(inputs), dim=1)
    nearest = torch.cdist(features, learner.state["means"]).argmin(1)
    found = learner.predict(inputs)
    assert torch.equal(stream.task.predictions(found), nearest)
    assert not found.requires_grad
    assert not torch.equal(found, learner.model(inputs))


@pytest.mark.parametrize("scenario", ["class", "task"])
def test_score_equals_the_last_row_of_the_accuracy_matrix(learner_of, toy_stream, scenario):
    stream = toy_stream(scenario)
    learner = learner_of(stream=stream)
    learner.fit(stream)
    learner.model.train()
    asked = [None if scenario == "class" else e.index for e in stream]
    found = [learner.score(e.test, experience=i) for e, i in zip(stream, asked, strict=True)]
    assert found == learner.matrix[-1]
    assert learner.model.training


def test_predict_computes_many_rows_in_pieces(learner_of, toy_stream, rows, monkeypatch):
    learner = learner_of(stream=toy_stream("class"))
    learner.prepare(toy_stream("class"))
    whole = learner.predict(rows)
    monkeypatch.setattr(chunking, "MOST_ROWS", 3)
    assert torch.allclose(learner.predict(rows), whole)
    assert learner.predict(rows[:0]).shape == (0, whole.shape[1])


@pytest.mark.parametrize(
    ("scenario", "inputs", "experience", "message"),
    [
        ("class", torch.zeros(2, 5), 0, "experience = 0 is not allowed; allowed: None"),
        ("task", torch.zeros(2, 5), None, "experience = None is not allowed; allowed: 0 to 1"),
        ("task", torch.zeros(2, 5), 2, "experience = 2"),
        ("class", torch.zeros(2, 4), None, r"'\(2, 4\) in torch.float32'.*\(n, 5\)"),
        ("class", torch.zeros(2, 5).double(), None, "torch.float64.*torch.float32"),
        ("class", [[0.0]], None, "inputs = 'list' is not allowed; allowed: a tensor"),
    ],
)
def test_predict_refuses_inputs_and_tasks_unlike_the_stream(
    learner_of, toy_stream, scenario, inputs, experience, message
):
    learner = learner_of(stream=toy_stream(scenario))
    learner.prepare(toy_stream(scenario))
    with pytest.raises(ConfigError, match=message):
        learner.predict(inputs, experience=experience)


def test_score_refuses_private_training_records(learner_of, toy_stream):
    stream = toy_stream("class")
    learner = learner_of(
        stream=stream, optimizer=torch.optim.SGD, privacy=Privacy(noise_multiplier=1.0, seed=0)
    )
    learner.prepare(stream)
    with pytest.raises(PrivacyError, match=r"records are training records.*public test"):
        learner.score(stream[1].train)
    assert 0 <= learner.score(stream[1].test) <= 100
    plain = learner_of(stream=stream)
    plain.prepare(stream)
    assert 0 <= plain.score(stream[1].train) <= 100


def test_no_number_of_private_training_records_is_given(learner_of, toy_stream):
    """Neither under another name, nor without ids, nor as the test records of another stream."""
    stream = toy_stream("class")
    learner = learner_of(
        stream=stream, optimizer=torch.optim.SGD, privacy=Privacy(noise_multiplier=1.0, seed=0)
    )
    learner.prepare(stream)
    train = stream[0].train
    leaky = replace(stream, experiences=tuple(replace(each, test=each.train) for each in stream))
    for measure in (
        lambda: learner.score(replace(train, inputs=train.inputs.clone(), partition="mine")),
        lambda: learner.score(Records(inputs=train.inputs, labels=train.labels)),
        lambda: learner.predict(train.inputs),
        lambda: learner.evaluate(leaky),
        lambda: learner.session.evaluate(leaky),
        lambda: evaluate_with(learner, leaky, {}),
    ):
        with pytest.raises(PrivacyError, match="are training records of a model with privacy"):
            measure()
    assert len(learner.evaluate(stream)) == len(stream)


def test_score_refuses_objects_that_are_no_records_of_the_task(learner_of, toy_stream, rows):
    learner = learner_of(stream=toy_stream("class"))
    learner.prepare(toy_stream("class"))
    with pytest.raises(ConfigError, match="records = 'Tensor' is not allowed"):
        learner.score(rows)
    records = Records(inputs=rows, labels=torch.zeros(7, dtype=torch.int64), task=SingleLabel())
    assert 0 <= learner.score(records) <= 100
