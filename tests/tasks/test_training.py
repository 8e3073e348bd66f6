"""Every task end to end: alone, in a federation and under privacy, with strategies that support
it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from helpers.task_streams import TASKS, learner_of, model_of, stream_of
from perdure import Privacy, strategies
from perdure.adversarial import FGSM
from perdure.auditing import lira
from perdure.auditing.canaries import Audited, with_canaries
from perdure.contract import Combine, Forward, Strategy
from perdure.contract.context import contexts
from perdure.contract.forward import task_losses
from perdure.data import Batch, iid
from perdure.errors import ConfigError, GuardError
from perdure.federated import Federation, run_federation
from perdure.metrics import forgetting
from perdure.privacy.clipping.clip import Clip
from perdure.queries import clipped_gradient
from perdure.strategies import EWC, NCM, LwF, Naive, Replay
from perdure.tasks import MultiLabel, NextToken, Regression, SingleLabel, Task

every = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
others = pytest.mark.parametrize("task", TASKS[1:], ids=lambda task: task.name)


def better(task: Task, one: float, other: float) -> bool:
    return one > other if task.metric.higher_is_better else one < other


def untrained(task: Task) -> list[float]:
    learner = learner_of(task)
    learner.prepare(stream_of(task))
    return learner.evaluate(stream_of(task))


@every
def test_each_task_is_learnt_and_its_forgetting_measured(task):
    stream = stream_of(task)
    matrix = learner_of(task).fit(stream)
    start = untrained(task)
    assert better(task, float(matrix[0, 0]), start[0])
    assert better(task, float(matrix[1, 1]), start[1])
    lost = forgetting(matrix, metric=task.metric)
    assert lost == pytest.approx(abs(float(matrix[0, 0] - matrix[1, 0]))) and lost > 0
    kept = learner_of(task, Replay(memory_size=32)).fit(stream)
    assert forgetting(kept, metric=task.metric) < lost


@others
def test_each_task_is_learnt_by_a_federation(task):
    stream = stream_of(task)
    clients = iid(stream, clients=2)
    server = run_federation(
        lambda number: learner_of(task, iterations=8, blocks=4),
        clients,
        Federation(clients=2, rounds=4),
    )
    matrix = server.learner.matrix
    assert better(task, matrix[0][0], untrained(task)[0])
    assert better(task, matrix[1][1], untrained(task)[1])


@pytest.mark.deep(reason="deployment: a private federation of every task")
@others
def test_each_task_is_learnt_by_a_private_federation(task):
    clients = iid(stream_of(task), clients=2, exact=False)

    def make(number):
        private = Privacy(noise_multiplier=0.3, clip_norm=2.0, seed=number)
        return learner_of(task, LwF(), iterations=12, blocks=4, privacy=private)

    server = run_federation(make, clients, Federation(clients=2, rounds=4))
    assert better(task, server.learner.matrix[0][0], untrained(task)[0])


@others
def test_each_task_is_learnt_under_privacy(task):
    stream = stream_of(task)
    private = Privacy(noise_multiplier=0.3, clip_norm=2.0, seed=0)
    learner = learner_of(task, privacy=private, iterations=12)
    matrix = learner.fit(stream)
    assert better(task, float(matrix[1, 1]), untrained(task)[1])
    assert learner.private_sum.ledger.statement(1e-5).epsilon > 0


@others
def test_the_gradient_of_all_targets_of_a_record_is_clipped_once(task):
    stream = stream_of(task)
    batch = Batch.current(stream[0].train.take(torch.arange(9)), 0)
    context = contexts(stream, "cpu")(0)
    model = model_of(task)
    params = dict(model.named_parameters())
    losses = lambda forward, rows: task_losses(forward, rows, context)  # noqa: E731
    found = clipped_gradient(Forward(model), losses, params, batch, Clip(norm=0.5), None)
    expected = [torch.zeros_like(value) for value in params.values()]
    norms = []
    for i in range(len(batch)):
        row = losses(Forward(model), batch.take(slice(i, i + 1))).sum()
        gradient = torch.autograd.grad(row, list(params.values()))
        norm = torch.cat([value.flatten() for value in gradient]).norm()
        norms.append(float(norm))
        for total, value in zip(expected, gradient, strict=True):
            total += value * (0.5 / norm).clamp(max=1)
    assert max(norms) > 0.5
    for value, total in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(value, total, rtol=1e-4, atol=1e-5)


@others
def test_fisher_information_is_the_mean_over_whole_records(task):
    stream = stream_of(task)
    learner = learner_of(task, EWC(strength=0.0), iterations=1)
    learner.prepare(stream)
    learner.begin(0)
    learner.train(next(iter(learner.training.remaining_blocks(0, 0))))
    learner.finish()
    model = learner.model
    batch = Batch.current(stream[0].train, 0)
    context = contexts(stream, "cpu")(0)
    expected = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for i in range(len(batch)):
        row = task_losses(Forward(model), batch.take(slice(i, i + 1)), context).sum()
        gradient = torch.autograd.grad(row, list(model.parameters()))
        for total, value in zip(expected.values(), gradient, strict=True):
            total += value.square() / len(batch)
    for name, value in learner.state.group("fisher").items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


@others
def test_canaries_have_valid_targets_of_the_task(task):
    stream = with_canaries(stream_of(task), 0, torch.tensor([7, 8]))
    rows = stream[0].train.labels[-2:]
    task.check(rows)
    assert torch.equal(rows[0], rows[1])
    Audited(inner=Naive(), first=7, canaries=2, loudness=1.0).refuse_task(task)
    with pytest.raises(ConfigError, match="NCM does not"):
        Audited(inner=NCM(), first=7, canaries=2, loudness=1.0).refuse_task(task)


def served(name: str) -> Strategy:
    return strategies.find(name).example()


def pairs() -> list[tuple[str, Task]]:
    return [(name, task) for name in strategies.names() for task in TASKS[1:]]


def plain_model(strategy: Strategy) -> bool:
    return strategy.small_model(input_shape=(6,), num_classes=4) is None


def test_every_strategy_trains_the_tasks_that_it_supports():
    trained = set()
    for name, task in pairs():
        strategy = served(name)
        if isinstance(task, strategy.tasks) and plain_model(strategy):
            stream = stream_of(task)
            if name == "packnet":
                stream = replace(stream, scenario="task")
            matrix = learner_of(task, strategy, iterations=1).fit(stream)
            assert matrix.isfinite().all(), (name, task)
            trained.add((name, task.name))
    assert len(trained) > 40


def test_every_strategy_refuses_the_tasks_it_does_not_support():
    for name, task in pairs():
        strategy = served(name)
        if not isinstance(task, strategy.tasks):
            with pytest.raises(ConfigError, match=f"does not support {task.name} records: it"):
                learner_of(task, strategy).prepare(stream_of(task))
            assert strategy.tasks_because != Strategy.tasks_because, name
    with pytest.raises(ConfigError, match="strategy NCM does not support regression records"):
        learner_of(Regression(), Combine(Naive(), NCM())).prepare(stream_of(Regression()))


def test_exact_fisher_information_is_refused_for_other_tasks():
    assert EWC(strength=1.0).form_for(MultiLabel(), 4) == "empirical"
    with pytest.raises(ConfigError, match=r"ewc\.fisher = 'exact'.*for next-token records"):
        learner_of(NextToken(), EWC(strength=1.0, fisher="exact")).prepare(stream_of(NextToken()))


def test_model_outputs_of_the_wrong_shape_for_a_task_are_refused():
    stream = stream_of(NextToken())
    model = torch.nn.Sequential(
        torch.nn.Embedding(6, 4), torch.nn.Flatten(), torch.nn.Linear(20, 6)
    )
    with pytest.raises(ConfigError, match=r"\(2, 6\).*\(2, 5, 6\), one row for every record"):
        learner_of(NextToken(), model=model).prepare(stream)


def test_attacks_refuse_unsupported_inputs_and_tasks():
    with pytest.raises(ConfigError, match=r"adversary = FGSM.*inputs are torch\.int64"):
        learner_of(NextToken(), adversary=FGSM(epsilon=0.1)).prepare(stream_of(NextToken()))
    records = stream_of(MultiLabel())[0].train
    with pytest.raises(ConfigError, match="membership inference does not support multi-label"):
        lira(lambda x: x, lambda *_: None, records, torch.arange(len(records)) < 3)


def with_task(stream, task: Task):
    """Return the same stream with records of another task."""
    parts = []
    for experience in stream:
        train = replace(experience.train, task=task)
        test = replace(experience.test, task=task)
        parts.append(replace(experience, train=train, test=test))
    return replace(stream, experiences=tuple(parts))


@dataclass(frozen=True, kw_only=True)
class Ordinal(Regression):
    """A user's own task: levels 0 to 3 as numbers, measured as regression."""

    name: ClassVar[str] = "ordinal"

    def balance_groups(self, targets):
        return targets[:, 0].round().long()


def test_a_users_own_task_trains_and_balances_memory():
    task = Ordinal()
    stream = stream_of(Regression())
    parts = []
    for experience in stream:
        levels = experience.train.labels.clamp(-1, 1).round()
        parts.append(replace(experience, train=replace(experience.train, labels=levels)))
    stream = with_task(replace(stream, experiences=tuple(parts)), task)
    learner = learner_of(task, Replay(memory_size=12), iterations=2)
    assert learner.fit(stream).isfinite().all()
    levels = learner.session.held.memory.rows.labels[:, 0]
    assert torch.unique(levels, return_counts=True)[1].tolist() == [4, 4, 4]


@dataclass(frozen=True, kw_only=True)
class Ranked(Regression):
    """A task whose loss compares the records of a batch."""

    name: ClassVar[str] = "ranked"

    def losses(self, outputs, targets, mask=None):
        return (outputs - outputs.mean(0) - targets).square().mean(1)


def test_the_guard_inspects_a_users_own_task():
    stream = stream_of(Regression())
    private = Privacy(noise_multiplier=1.0, seed=0)
    with pytest.raises(GuardError, match="Naive"):
        learner_of(Ranked(), privacy=private).prepare(with_task(stream, Ranked()))
    for task, proof in ((Regression(), "by construction"), (Ordinal(), "tested")):
        learner = learner_of(task, privacy=private)
        learner.prepare(with_task(stream, task))
        assert learner.session.path.foreign_parts() == (
            () if proof == "by construction" else ("the task Ordinal",)
        )
        assert learner.session.inspection().verdict().independence == proof


SELDOM = [
    (Regression(), lambda targets: targets.abs() > 10),
    (MultiLabel(), lambda targets: ~targets.any(1)),
    (NextToken(), lambda targets: (targets == NextToken().padding).all(1)),
]


@dataclass(frozen=True, kw_only=True)
class CouplesBySeldomTargets(Naive):
    """Losses that are doubled if a record of the batch has a rare target."""

    def losses(self, forward, batch, context, state):
        seldom = next(rule for task, rule in SELDOM if task == context.task)
        return super().losses(forward, batch, context, state) * (1 + seldom(batch.labels).any())


@others
def test_the_guard_refuses_losses_coupled_by_rare_targets(task):
    private = Privacy(noise_multiplier=1.0, seed=0)
    learner = learner_of(task, CouplesBySeldomTargets(), privacy=private)
    with pytest.raises(GuardError, match="couples records: changing the other rows"):
        learner.prepare(stream_of(task))


def test_synthetic_neighbours_have_the_requested_labels():
    rows = learner_of(SingleLabel(), privacy=Privacy(noise_multiplier=1.0, seed=0))
    rows.prepare(stream_of(SingleLabel()))
    synthetic = rows.session.inspection().rows
    facts = synthetic.facts(1, 6, neighbours=True)
    domain = rows.session.inspection().domain_of(1)
    batch = synthetic.batch(1, domain.random(6, torch.Generator()), facts)
    assert torch.equal(batch.labels, facts[:, 0])


def test_synthetic_tokens_of_a_large_vocabulary_are_not_extreme():
    numbers = 50_000 * torch.arange(1, 20_000, 999)  # ids of whole batches, times the vocabulary
    rows = NextToken().synthetic(torch.zeros(1, 8, dtype=torch.int64), range(50_000), numbers)
    assert ((rows != NextToken().padding).sum(1) > 4).all()
