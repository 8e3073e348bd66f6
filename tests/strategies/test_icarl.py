import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from perdure.contract.context import Spec, contexts
from perdure.contract.forward import Forward
from perdure.contract.plan import MemoryPlan
from perdure.data.records import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import ICaRL
from perdure.tasks import MASKED


def learner_of(model, strategy, **changes):
    options = {
        "optimizer": partial(torch.optim.SGD, lr=0.5),
        "iterations": 6,
        "batch_size": 8,
    } | changes
    return Learner(model=model, strategy=strategy, **options)


def finished(learner, stream, experiences=2):
    learner.prepare(stream)
    for index in range(experiences):
        learner.begin(index)
        learner.train(range(learner.training.steps(index)))
        learner.finish()
    return learner


def spec_of(model, scenario="class"):
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    return Spec(params=params, num_classes=4, num_experiences=2, feature_size=6, scenario=scenario)


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


# --------------------------------------------------------------------------- the loss


@pytest.mark.reference
@pytest.mark.parametrize("scenario", ["class", "task"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_icarl_loss_equals_its_formula(toy_stream, toy_model, scenario, temperature):
    """The second experience has rows of both: the teacher answers for classes 0 and 1, labels for 2
    and 3.
    """
    stream = toy_stream(scenario)
    model = toy_model(stream)
    strategy = ICaRL(memory_size=8, temperature=temperature)
    state = strategy.init(spec_of(model, scenario))
    teacher = {
        name: value + 0.3 * torch.randn_like(value)
        for name, value in state.group("teacher").items()
    }
    state = state.replace_group("teacher", teacher)
    at = contexts(stream, "cpu")(1)
    for index in (0, 1):
        batch = Batch.current(stream[index].train, index)
        mine = strategy.losses(Forward(model), batch, at, state)
        students = model(batch.inputs).tolist()
        teachers = Forward(model, teacher)(batch.inputs).tolist()
        for i, label in enumerate(batch.labels.tolist()):
            targets = [sigmoid(teachers[i][c] / temperature) for c in (0, 1)] + [
                float(label == c) for c in (2, 3)
            ]
            pairs = zip(students[i], targets, strict=True)
            expected = -sum(
                t * math.log(sigmoid(z)) + (1 - t) * math.log(1 - sigmoid(z)) for z, t in pairs
            )
            assert mine[i].item() == pytest.approx(expected, rel=1e-4)


def test_the_first_icarl_loss_uses_no_teacher_or_later_class(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    strategy = ICaRL(memory_size=8)
    state = strategy.init(spec_of(model))
    poisoned = state.replace(
        {name: torch.full_like(value, math.nan) for name, value in state.items()}
    )
    batch = Batch.current(stream[0].train, 0)
    at = contexts(stream, "cpu")(0)
    mine = strategy.losses(Forward(model), batch, at, poisoned)
    own = torch.nn.functional.one_hot(batch.labels, 4)[:, :2].float()
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        model(batch.inputs)[:, :2], own, reduction="none"
    )
    torch.testing.assert_close(mine, each.sum(1))
    grad = torch.autograd.grad(mine.sum(), model.head.weight)[0]
    assert not grad[2:].any() and bool((grad[:2].abs().sum(1) > 0).all())


def test_the_icarl_loss_has_no_gradient_for_the_teacher(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    strategy = ICaRL(memory_size=8)
    state = strategy.init(spec_of(model))
    leaves = {name: value.clone().requires_grad_() for name, value in state.items()}
    batch = Batch.current(stream[1].train, 1)
    at = contexts(stream, "cpu")(1)
    loss = strategy.losses(Forward(model), batch, at, state.replace(leaves)).sum()
    assert torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) == (None,) * len(
        leaves
    )


def test_the_icarl_teacher_is_the_model_of_the_last_experience(toy_stream, toy_model):
    stream = toy_stream()
    learner = finished(learner_of(toy_model(stream), ICaRL(memory_size=8)), stream, 1)
    end = {name: value.detach().clone() for name, value in learner.model.named_parameters()}
    learner.begin(1)
    learner.train(range(3))
    assert all(
        torch.equal(value, end[name]) for name, value in learner.state.group("teacher").items()
    )


# --------------------------------------------------------------------------- exemplars


def herded_by_hand(features, most):
    """Return Algorithm 4 in plain loops: rows and their mean at norm 1, one row after another."""
    rows = [row / row.norm() for row in features.double()]
    mean = sum(rows) / len(rows)
    mean = mean / mean.norm()
    chosen = []
    while len(chosen) < min(most, len(rows)):
        gaps = {
            i: float(
                (
                    mean
                    - (sum((rows[j] for j in chosen), torch.zeros_like(mean)) + row)
                    / (len(chosen) + 1)
                ).norm()
            )
            for i, row in enumerate(rows)
            if i not in chosen
        }
        chosen.append(min(gaps, key=gaps.get))
    return chosen


@pytest.mark.reference
def test_icarl_exemplars_approximate_the_class_mean(toy_stream, toy_model):
    """Eight exemplars are kept after the first experience, and the best four of each of two classes
    after the second.
    """
    stream = toy_stream()
    learner = finished(learner_of(toy_model(stream), ICaRL(memory_size=16)), stream, 1)

    def best(index, label, most):
        train = stream[index].train
        own = train.ids[train.labels == label]
        with torch.no_grad():
            chosen = herded_by_hand(
                learner.model.features(train.inputs[train.labels == label]), most
            )
        return own[torch.tensor(chosen)].tolist()

    expected = {label: best(0, label, 8) for label in (0, 1)}
    rows = learner.session.held.memory.rows
    assert {label: rows.ids[rows.labels == label].tolist() for label in (0, 1)} == expected
    learner.begin(1)
    learner.train(range(6))
    learner.finish()
    expected = {label: ids[:4] for label, ids in expected.items()} | {
        label: best(1, label, 4) for label in (2, 3)
    }
    rows = learner.session.held.memory.rows
    assert {label: rows.ids[rows.labels == label].tolist() for label in range(4)} == expected


def test_icarl_pools_exemplars_with_new_records(toy_stream, toy_model):
    stream = toy_stream()
    learner = finished(learner_of(toy_model(stream), ICaRL(memory_size=16)), stream, 1)
    learner.begin(1)
    batches = [learner.session.held.sample(step) for step in range(5)]  # 24 + 16 rows, 8 a step
    assert [len(batch) for batch in batches] == [
        8
    ] * 5 and learner.curator.context.memory_share == 0
    assert torch.cat([batch.tasks for batch in batches]).bincount().tolist() == [16, 24]


# --------------------------------------------------------------------------- means and prediction


def test_icarl_learns_repeated_classes_from_their_labels(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    strategy = ICaRL(memory_size=8)
    everywhere = torch.ones(2, 4, dtype=torch.bool)
    batch = Batch.current(stream[1].train, 1)
    at = replace(contexts(stream, "cpu")(1), task_classes=everywhere, seen=everywhere[0])
    mine = strategy.losses(Forward(model), batch, at, strategy.init(spec_of(model)))
    targets = torch.nn.functional.one_hot(batch.labels, 4).float()
    each = torch.nn.functional.binary_cross_entropy_with_logits(
        model(batch.inputs), targets, reduction="none"
    )
    torch.testing.assert_close(mine, each.sum(1))


@pytest.mark.reference
def test_icarl_predicts_the_nearest_mean_of_exemplars(toy_stream, toy_model):
    stream = toy_stream()
    learner = finished(learner_of(toy_model(stream), ICaRL(memory_size=16)), stream)
    rows = learner.session.held.memory.rows
    model = learner.model
    unit = lambda x: x / x.norm(dim=-1, keepdim=True)  # noqa: E731
    with torch.no_grad():
        exemplars = unit(model.features(rows.inputs))
        means = unit(torch.stack([exemplars[rows.labels == label].mean(0) for label in range(4)]))
        torch.testing.assert_close(learner.state["means"], means)
        assert rows.labels.bincount().tolist() == [4] * 4
        for experience in stream:
            x = experience.test.inputs
            nearest = torch.cdist(unit(model.features(x)), means)
            predicted = learner.predictor(0, after=1)(x)
            torch.testing.assert_close(predicted, -nearest.square(), rtol=1e-4, atol=1e-5)
            assert torch.equal(predicted.argmax(1), nearest.argmin(1))


@pytest.mark.parametrize(("scenario", "allowed"), [("class", {0, 1}), ("task", {2, 3})])
def test_icarl_predicts_no_class_that_is_not_allowed(toy_stream, toy_model, scenario, allowed):
    stream = toy_stream(scenario)
    learner = finished(learner_of(toy_model(stream), ICaRL(memory_size=16)), stream)
    predicted = learner.predictor(1 if scenario == "task" else 0, after=0)(stream[1].test.inputs)
    assert set(predicted.argmax(1).tolist()) <= allowed
    others = sorted(set(range(4)) - allowed)
    assert bool((predicted[:, others] == MASKED).all())


@pytest.mark.parametrize("stretch", [1e-3, 1.0, 1e3])
def test_one_exemplar_changes_icarl_sums_by_at_most_clip_norm(toy_stream, toy_model, stretch):
    """A row is a unit vector for features of any length."""
    stream = toy_stream()
    asked = {}
    learner = learner_of(toy_model(stream), ICaRL(memory_size=16))
    learner.prepare(stream)
    learner.begin(0)
    with torch.no_grad():
        for value in learner.params.values():
            value.mul_(stretch)
    learner.session.held.store(lambda forward, batch: {})

    class Asked:
        statistics = learner.curator.statistics

        def release(self, query, **options):
            asked.update(
                options, rows=query(learner.session.forward, Batch.current(stream[0].train, 0))
            )
            return learner.curator.release(query, **options)

    params = {name: value.detach() for name, value in learner.params.items()}
    learner.strategy.after_experience(Asked(), params, learner.state)
    rows = torch.cat([value.flatten(1) for value in asked["rows"].values()], dim=1)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(24))
    assert asked["clip_norm"] == 1 and asked["over"] == "memory"


def test_private_icarl_has_random_exemplars_and_noisy_means(toy_stream, toy_model):
    stream = toy_stream()
    learner = finished(
        learner_of(
            toy_model(stream), ICaRL(memory_size=16), privacy=Privacy(noise_multiplier=1.0, seed=0)
        ),
        stream,
    )
    rows = learner.session.held.memory.rows
    tags = learner.private_sum.tags
    ids = torch.cat([experience.train.ids for experience in stream])
    assert set(rows.ids.tolist()) == set(ids[tags(ids) < 16 / 48].tolist())
    with torch.no_grad():
        features = torch.nn.functional.normalize(learner.model.features(rows.inputs), dim=1)
    exact = torch.stack([features[rows.labels == label].sum(0) for label in range(4)])
    assert not torch.allclose(learner.state["sums"], exact, atol=0.1)
    torch.testing.assert_close(learner.state["means"].norm(dim=1), torch.ones(4))
    purposes = [entry.purpose for entry in learner.private_sum.ledger.entries]
    assert purposes == ["gradient", "release:class means"] * 2


# --------------------------------------------------------------------------- options


def test_icarl_refuses_a_stream_without_new_classes(toy_stream, toy_model):
    stream = toy_stream("domain")
    with pytest.raises(StrategyError, match="needs new classes in every experience; use Replay"):
        learner_of(toy_model(stream), ICaRL(memory_size=8)).prepare(stream)


def test_icarl_plans_herded_exemplars_pooled_with_new_records(toy_stream):
    first = toy_stream()[0]
    assert ICaRL(memory_size=9, per_class=2).plan(first).memory == MemoryPlan(
        capacity=9, selection="herding", per_class=2, use="pooled"
    )
    assert ICaRL(memory_size="0.36 kB").plan(first).memory.capacity == 10
    assert ICaRL.privacy_cost.memory_releases == 1 and ICaRL.privacy_cost.reuses_past_records


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_icarl_refuses_invalid_options(toy_stream, temperature):
    with pytest.raises(
        ConfigError,
        match=r"icarl\.temperature = .* is not allowed; allowed: a finite number above 0",
    ):
        ICaRL(memory_size=5, temperature=temperature)
    with pytest.raises(ConfigError, match="memory_size = 0"):
        ICaRL(memory_size=0).plan(toy_stream()[0])
