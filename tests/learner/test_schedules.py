"""Learning-rate schedules: a new one for every experience, and refusals in one line."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

from helpers.learners import bits, same_bits
from perdure.errors import ConfigError
from perdure.learner import WarmUp
from perdure.learner.schedules import ReplayedRates
from perdure.strategies import GDumb, Joint, Naive

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def one_cycle(optimizer, steps):
    return OneCycleLR(optimizer, 0.5, total_steps=steps)


def cosine(optimizer, steps):
    return CosineAnnealingLR(optimizer, T_max=steps)


@pytest.fixture
def rates_of(learner_of, toy_stream):
    """Return a function from a schedule to the learning rates and momenta of every experience."""

    def run(scheduler, strategy=None, **options):
        found = {}

        def look(point, learner):
            if point == "step.sampled":
                group = learner.current_optimizer.param_groups[0]
                steps = found.setdefault(learner.position.experience, [])
                steps.append((float(group["lr"]), group["momentum"]))

        settings = {"optimizer": SGD, "iterations": 6, "callbacks": [look]} | options
        learner_of(strategy or Naive(), scheduler=scheduler, **settings).fit(toy_stream())
        return list(found.values())

    return run


def expected(scheduler, steps=6):
    optimizer = SGD([torch.nn.Parameter(torch.zeros(1))])
    schedule = scheduler(optimizer, steps)
    found = []
    for _ in range(steps):
        group = optimizer.param_groups[0]
        found.append((float(group["lr"]), group["momentum"]))
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("scheduler", [one_cycle, cosine])
def test_every_experience_has_a_whole_learning_rate_schedule(rates_of, scheduler, reset):
    found = rates_of(scheduler, reset_optimizer=reset)
    assert found == [expected(scheduler)] * 2
    assert len(set(found[0])) == 6


def test_momentum_is_kept_when_a_schedule_restarts(learner_of, toy_stream):
    learner = learner_of(scheduler=cosine, optimizer=SGD)
    seen = []

    def look(point, learner):
        if point == "experience.begin":
            seen.append(len(learner.current_optimizer.state))

    learner.callbacks = [look]
    learner.fit(toy_stream())
    assert seen == [0, len(learner.params)]


def test_a_schedule_gets_the_number_of_steps_of_its_experience(rates_of):
    asked = []

    def scheduler(optimizer, steps):
        asked.append(steps)
        return cosine(optimizer, steps)

    options = {"iterations": None, "epochs": 2, "batch_size": 4}
    found = rates_of(scheduler, Joint(), **options)
    lengths = [len(rates) for rates in found]
    assert lengths[1] == 2 * lengths[0]
    assert asked[-2:] == lengths  # before them it is tried
    assert [rates[0][0] for rates in found] == [0.1, 0.1]


def test_an_experience_without_steps_has_no_schedule(rates_of):
    found = rates_of(one_cycle, GDumb(memory_size=12))
    assert found[-1] == expected(one_cycle)


def of_another(optimizer, steps):
    return cosine(SGD([torch.nn.Parameter(torch.zeros(1))]), steps)


REFUSED = {
    "plateau": (lambda optimizer, steps: ReduceLROnPlateau(optimizer), "needs no measured loss"),
    "partial": (partial(StepLR, step_size=3), "steps=4.* fails: .*'steps'.*T_max=steps"),
    "class": (ExponentialLR, "steps=4.* fails: .*T_max=steps"),
    "options": (lambda optimizer, steps: one_cycle(optimizer, -1), "steps=4.* fails: Expected"),
    "nothing": (lambda optimizer, steps: None, "'NoneType' is not allowed.*T_max=steps"),
    "other optimiser": (of_another, "CosineAnnealingLR of another optimiser"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unusable_schedule_is_refused_before_a_folder_is_made(
    learner_of, toy_stream, tmp_path, name
):
    scheduler, text = REFUSED[name]
    learner = learner_of(scheduler=scheduler, optimizer=SGD, folder=tmp_path / "run")
    with pytest.raises(ConfigError, match=text) as caught:
        learner.fit(toy_stream())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_schedule_that_ends_too_early_is_refused_by_name(learner_of, toy_stream):
    short = learner_of(scheduler=lambda optimizer, steps: one_cycle(optimizer, 2), optimizer=SGD)
    with pytest.raises(ConfigError, match=r"OneCycleLR fails after a step: Tried.*T_max=steps"):
        short.fit(toy_stream())


@pytest.mark.parametrize("then", [None, cosine])
def test_a_warm_up_rises_to_the_rate_then_follows_the_schedule(then):
    rates = ReplayedRates(SGD, WarmUp(steps=0.4, then=then), 10).rates
    assert rates[:4] == pytest.approx([0.025, 0.05, 0.075, 0.1])
    rest = ReplayedRates(SGD, then, 6).rates if then else [0.1] * 6
    assert rates[4:] == pytest.approx(rest)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_a_warm_up_of_any_length_can_be_made(steps):
    rates = ReplayedRates(SGD, WarmUp(steps=steps, then=cosine), 10).rates
    assert len(rates) == 10 and max(rates) <= 0.1 + 1e-9
    assert all(one < other for one, other in pairwise(rates[:steps]))


@pytest.mark.parametrize("steps", [0, -1, 1.5, True, "2"])
def test_wrong_numbers_of_warm_up_steps_are_refused(steps):
    with pytest.raises(ConfigError, match=r"steps = .* is not allowed"):
        WarmUp(steps=steps)


def test_a_run_with_a_warm_up_resumes_bit_identically(learner_of, toy_stream, tmp_path):
    def end(folder, callbacks=()):
        learner = learner_of(
            blocks=2, folder=folder, scheduler=WarmUp(steps=0.75, then=cosine), callbacks=callbacks
        )
        learner.fit(toy_stream())
        return bits(learner.snapshot().tensors)

    def stop(point, learner):
        if point == "block.begin" and learner.position.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        end(tmp_path / "stopped", [stop])
    assert same_bits(end(tmp_path / "stopped"), end(tmp_path / "whole"))
