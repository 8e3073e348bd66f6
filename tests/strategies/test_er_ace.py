import math

import pytest
import torch

from perdure.contract.context import Context, contexts
from perdure.contract.forward import Forward
from perdure.contract.plan import MemoryPlan
from perdure.contract.state import State
from perdure.data.records import Batch
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import ERACE


def entropy(logits, classes, label):
    """Return -log of the softmax over `classes`, in plain Python."""
    return -logits[label] + math.log(sum(math.exp(logits[c]) for c in classes))


@pytest.fixture
def mixed(toy_stream):
    """Return a stream and a batch of 6 new rows of the second experience and 3 stored rows of the
    first.
    """

    def make(scenario):
        stream = toy_stream(scenario)
        new = Batch.current(stream[1].train, 1).take(slice(6))
        old = Batch.current(stream[0].train, 0).take(slice(3))
        tensors = {
            name: torch.cat([value, old.tensors()[name]]) for name, value in new.tensors().items()
        }
        return stream, Batch.from_tensors(tensors | {"from_memory": torch.arange(9) >= 6})

    return make


CLASSES = {  # of a new row, and of a stored one
    "class": ((2, 3), (0, 1, 2, 3)),
    "task": ((2, 3), (0, 1)),
    "domain": ((0, 1), (0, 1)),
}


@pytest.mark.reference
@pytest.mark.parametrize("scenario", CLASSES)
@pytest.mark.parametrize("share", [0.0, 1 / 3])
def test_er_ace_masks_only_new_rows_to_classes_of_the_experience(mixed, toy_model, scenario, share):
    stream, batch = mixed(scenario)
    model = toy_model(stream)
    at = contexts(stream, "cpu")(1, memory_share=share)
    mine = ERACE(memory_size=5).losses(Forward(model), batch, at, State())
    of_new, of_stored = CLASSES[scenario]
    each = [
        entropy(row, of_stored if stored else of_new, label)
        for row, stored, label in zip(
            model(batch.inputs).tolist(),
            batch.from_memory.tolist(),
            batch.labels.tolist(),
            strict=True,
        )
    ]
    if share:
        assert mine.mean().item() == pytest.approx(sum(each[:6]) / 6 + sum(each[6:]) / 3, rel=1e-5)
    else:
        assert mine.tolist() == pytest.approx(each, rel=1e-5)


def test_er_ace_gives_new_rows_no_gradient_for_old_classes(mixed, toy_model):
    stream, batch = mixed("class")
    model = toy_model(stream)
    at = contexts(stream, "cpu")(1)
    losses = ERACE(memory_size=5).losses(Forward(model), batch, at, State())
    of_new, of_stored = (
        torch.autograd.grad(part.sum(), model.head.weight, retain_graph=True)[0]
        for part in (losses[:6], losses[6:])
    )
    assert not of_new[:2].any() and bool((of_new[2:].abs().sum(1) > 0).all())
    assert bool((of_stored.abs().sum(1) > 0).all())


def test_er_ace_masks_use_declared_classes_not_those_in_a_batch():
    """The batch has one of the two classes, and the other one still competes."""
    table = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1]]).bool()
    at = Context(scenario="class", experience=1, task_classes=table, seen=table.any(0))
    logits = torch.tensor([[5.0, 5.0, 1.0, 1.0]] * 2)
    batch = Batch(
        inputs=logits,
        labels=torch.tensor([2, 2]),
        ids=torch.arange(2),
        tasks=torch.ones(2).long(),
        from_memory=torch.zeros(2).bool(),
        valid=torch.ones(2).bool(),
    )
    losses = ERACE(memory_size=5).losses(lambda x: x, batch, at, State())
    torch.testing.assert_close(losses, torch.full((2,), math.log(2)))


def test_er_ace_is_cross_entropy_in_the_first_experience(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    at = contexts(stream, "cpu")(0)
    batch = Batch.current(stream[0].train, 0)
    expected = torch.nn.functional.cross_entropy(
        model(batch.inputs)[:, :2], batch.labels, reduction="none"
    )
    torch.testing.assert_close(
        ERACE(memory_size=5).losses(Forward(model), batch, at, State()), expected
    )


def test_private_er_ace_gives_new_and_stored_rows_equal_weight(toy_stream, toy_model):
    stream = toy_stream()
    seen = []

    def look(point, learner):
        if point == "step.gradient":
            seen.append(learner.curator.context.memory_share)

    privacy = Privacy(noise_multiplier=1.0, seed=0, sampling_rate=0.5)
    learner = Learner(
        model=toy_model(stream),
        strategy=ERACE(memory_size=16),
        optimizer=torch.optim.SGD,
        iterations=4,
        batch_size=6,
        privacy=privacy,
        callbacks=[look],
    )
    learner.fit(stream)
    assert seen == [0.0] * 8
    assert [entry.scope for entry in learner.private_sum.ledger.entries] == [
        {"experience-0": 0.5},
        {"experience-0": 0.5, "experience-1": 0.5},
    ]


def test_er_ace_plans_a_reservoir(toy_stream):
    first = toy_stream()[0]
    assert ERACE(memory_size=9, batch_size=3).plan(first).memory == MemoryPlan(
        capacity=9, selection="reservoir", batch_size=3, update="step"
    )
    assert ERACE(memory_size="0.36 kB", update="experience").plan(first).memory == MemoryPlan(
        capacity=10, selection="reservoir"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 0}, "memory_size = 0"),
        ({"memory_size": "much"}, "memory_size = 'much'"),
        (
            {"memory_size": 5, "update": "daily"},
            "er_ace.update = 'daily' is not allowed; allowed: experience, step",
        ),
    ],
)
def test_er_ace_refuses_invalid_options(toy_stream, options, message):
    with pytest.raises(ConfigError, match=message):
        ERACE(**options).plan(toy_stream()[0])
