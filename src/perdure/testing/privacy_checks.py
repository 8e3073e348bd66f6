"""Checks of a strategy under privacy: every release is declared, planned and charged.

Records influence a run through releases only.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from perdure.errors import ConformanceError, PrivacyError
from perdure.learner.learner import Learner
from perdure.planning.budget import planned
from perdure.privacy.accounting.charges import merged
from perdure.privacy.private_sum import PrivateSum, Schedule
from perdure.testing.fixtures import (
    SIMULATED,
    NotApplicable,
    StrategyFixture,
    copied,
    differing,
    other_records,
    require,
    run,
)
from perdure.testing.recording_curator import ONCE, RecordingCurator, declared

ANSWERS = ("gradient", "reference", "release", "count", "select")


def private(fixture: StrategyFixture) -> None:
    """Check that a strategy uses records through declared, planned and charged releases only.

    A whole private run is checked, and a second run with the same releases on other records.
    """
    if fixture.strategy.couples_records:
        _refused(fixture)
        raise NotApplicable("the strategy declares couples_records, so privacy refuses it")
    _planned_from_public_facts(fixture)
    trace = list[str]()
    begun = dict[int, int]()

    def listen(point: str, learner: Learner) -> None:
        trace.append(point)
        if point == "experience.begin" and learner.private_sum:
            begun[learner.position.experience] = len(learner.private_sum.ledger.entries)

    learner = fixture.learner(SIMULATED, callbacks=[listen])
    learner.prepare(fixture.stream)
    watched = RecordingCurator(learner.session.hook_curator, step=lambda: learner.curator.step)
    learner.session.hook_curator = watched.curator
    assert learner.private_sum is not None
    answers = _recorded(learner.private_sum)
    run(learner, fixture.stream)
    _asked_as_declared(fixture, watched)
    _charged_as_asked(learner, watched, trace.count("noise.drawn"))
    _reuses_as_declared(fixture, learner, begun[1])
    _same_from_other_records(fixture, learner, answers)


def _refused(fixture: StrategyFixture) -> None:
    try:
        fixture.prepared(SIMULATED)
    except PrivacyError:
        return
    raise ConformanceError(
        "the strategy declares couples_records, but privacy did not refuse it; this is an error "
        "of perdure, please report it"
    )


def _planned_from_public_facts(fixture: StrategyFixture) -> None:
    strategy = fixture.fresh()
    for one, other in zip(fixture.stream, other_records(fixture.stream), strict=True):
        require(
            strategy.plan(one) == strategy.plan(other),
            f"plan() of experience {one.index} changes with its records",
            allowed="a function of the declared size, the declared classes and shapes",
            fix="use experience.train.declared_size and experience.classes",
        )


def _asked_as_declared(fixture: StrategyFixture, watched: RecordingCurator) -> None:
    cost = fixture.strategy.privacy_cost
    for index in range(len(fixture.stream)):
        for kind in ONCE:
            asked = watched.count_of(kind, index)
            said = declared(cost, kind)
            require(
                asked == said,
                f"it asked for {asked} {kind} in experience {index} and declares {said}",
                allowed="what `privacy_cost` declares",
                fix=f"set privacy_cost = PrivacyCost({kind}={asked}), or ask for {said}",
            )
    _references_as_declared(fixture, watched)


def _references_as_declared(fixture: StrategyFixture, watched: RecordingCurator) -> None:
    said = fixture.strategy.privacy_cost.references
    steps = {q.place for q in watched.asked if q.kind == "references"}
    for index, step in sorted(steps):
        there = [q.of for q in watched.asked if q.kind == "references" and q.place == (index, step)]
        for past in range(index):
            asked = there.count(None) + there.count(past)
            require(
                asked == said,
                f"step {step} of experience {index} asked for {asked} reference gradients of "
                "experience "
                f"{past} and declares {said}",
                allowed="what `privacy_cost` declares",
                fix=f"set privacy_cost = PrivacyCost(references={asked}), or ask for {said}",
            )
    require(
        bool(steps) == bool(said),
        f"it asked for reference gradients in {len(steps)} steps and declares {said} a step",
        allowed="what `privacy_cost` declares",
        fix="set privacy_cost = PrivacyCost(references=1) where, and only where, references() asks",
    )


def _charged_as_asked(learner: Learner, watched: RecordingCurator, drawn: int) -> None:
    assert learner.private_sum is not None
    ledger = learner.private_sum.ledger
    gradients = sum(learner.training.steps(index) for index in range(len(learner.stream)))
    charged = sum(entry.steps for entry in ledger.entries)
    asked = gradients + sum(q.times for q in watched.asked)
    # the choices of one selection are drawn together
    drawn += sum(q.times - 1 for q in watched.asked)
    require(
        drawn == charged == asked,
        f"noise was drawn {drawn} times, {charged} draws were charged and {asked} requested",
        allowed="one draw and one charge for everything asked",
        fix="ask the curator that the hook is given",
    )
    for partition, history in planned(learner.training, Schedule(noise=(1.0,))).items():
        spent = merged(ledger.charges(partition))
        require(
            spent == merged(history),
            f"{partition} was charged {spent}, planned were {merged(history)}",
            allowed="the plan, which calibrates the noise",
            fix="make privacy_cost and plan() say what the hooks do",
        )


def _reuses_as_declared(fixture: StrategyFixture, learner: Learner, since: int) -> None:
    assert learner.private_sum is not None
    first = fixture.stream[0].train.partition
    said = fixture.strategy.privacy_cost.reuses_past_records
    later = any(first in entry.scope for entry in learner.private_sum.ledger.entries[since:])
    require(
        later == said,
        f"records of experience 0 are {'used' if later else 'not used'} later "
        f"and reuses_past_records={said}",
        allowed="what `privacy_cost` declares",
        fix=f"set privacy_cost = PrivacyCost(reuses_past_records={later})",
    )


# ---------------------------------------------------------------- the same answers on other records

Answer = tuple[Any, Any, float]
"""Result of a release, the last gradient of the private sum, and its clip norm at that time."""


def _recorded(mechanism: PrivateSum) -> list[Answer]:
    answers: list[Answer] = []

    def recording(real: Callable[..., Any]) -> Callable[..., Any]:
        def answer(*args: Any, **facts: Any) -> Any:
            said = real(*args, **facts)
            kept = said.clone() if isinstance(said, Tensor) else copied(said)
            answers.append((kept, mechanism.last_gradient, mechanism.clip_norm))
            return said

        return answer

    for name in ANSWERS:
        setattr(mechanism, name, recording(getattr(mechanism, name)))
    return answers


def _same_from_other_records(
    fixture: StrategyFixture, first: Learner, answers: list[Answer]
) -> None:
    """Check that all results depend on the records through the releases only.

    Other records with the same releases must give the same bits.
    """
    other = other_records(fixture.stream)
    learner = fixture.prepared(SIMULATED, other)
    mechanism = learner.private_sum
    waiting = iter(answers)
    assert mechanism is not None

    def answer(*_: Any, **__: Any) -> Any:
        said, mechanism.last_gradient, mechanism.clip_norm = next(waiting)
        return said.clone() if isinstance(said, Tensor) else copied(said)

    for name in ANSWERS:
        setattr(mechanism, name, answer)
    run(learner, other)
    require(
        next(waiting, None) is None,
        "how much it asks for changes with the records",
        allowed="what `privacy_cost` declares",
        fix="decide from public facts what to ask for",
    )
    wrong = differing(_outcome(first), _outcome(learner))
    require(
        not wrong,
        f"{', '.join(wrong[:3])} changes with the records although every release is the same",
        allowed="a function of releases and public facts",
        fix="reach records through curator.release(query, ...) only",
    )


def _outcome(learner: Learner) -> dict[str, Tensor]:
    model = {f"parameter {name}": value for name, value in learner.model.state_dict().items()}
    with torch.no_grad():
        logits = learner.predictor(0, after=len(learner.stream) - 1)(learner.stream[0].test.inputs)
    return (
        model
        | {f"state {name}": value for name, value in learner.state.items()}
        | {"a prediction": logits}
    )
