from functools import partial

import pytest
import torch
import torch.nn.functional as F

from helpers.strategy_examples import moved
from perdure.contract.context import contexts
from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.learner.learner import Learner
from perdure.models.classifiers import mlp
from perdure.models.prompts import composed, prompted
from perdure.models.vision_transformer import tiny
from perdure.strategies import CODAPrompt
from perdure.testing import check_strategy


def model_of(stream, experiences=2):
    return composed(
        tiny(stream.input_shape),
        num_classes=stream.num_classes,
        experiences=experiences,
        components=3,
        length=2,
    )


def learner_of(stream, strategy=None, model=None, **changes):
    options = {"optimizer": partial(torch.optim.Adam, lr=0.02), "iterations": 10, "batch_size": 8}
    return Learner(
        model=model or model_of(stream), strategy=strategy or CODAPrompt(), **options | changes
    )


def state_of(done):
    return State({"done": torch.tensor(float(done))}, {"done": "mean"})


@pytest.mark.parametrize("done", [0, 1, 2])
@torch.no_grad()
def test_the_coda_prompt_penalty_equals_the_formula(toy_stream, done):
    """The sum covers known components only; later components do not count."""
    model = moved(model_of(toy_stream(), experiences=3))
    expected = 0.0
    known = [model.body.components[t][0] for t in range(done + 1)]
    for rows in (
        torch.cat([part.prompts.weight.T for part in known]),
        torch.cat([part.keys.weight for part in known]),
        torch.cat([part.attention.weight for part in known]),
    ):
        expected += float((rows @ rows.T - torch.eye(len(rows))).square().sum())
    penalty = CODAPrompt(strength=0.3).penalty(dict(model.named_parameters()), state_of(done))
    assert expected > 1 and float(penalty) == pytest.approx(0.3 * expected, rel=1e-4)


def test_the_coda_prompt_penalty_is_0_at_the_start(toy_stream):
    model = model_of(toy_stream())
    for done in range(2):
        assert (
            float(CODAPrompt().penalty(dict(model.named_parameters()), state_of(done)).detach())
            < 1e-8
        )


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
@torch.no_grad()
def test_coda_prompt_uses_only_components_up_to_the_experience(toy_stream, scenario):
    stream = toy_stream(scenario)
    model = moved(model_of(stream, experiences=3))
    of = contexts(stream, "cpu")
    for index in range(2):
        batch = Batch.current(stream[index].train, index)
        own = slice(2 * index, 2 * index + 2)
        own = slice(None) if scenario == "domain" else own
        logits = model.upto(batch.inputs, index)
        expected = F.cross_entropy(
            logits[:, own], batch.labels - (own.start or 0), reduction="none"
        )
        torch.testing.assert_close(
            CODAPrompt().losses(Forward(model), batch, of(index), State()), expected
        )
        answer = CODAPrompt().predict(Forward(model), batch.inputs, of(index), State())
        assert torch.equal(answer[:, of(index).allowed], logits[:, of(index).allowed])
        assert (answer[:, ~of(index).allowed] < -1e8).all()


@pytest.mark.parametrize(
    "optimizer",
    [
        partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9),
    ],
)
def test_coda_prompt_trains_only_new_components_and_the_head(toy_stream, optimizer):
    stream = toy_stream()
    learner = learner_of(stream, optimizer=optimizer)
    learner.prepare(stream)
    for index in range(2):
        before = {name: value.detach().clone() for name, value in learner.params.items()}
        learner.begin(index)
        learner.train(learner.training.block(learner.position.experience, 0, 1))
        learner.finish()
        changed = {
            name for name, value in learner.params.items() if not torch.equal(value, before[name])
        }
        assert changed == {
            name for name in before if name.startswith(("head.", f"body.components.{index}."))
        }
    assert float(learner.state["done"]) == 2


def test_coda_prompt_with_tasks_keeps_earlier_predictions(toy_stream):
    stream = toy_stream("task")
    answers = []

    def look(point, learner):
        if point == "evaluated":
            with torch.no_grad():
                answers.append(learner.predictor(0, after=len(answers))(stream[0].test.inputs))

    learner_of(stream, reset_optimizer=True, callbacks=[look]).fit(stream)
    assert len(answers) == 2 and torch.equal(*answers)


def test_the_coda_prompt_penalty_keeps_components_orthogonal(toy_stream):
    stream = toy_stream()
    distances = []
    for strength in (0.0, 1.0):
        learner = learner_of(stream, CODAPrompt(strength=strength), iterations=60)
        learner.fit(stream)
        distances.append(
            float(CODAPrompt(strength=1.0).penalty(learner.params, state_of(1)).detach())
        )
    assert distances[1] < 0.2 * distances[0]


@pytest.mark.deep(reason="full replay: the whole contract a second time")
def test_coda_prompt_passes_check_strategy_on_task_streams():
    assert "private" in check_strategy(CODAPrompt(), scenario="task").passed


def test_coda_prompt_refuses_a_model_with_too_few_components(toy_stream):
    stream = toy_stream()
    plain = mlp(input_shape=(5,), num_classes=4, seed=0)
    pool = prompted(tiny((5,)), num_classes=4)
    for model in (plain, pool, model_of(stream, experiences=1)):
        with pytest.raises(
            StrategyError, match=r"CODAPrompt needs .*composed\(backbone, num_classes=4, exp.*=2\)"
        ):
            learner_of(stream, model=model).prepare(stream)


def test_coda_prompt_refuses_a_negative_strength():
    with pytest.raises(ConfigError, match=r"coda_prompt.strength = -0.5"):
        CODAPrompt(strength=-0.5)
