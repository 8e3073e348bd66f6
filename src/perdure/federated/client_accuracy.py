"""Accuracy of the global model on the test records of each client, also under attack."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import fmean, pstdev

import torch

from perdure.adversarial import Attack, robustness_by_client
from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.learner.learner import Learner
from perdure.learner.progress import last_accuracies
from perdure.utils.seeding import generator


@dataclass(frozen=True, kw_only=True)
class AccuracyOverClients:
    """Accuracy over the clients that have one, in the unit of the task's metric.

    Args:
        mean: mean over the clients, each with the same weight.
        worst: value of the worst client.
        spread: standard deviation over the clients.
    """

    mean: float
    worst: float
    spread: float


def accuracy_over_clients(
    accuracies: Sequence[float | None], *, higher_is_better: bool = True
) -> AccuracyOverClients | None:
    """Summarise the accuracies of the clients; None if no client has one."""
    known = [each for each in accuracies if each is not None]
    if not known:
        return None
    worst = min(known) if higher_is_better else max(known)
    return AccuracyOverClients(mean=fmean(known), worst=worst, spread=pstdev(known))


def own_accuracies(
    learner: Learner, tests: Sequence[Sequence[Records]], sizes: Sequence[Sequence[int]]
) -> list[float | None]:
    """Evaluate the model on each client's own test records, of the stages so far that it holds.

    Clients with the same test records are evaluated once.

    Guarantee: none. Test records are public.

    Args:
        learner: learner that was evaluated after its last experience.
        tests: test records of every client, one set an experience.
        sizes: declared sizes of every client, one number an experience.

    Returns:
        Mean over the stages by client; None for a client without test records so far.
    """
    return _over_stages(learner, tests, sizes, last_accuracies(learner), learner.evaluate)


def own_robustness(
    learner: Learner,
    tests: Sequence[Sequence[Records]],
    sizes: Sequence[Sequence[int]],
    attack: Attack,
    *,
    known: Sequence[float],
    seed: int,
) -> list[float | None]:
    """Attack the model on each client's own test records, of the stages so far that it holds.

    Clients with the same test records are attacked once, and those with the test records of the
    whole federation not at all, because their accuracies are known.

    Guarantee: none. Test records are public.

    Args:
        learner: learner that was evaluated after its last experience.
        tests: test records of every client, one set an experience.
        sizes: declared sizes of every client, one number an experience.
        attack: attack, with bounds that fit the records.
        known: accuracy under this attack on the learner's own test records, one number a stage so
            far, in percent.
        seed: seed of the attack's random numbers.

    Returns:
        Mean accuracy under attack over the stages by client, in percent; None for a client without
        test records so far.
    """
    last = learner.position.experience - 1

    def attacked(stream: Stream) -> list[float]:
        found = []
        for stage in stream.to(learner.device).stages:
            if stage.first > last or not len(stage.test):
                found.append(math.nan)
                continue
            predict = learner.predictor(stage.latest(last), after=last)
            draws = generator(seed, "attack", stage.number)
            (card,) = robustness_by_client(predict, [stage.test], attack, generator=draws)
            found.append(card.robust_accuracy)
        return found

    return _over_stages(learner, tests, sizes, known, attacked)


def _over_stages(
    learner: Learner,
    tests: Sequence[Sequence[Records]],
    sizes: Sequence[Sequence[int]],
    common_values: Sequence[float],
    measure: Callable[[Stream], Sequence[float]],
) -> list[float | None]:
    """Return the mean of a measure over the stages of each client; None without test records.

    Args:
        learner: learner that was evaluated after its last experience.
        tests: test records of every client, one set an experience.
        sizes: declared sizes of every client, one number an experience.
        common_values: measure of each stage so far on the learner's own test records.
        measure: function from a stream, whose later experiences have no test records, to the
            measure of each stage; NaN for a stage without test records.
    """
    done = learner.position.experience
    common = [each.test for each in learner.stream]
    known = {tuple(map(id, common)): common_values}
    found: list[float | None] = []
    for own, declared in zip(tests, sizes, strict=True):
        key = tuple(map(id, own))
        if key not in known and list(key) == list(map(id, common[: len(own)])):
            known[key] = common_values  # a shorter stream with the same test records
        if key not in known:
            known[key] = measure(_with_tests(learner.stream, own, done))
        held = {
            learner.stream.stage_of(index).number
            for index, size in enumerate(declared[:done])
            if size > 0
        }
        values = [each for n, each in enumerate(known[key]) if n in held and math.isfinite(each)]
        found.append(fmean(values) if values else None)
    return found


def _with_tests(stream: Stream, tests: Sequence[Records], done: int) -> Stream:
    """Return the stream with a client's test records, and none after the first `done` ones."""
    experiences = []
    for index, (experience, test) in enumerate(zip_longest(stream, tests)):
        own = test if test is not None and index < done else _none_of(experience.test)
        experiences.append(replace(experience, test=own))
    return replace(stream, experiences=tuple(experiences))


def _none_of(records: Records) -> Records:
    return records.take(torch.empty(0, dtype=torch.int64, device=records.inputs.device))
