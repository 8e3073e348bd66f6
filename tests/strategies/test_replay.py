import pytest
import torch
import torch.nn.functional as F

from perdure.contract.context import contexts
from perdure.contract.plan import MemoryPlan
from perdure.contract.state import State
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.strategies import Replay


def learner_of(model, strategy, **changes):
    options = {"optimizer": torch.optim.SGD, "iterations": 4, "batch_size": 6} | changes
    return Learner(model=model, strategy=strategy, **options)


def batches(stream, learner):
    """Return (batch, context, gradient) of every step of a run."""
    seen = []
    gradient = {}

    def spy(losses, params, batch, step, ask=None):
        gradient.update(ask(losses, params, batch, step))
        seen.append((batch, learner.curator.context, dict(gradient)))
        return dict(gradient)

    learner.prepare(stream)
    ask = learner.curator.gradient
    learner.curator.gradient = lambda *arguments: spy(*arguments, ask=ask)
    for index in range(len(stream)):
        learner.begin(index)
        learner.train(range(learner.training.steps(index)))
        learner.finish()
    return seen


@pytest.mark.reference
@pytest.mark.parametrize(
    ("stored", "weights"), [(6, (0.5, 0.5)), (3, (0.5, 0.5)), (12, (0.5, 0.5))]
)
def test_replay_weights_do_not_depend_on_the_batch_size(toy_stream, toy_model, stored, weights):
    """The losses of a batch by hand: mean over new rows / t + mean over stored rows * (1 - 1/t)."""
    stream = toy_stream()
    model = toy_model(stream)
    learner = learner_of(model, Replay(memory_size=12, batch_size=stored))
    batch, at, _ = batches(stream, learner)[4]
    assert int(batch.from_memory.sum()) == stored and len(batch) == 6 + stored
    mine = learner.strategy.losses(learner.session.forward, batch, at, State()).mean()
    each = F.cross_entropy(model(batch.inputs), batch.labels, reduction="none")
    expected = (
        weights[0] * each[~batch.from_memory].mean() + weights[1] * each[batch.from_memory].mean()
    )
    torch.testing.assert_close(mine, expected)


def test_replay_gives_new_records_one_third_in_experience_3():
    table = torch.eye(3, dtype=torch.bool)
    from perdure.contract.context import Context
    from perdure.data.records import Batch

    at = Context(
        scenario="class", experience=2, task_classes=table, seen=table.any(0), memory_share=0.25
    )
    batch = Batch(
        inputs=torch.randn(8, 3),
        labels=torch.arange(8) % 3,
        ids=torch.arange(8),
        tasks=torch.zeros(8).long(),
        from_memory=torch.arange(8) >= 6,
        valid=torch.ones(8).bool(),
    )
    each = F.cross_entropy(batch.inputs, batch.labels, reduction="none")
    mine = Replay(memory_size=5).losses(lambda x: x, batch, at, State())
    torch.testing.assert_close(mine.mean(), each[:6].mean() / 3 + each[6:].mean() * 2 / 3)
    equal = Replay(memory_size=5, weighting="equal").losses(lambda x: x, batch, at, State())
    torch.testing.assert_close(equal, each)


def test_replay_equals_plain_training_in_the_first_experience(toy_stream, toy_model):
    stream = toy_stream()
    model = toy_model(stream)
    first = batches(stream, learner_of(model, Replay(memory_size=8)))[0]
    batch, at, _ = first
    assert not batch.from_memory.any() and at.memory_share == 0
    replay = Replay(memory_size=8).losses(lambda x: model(x), batch, at, State())
    torch.testing.assert_close(
        replay, F.cross_entropy(model(batch.inputs)[:, :2], batch.labels, reduction="none")
    )


def test_private_replay_pools_new_and_stored_records(toy_stream, toy_model):
    stream = toy_stream()
    privacy = Privacy(noise_multiplier=1.0, seed=0, sampling_rate=0.5)
    learner = learner_of(toy_model(stream), Replay(memory_size=16), privacy=privacy)
    seen = batches(stream, learner)
    assert all(at.memory_share == 0 for _, at, _ in seen)
    assert any(batch.from_memory.any() for batch, _, _ in seen[4:])
    entries = learner.private_sum.ledger.entries
    assert [entry.scope for entry in entries] == [
        {"experience-0": 0.5},
        {"experience-0": 0.5, "experience-1": 0.5},
    ]


def test_replay_plans_the_given_memory(toy_stream):
    plan = Replay(memory_size=9, selection="reservoir", per_class=2, batch_size=3).plan(
        toy_stream()[0]
    )
    assert plan.memory == MemoryPlan(capacity=9, selection="reservoir", per_class=2, batch_size=3)
    assert (
        Replay(memory_size=9).privacy_cost.reuses_past_records
        and contexts(toy_stream(), "cpu")(0).memory_share == 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_size": 0}, "memory_size = 0"),
        ({"memory_size": 5, "selection": "best"}, "memory selection = 'best'"),
        ({"memory_size": 5, "weighting": "mine"}, "replay.weighting = 'mine'"),
        ({"memory_size": 5, "batch_size": 0}, "memory batch_size = 0"),
    ],
)
def test_replay_refuses_invalid_options(options, message):
    with pytest.raises(ConfigError, match=message):
        Replay(**options)
