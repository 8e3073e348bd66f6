"""A private run that is restarted with a change never uses earlier noise on another sum."""

from dataclasses import dataclass, replace

import pytest
import torch

from helpers.learners import refused_then_unseen
from helpers.reference_gradients import (
    PRIVATE,
    Stopped,
    learner_of,
    loss_of,
    opened,
    reserved,
    stopping,
)
from perdure.contract.forward import task_losses
from perdure.strategies import AGEM, DER, GEM, GDumb, Naive
from perdure.strategies.agem import against

RATE = replace(PRIVATE, sampling_rate=0.25)


@pytest.fixture
def twice(toy_stream, toy_model, tmp_path):
    def run(first, second, then=None, **options):
        options = {"folder": tmp_path, "iterations": 6, "privacy": RATE} | options
        with pytest.raises(Stopped):
            learner_of(toy_model(toy_stream()), first, callbacks=[stopping(4)], **options).fit(
                toy_stream()
            )
        changed = options | (then or {})
        if then:  # a setting is seen; go on as if it had not been
            seen = learner_of(toy_model(toy_stream()), second, **changed)
            refused_then_unseen(seen, toy_stream())
        again = learner_of(toy_model(toy_stream()), second, **changed)
        again.fit(toy_stream())
        blocks = [
            (e.purpose, e.first_step, tuple(e.scope))
            for e in again.private_sum.ledger.entries
            if e.purpose in ("gradient", "reference", "reference 0")
        ]
        assert len(blocks) > len(set(blocks))  # what was begun was charged again

    return run


def other(base, **hooks):
    kind = type(
        base.__name__,
        (base,),
        {**hooks, "__module__": base.__module__, "__qualname__": base.__qualname__},
    )
    return dataclass(frozen=True, kw_only=True)(kind)


@pytest.mark.parametrize("strategy", [AGEM(memory_size=12), GEM(memory_size=12)])
def test_a_changed_batch_size_gets_new_noise_after_a_restart(twice, meetings, strategy):
    twice(strategy, strategy, then={"batch_size": 2})
    assert meetings.reused == 0


def test_a_changed_reference_loss_gets_new_noise_after_restart(twice, meetings):
    def references(self, curator, params, state):
        def loss(forward, batch):
            return 3 * task_losses(forward, batch, curator.context)

        return (curator.reference(loss, params),) if curator.context.experience else ()

    twice(AGEM(memory_size=12), other(AGEM, references=references)(memory_size=12))
    assert meetings.reused == 0


def test_a_changed_projection_reuses_no_noise_after_a_restart(twice, meetings):
    def project(self, gradient, references, state):
        return (
            {n: (v + against(gradient, references[0])[n]) / 2 for n, v in gradient.items()}
            if references
            else gradient
        )

    twice(AGEM(memory_size=12), other(AGEM, project=project)(memory_size=12))
    assert meetings.reused == 0


def test_a_changed_loss_of_stored_rows_gets_new_noise(twice, meetings):
    def losses(self, forward, batch, context, state):
        return torch.where(batch.from_memory, 2.0, 1.0) * DER.losses(
            self, forward, batch, context, state
        )

    twice(DER(memory_size=12), other(DER, losses=losses)(memory_size=12))
    assert meetings.reused == 0


def test_a_loss_with_another_gradient_gets_new_noise(twice, meetings):
    def losses(self, forward, batch, context, state):
        loss = task_losses(forward, batch, context)
        return loss.detach() + 3 * (loss - loss.detach())

    twice(Naive(), other(Naive, losses=losses)())
    assert meetings.reused == 0


@pytest.mark.deep(reason="full replay: calibrates and trains two strategies")
@pytest.mark.parametrize("strategy", [AGEM(memory_size=12), GEM(memory_size=12)])
def test_excluded_partitions_have_no_reference_gradient(four, toy_model, strategy):
    privacy = replace(PRIVATE, epsilon=8, delta=1e-5)
    learner = learner_of(toy_model(four), strategy, privacy=privacy, iterations=6)
    assert learner.fit(four).isfinite().all()
    ledger = learner.private_sum.ledger
    left = learner.private_sum.schedule.excluded
    assert left[-1] and ledger.worst(1e-5)[1] <= 8
    assert ledger.entries[-1].scope.keys() == {"experience-3"}


def test_a_reference_has_only_rows_of_its_own_experience(copies, toy_model):
    learner = opened(learner_of(toy_model(copies), GEM(memory_size=24)), copies, 2)
    for k in (0, 1):
        assert learner.session.held.samplers[f"reference {k}"].rows.tasks.unique().tolist() == [k]


def test_a_memory_pool_batch_gets_no_additional_memory_rows(four, toy_model):
    learner = opened(learner_of(toy_model(four), GDumb(memory_size=12), privacy=None), four, 1)
    assert len(learner.session.held.rows) == 12
    assert len(learner.session.held.sample(0)) == 4


@pytest.mark.parametrize("private", [False, True])
def test_training_accepts_an_experience_without_stored_rows(four, toy_model, private):
    learner = learner_of(toy_model(four), GEM(memory_size=2), privacy=PRIVATE if private else None)
    assert learner.fit(four).isfinite().all()
    kept = learner.session.held.memory.rows.tasks.unique().tolist()
    assert len(kept) < 4  # some experience left nothing


@pytest.mark.parametrize("private", [False, True])
def test_the_rows_of_a_reference_are_marked_as_from_memory(four, toy_model, private):
    learner = opened(
        learner_of(toy_model(four), AGEM(memory_size=12), privacy=PRIVATE if private else None),
        four,
        1,
    )
    roles = []

    def losses(forward, batch):
        roles.append(batch)
        return loss_of(learner)(forward, batch)

    if private:
        reserved(learner)
    else:
        learner.session.held.sample(0)
    learner.curator.reference(losses, learner.params)
    assert bool(roles[-1].from_memory.all())


def test_remember_may_store_values_under_any_name(four, toy_model):
    @dataclass(frozen=True, kw_only=True)
    class W(DER):
        def remember(self, forward, batch, state):
            return {"when": batch.ids.float()}

    learner = opened(learner_of(toy_model(four), W(memory_size=12)), four, 1)
    rows = learner.session.held.memory.rows
    assert len(rows) and torch.equal(rows.stored["when"], rows.ids.float())


@pytest.mark.deep(reason="full replay: two whole runs and their restarts")
def test_a_schedule_that_changes_late_gets_new_noise(twice, meetings):
    def lam(late):
        return lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: late if s >= 1007 else 1.0
        )

    twice(Naive(), Naive(), then={"scheduler": lam(0.1)}, scheduler=lam(1.0), iterations=1010)
    assert meetings.reused == 0


def test_a_change_of_the_trained_parameters_gets_new_noise(twice, meetings):
    from perdure.contract.plan import Plan

    twice(Naive(), other(Naive, plan=lambda self, experience: Plan(trainable=("head",)))())
    assert meetings.reused == 0
