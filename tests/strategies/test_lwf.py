import math

import pytest
import torch

from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.models.classifiers import mlp
from perdure.strategies import LwF
from perdure.testing.fixtures import small_stream

T = 3.0


def softmax(logits, classes, temperature):
    scaled = [math.exp(logits[c] / temperature) for c in classes]
    return {c: value / sum(scaled) for c, value in zip(classes, scaled, strict=True)}


def by_hand(scenario, student, teacher, label, strength):
    """Return one record's loss in the second experience, in plain Python; classes 0, 1 are old and
    2, 3 are new.
    """
    before = [0, 1]
    new = [2, 3]
    width = len(student)
    compete = {"task": new, "class": before + new, "domain": list(range(width))}[scenario]
    cross_entropy = -math.log(softmax(student, compete, 1.0)[label])
    asked = before if scenario != "domain" else list(range(width))
    answering = {"task": before, "class": before + new, "domain": asked}[scenario]
    q = softmax(teacher, asked, T)
    p = softmax(student, answering, T)
    return cross_entropy - strength * sum(q[c] * math.log(p[c]) for c in asked)


@pytest.fixture
def problem(toy_stream, toy_model):
    def make(scenario):
        stream = toy_stream(scenario)
        student = toy_model(stream).eval()
        teacher = {name: value.detach() + 0.3 for name, value in student.named_parameters()}
        teacher["head.weight"] = teacher["head.weight"].flip(0)
        width = stream.num_classes
        return (
            stream,
            student,
            teacher,
            Spec(
                params=teacher,
                num_classes=width,
                num_experiences=2,
                feature_size=6,
                scenario=scenario,
            ),
        )

    return make


@pytest.mark.reference
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_the_lwf_loss_equals_its_formula(problem, scenario):
    stream, student, teacher, spec = problem(scenario)
    strategy = LwF(temperature=T, strength=0.7)
    state = strategy.init(spec)
    batch = Batch.current(stream[1].train, 1)
    at = contexts(stream, "cpu")(1)
    mine = strategy.losses(Forward(student), batch, at, state)
    students = student(batch.inputs).tolist()
    teachers = Forward(student, teacher)(batch.inputs).tolist()
    for i, label in enumerate(batch.labels.tolist()):
        expected = by_hand(scenario, students[i], teachers[i], label, 0.7)
        assert mine[i].item() == pytest.approx(expected, rel=1e-4)


def third_by_hand(scenario, weighting, student, teacher, label, strength):
    """Return one record's loss in the third experience of two classes each, in plain Python."""
    heads = [[0, 1], [2, 3], [4, 5]]
    width = len(student)
    compete = {"task": heads[2], "class": range(width), "domain": range(width)}[scenario]
    pairs = {
        "task": [(h, h) for h in heads[:2]],
        "class": [(range(4), range(6))],
        "domain": [(range(2), range(2))],
    }
    distilled = []
    for asked, answering in pairs[scenario]:
        q = softmax(teacher, asked, T)
        p = softmax(student, answering, T)
        distilled.append(-sum(q[c] * math.log(p[c]) for c in asked))
    cross_entropy = -math.log(softmax(student, compete, 1.0)[label])
    if weighting == "experiences":
        return cross_entropy / 3 + 2 / 3 * strength * T**2 * sum(distilled) / len(distilled)
    return cross_entropy + strength * (2 if scenario == "domain" else 1) * sum(distilled)


@pytest.mark.reference
@pytest.mark.parametrize("weighting", ["sum", "experiences"])
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_lwf_sums_or_averages_old_tasks_in_the_third_experience(scenario, weighting):
    stream = small_stream(scenario)
    student, other = (
        mlp(
            input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(6,), seed=s
        ).eval()
        for s in (0, 1)
    )
    strategy = LwF(temperature=T, strength=0.7, weighting=weighting)
    teacher = {name: 3 * value.detach() for name, value in other.named_parameters()}
    state = strategy.init(
        Spec(
            params=teacher,
            num_classes=stream.num_classes,
            num_experiences=3,
            feature_size=6,
            scenario=scenario,
        )
    )
    batch = Batch.current(stream[2].train, 2)
    at = contexts(stream, "cpu")(2)
    mine = strategy.losses(Forward(student), batch, at, state)
    students = student(batch.inputs).tolist()
    teachers = Forward(student, teacher)(batch.inputs).tolist()
    for i, label in enumerate(batch.labels.tolist()):
        expected = third_by_hand(scenario, weighting, students[i], teachers[i], label, 0.7)
        assert mine[i].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("weighting", ["sum", "experiences"])
@pytest.mark.parametrize("scenario", ["task", "domain", "class"])
def test_lwf_has_no_teacher_in_the_first_experience(problem, scenario, weighting):
    stream, student, _, spec = problem(scenario)
    strategy = LwF(temperature=T, weighting=weighting)
    batch = Batch.current(stream[0].train, 0)
    at = contexts(stream, "cpu")(0)
    poisoned = strategy.init(spec).replace(
        {n: torch.full_like(t, math.nan) for n, t in strategy.init(spec).items()}
    )
    plain = torch.nn.functional.cross_entropy(
        at.mask(student(batch.inputs), batch), batch.labels, reduction="none"
    )
    torch.testing.assert_close(strategy.losses(Forward(student), batch, at, poisoned), plain)


def test_the_lwf_loss_has_no_gradient_for_the_teacher(problem):
    stream, student, _, spec = problem("class")
    strategy = LwF()
    state = strategy.init(spec)
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    batch = Batch.current(stream[1].train, 1)
    at = contexts(stream, "cpu")(1)
    loss = strategy.losses(Forward(student), batch, at, state.replace(leaves)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    assert grads == (None,) * len(leaves)


def test_the_lwf_teacher_is_the_model_of_the_last_experience(toy_stream, toy_model):
    stream = toy_stream()
    ends = []
    seen = []

    def look(point, learner):
        teacher = {name: value.clone() for name, value in learner.state.group("teacher").items()}
        if point == "experience.end":
            ends.append(
                {name: value.detach().clone() for name, value in learner.model.named_parameters()}
            )
        elif point == "step.done":
            seen.append(teacher)

    model = toy_model(stream)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    Learner(
        model=model,
        strategy=LwF(),
        optimizer=torch.optim.Adam,
        iterations=3,
        batch_size=8,
        callbacks=[look],
    ).fit(stream)
    for moment, expected in zip(seen, [start] * 3 + [ends[0]] * 3, strict=True):
        assert all(torch.equal(moment[name], value) for name, value in expected.items())
    assert any(not torch.equal(start[name], value) for name, value in ends[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "lwf.temperature = 0.0"),
        ({"strength": -0.1}, "lwf.strength = -0.1"),
        ({"weighting": "equal"}, "lwf.weighting = 'equal'.*sum, experiences"),
    ],
)
def test_lwf_refuses_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        LwF(**options)
