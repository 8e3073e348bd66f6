"""What every strategy promises, whatever it does. A new file in strategies/ is tested once examples.py lists it."""

import dataclasses
from functools import partial

import pytest
import torch
from examples import EXAMPLES, example
from torch import nn

from perdure import strategies
from perdure.budget import planned
from perdure.combine import Combine
from perdure.learner import Learner
from perdure.privacy.accounting import merged
from perdure.privacy.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping import Clip, clipped_sum
from perdure.privacy.mechanism import Schedule
from perdure.privacy.policy import Privacy
from perdure.queries import gradient_rows
from perdure.strategy import Forward, State

CLIP_NORM = 0.5


every = pytest.mark.parametrize("name", strategies.names())


@pytest.fixture
def learner_of(toy_stream, toy_model):
    def make(name, **changes):
        options = {"optimizer": partial(torch.optim.Adam, lr=0.02), "iterations": 6, "batch_size": 8, "blocks": 2}
        stream = toy_stream()
        learner = Learner(model=toy_model(stream), strategy=example(name), **options | changes)
        learner.prepare(stream)
        return learner

    return make


def do(learner, index, blocks=2):
    learner.begin(index)
    for number in range(blocks):
        learner.train(learner.block(number, learner.blocks))


@pytest.fixture
def second(learner_of):
    """A learner in the middle of its second experience, with everything that it remembers in place."""

    def make(name, **changes):
        learner = learner_of(name, **changes)
        do(learner, 0)
        learner.finish()
        do(learner, 1, blocks=1)
        return learner

    return make


def whole_batch(learner):
    """Every row of the open pool; memory rows with all they store."""
    learner.model.eval()
    return learner.curator._pool


def losses_of(learner):
    return lambda forward, batch: learner.strategy.losses(forward, batch, learner.curator.context, learner.state)


def test_every_file_has_an_example_and_every_example_a_file():
    assert sorted(EXAMPLES) == list(strategies.names())


@every
def test_it_runs_alone(learner_of, toy_stream, name):
    matrix = learner_of(name, iterations=150).fit(toy_stream())
    assert matrix.shape == (2, 2) and matrix[0, 0] > 80 and matrix[1, 1] > 40
    assert name.replace("_", "") == example(name).name.lower() and isinstance(hash(example(name)), int)
    fields = ", ".join(f"{f.name}={getattr(example(name), f.name)!r}" for f in dataclasses.fields(example(name)))
    assert repr(example(name)) == f"{example(name).name}({fields})"


@every
def test_the_loss_of_a_row_depends_on_that_row_only(second, name):
    learner = second(name)
    batch, losses = whole_batch(learner), losses_of(learner)
    assert not example(name).couples_records, "its example declares that it couples records"
    whole = losses(learner.forward, batch).detach()
    assert whole.shape == (len(batch),)
    changed = batch.map(lambda rows: rows.clone())
    changed.inputs[1::2] = 1 - changed.inputs[1::2]
    changed.labels[1::2] = changed.labels[1::2].flip(0)
    torch.testing.assert_close(losses(learner.forward, changed)[::2].detach(), whole[::2])
    for i in range(0, len(batch), 7):
        alone = losses(learner.forward, batch.take(slice(i, i + 1))).detach()
        torch.testing.assert_close(alone, whole[i : i + 1], rtol=1e-4, atol=1e-6)


@every
def test_one_record_moves_the_clipped_sum_by_at_most_c(second, name):
    """Both ways in which the sum is formed: record by record, and by book-keeping over the whole batch."""
    learner = second(name)
    batch, losses, params = whole_batch(learner), losses_of(learner), learner.params

    def by_rows(rows):
        return clipped_sum(gradient_rows(losses, learner.model), params, rows.tensors(), Clip(norm=CLIP_NORM), 10)

    def by_bookkeeping(rows):
        return clipped_gradient_sum(
            learner.model, params, lambda: losses(learner.forward, rows), len(rows), Clip(norm=CLIP_NORM)
        )  # fmt: skip

    for clipped in (by_rows, by_bookkeeping):
        whole = clipped(batch)
        for dropped in range(0, len(batch), 7):
            neighbour = clipped(batch.take(torch.arange(len(batch)) != dropped))
            moved = torch.stack([(whole[key] - neighbour[key]).square().sum() for key in whole]).sum().sqrt()
            assert 0 < float(moved) <= CLIP_NORM * (1 + 1e-4)


def stacked(tensors):
    """Three versions of every tensor, the first as it is."""
    place = torch.Generator().manual_seed(4)
    return {
        name: torch.stack([value, *(value + 0.1 * torch.randn(value.shape, generator=place).to(value) for _ in "ab")])
        for name, value in tensors.items()
    }


@every
def test_hooks_on_tensors_run_for_many_replicas_at_once(second, name):
    learner = second(name)
    strategy, rules = learner.strategy, learner.state.rules
    if strategy.not_vmappable_because:
        assert " " in strategy.not_vmappable_because
        return
    batch, at = whole_batch(learner), learner.curator.context
    params = stacked({key: value.detach() for key, value in learner.params.items()})
    later = {key: value + 0.01 for key, value in params.items()}
    states = stacked(learner.state)

    def hooks(now, then, remembered):
        state = State(remembered, rules)
        penalty = strategy.penalty(now, state)
        return {
            "losses": strategy.losses(Forward(learner.model, now), batch, at, state),
            "penalty": torch.zeros(()) if penalty is None else penalty,
            "predict": strategy.predict(Forward(learner.model, now), batch.inputs, at, state),
            **{f"projected.{key}": value for key, value in strategy.project(now, (), state).items()},
            **{f"state.{key}": value for key, value in strategy.after_step(now, then, now, state).items()},
        }

    together = torch.func.vmap(hooks)(params, later, states)
    for i in range(3):
        alone = hooks(*({key: value[i] for key, value in each.items()} for each in (params, later, states)))
        assert alone.keys() == together.keys()
        for key, value in alone.items():
            torch.testing.assert_close(together[key][i], value, rtol=1e-4, atol=1e-5)


@every
@pytest.mark.parametrize("private", [False, True])
def test_stopped_in_the_middle_it_goes_on_to_the_same_bits(second, learner_of, toy_stream, name, private):
    privacy = Privacy(noise_multiplier=1.0, seed=0) if private else None
    first = second(name, privacy=privacy)
    again = learner_of(name, privacy=privacy)
    again.restore(first.snapshot())
    again.begin(1)
    for learner in (first, again):
        learner.train(learner.block(1, 2))
        learner.finish()
    assert again.evaluate(toy_stream()) == first.evaluate(toy_stream())
    mine, theirs = again.snapshot(), first.snapshot()
    assert mine.facts == theirs.facts
    for here, there in ((mine.tensors, theirs.tensors), (mine.private, theirs.private)):
        assert here.keys() == there.keys()
        assert [key for key in here if not torch.equal(here[key], there[key])] == []


@every
def test_under_privacy_every_touch_is_in_the_ledger(learner_of, toy_stream, name):
    trace, planned_asks = [], example(name).asks
    learner = learner_of(
        name, privacy=Privacy(noise_multiplier=1.0, seed=0), callbacks=[lambda point, _: trace.append(point)]
    )
    trace.clear()
    learner.fit(toy_stream())
    ledger = learner.mechanism.ledger
    draws = sum(entry.steps for entry in ledger.entries)
    steps = 6 if example(name).plan(toy_stream()[0]).train else 0
    once = planned_asks.releases + planned_asks.recalls + planned_asks.histograms + planned_asks.selections
    assert trace.count("noise.drawn") == draws == 2 * steps + steps * planned_asks.references + 2 * once
    for partition, history in planned(learner, Schedule(noise=(1.0,))).items():
        assert merged(ledger.charges(partition)) == merged(history)
    joint = {partition for entry in ledger.entries if "experience-1" in entry.scope for partition in entry.scope}
    beside = {partition for entry in ledger.entries if "reference" in entry.purpose for partition in entry.scope}
    assert ("experience-0" in joint | beside) == planned_asks.reuses


@every
def test_combined_with_nothing_it_is_itself(learner_of, toy_stream, name):
    alone = learner_of(name)
    combined = learner_of(name)
    combined.strategy = Combine(example(name), strategies.find("naive")())
    assert torch.equal(alone.fit(toy_stream()), combined.fit(toy_stream()))
    ends = [learner.model.state_dict() for learner in (alone, combined)]
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@every
def test_it_works_with_a_model_that_normalises_and_drops_out(toy_stream, name):
    stream = toy_stream()
    body = nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Dropout(0.2))
    from perdure.models import Classifier

    learner = Learner(
        model=Classifier(body, 8, 4), strategy=example(name), optimizer=torch.optim.SGD, iterations=2, batch_size=8,
        privacy=Privacy(noise_multiplier=1.0, seed=0),
    )  # fmt: skip
    assert learner.fit(stream).isfinite().all()
