"""Noise multipliers stored in a folder: computed once, and checked before use."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from perdure.data import split
from perdure.learner import Learner
from perdure.planning.kept_noise import FILE, KeptNoise
from perdure.planning.training_plan import TrainingPlan
from perdure.privacy import Privacy
from perdure.privacy.accounting.accountants import pld_epsilon
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.private_sum import Schedule
from perdure.strategies import Naive, Replay

BUDGET = Privacy(epsilon=3.0, delta=1e-3, seed=0)


@pytest.fixture
def stream(toy_data):
    return split(toy_data, scenario="class", experiences=4)


@pytest.fixture
def calls(toy_model, stream, tmp_path):
    """Prepare a learner as a new process does; return its PLD calls and its noise multipliers."""

    def prepare(privacy=BUDGET, strategy=None, folder=tmp_path / "run", of=stream, **changes):
        options = {"optimizer": partial(torch.optim.SGD, lr=0.5), "epochs": 3, "batch_size": 4}
        learner = Learner(
            model=toy_model(of),
            strategy=strategy or Replay(memory_size=4),
            privacy=privacy,
            folder=folder,
            **options | changes,
        )
        pld_epsilon.cache_clear()
        try:
            learner.prepare(of)
            return pld_epsilon.cache_info().misses, learner.private_sum.schedule.noise
        finally:
            learner.close()

    return prepare


def change(folder, noise):
    """Replace the stored noise multipliers."""
    path = folder / FILE
    kept = json.loads(path.read_text())
    kept["plans"] = dict.fromkeys(kept["plans"], noise)
    path.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    ("privacy", "strategy"),
    [
        (BUDGET, Replay(memory_size=4)),
        (Privacy(epsilon=(1.0, 2.0, 3.0, 1.0), delta=1e-3, seed=0), Naive()),
    ],
    ids=["one budget", "one budget per experience"],
)
def test_a_second_learner_reuses_the_stored_noise_multiplier(calls, privacy, strategy):
    first, noise = calls(privacy, strategy)
    assert first > 0
    assert calls(privacy, strategy) == (0, noise)


def test_stored_noise_that_is_too_weak_is_calibrated_again(calls, tmp_path):
    _, noise = calls(strategy=Naive())
    (tmp_path / "other").mkdir()
    for folder in ("run", "other"):
        kept = (tmp_path / "run" / FILE).read_bytes()
        (tmp_path / folder / FILE).write_bytes(kept)
        change(tmp_path / folder, [0.5 * noise[0]])
        count, found = calls(strategy=Naive(), folder=tmp_path / folder)
        assert count > 0 and found == noise
        plans = json.loads((tmp_path / folder / FILE).read_text())["plans"]
        assert list(plans.values()) == [list(noise)]


@pytest.fixture
def plan(stream):
    def make(privacy=BUDGET, **changes):
        options = {"strategy": Replay(memory_size=4), "batch_size": 4, "epochs": 3} | changes
        return TrainingPlan(stream=stream, privacy=privacy, **options)

    return make


@pytest.mark.parametrize(
    "other",
    [
        {"privacy": replace(BUDGET, epsilon=2.0)},
        {"privacy": replace(BUDGET, epsilon=(3.0,))},
        {"privacy": replace(BUDGET, delta=1e-4)},
        {"privacy": replace(BUDGET, horizon=5)},
        {"privacy": replace(BUDGET, sampling_rate=0.2)},
        {"privacy": replace(BUDGET, spent=(Charge(0.1, 1.0, 3),))},
        {"strategy": Naive()},
        {"epochs": 4},
        {"batch_size": 5},
        {"carried_at_most": (Charge(0.1, 1.0, 3),)},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_stored_noise_of_another_plan_is_not_used(plan, tmp_path, other):
    kept = KeptNoise(tmp_path)
    kept.keep(plan(), Schedule(noise=(2.0,)))
    assert kept.recall(plan()) == Schedule(noise=(2.0,))
    assert KeptNoise(tmp_path).recall(plan(**other)) is None


@pytest.mark.parametrize(
    "privacy",
    [replace(BUDGET, diagnostics="raw"), Privacy(noise_multiplier=1.0, epsilon=3.0, seed=0)],
    ids=["without a grant", "noise given"],
)
def test_noise_without_a_finite_budget_is_not_stored(plan, tmp_path, privacy):
    KeptNoise(tmp_path).keep(plan(privacy), Schedule(noise=(2.0,)))
    assert not (tmp_path / FILE).exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"version": 1}', '{"version": 1, "plans": []}', "\x00", "[" * 100_000],
    ids=["empty", "list", "no version", "no plans", "plans in a list", "bytes", "nested"],
)
def test_a_damaged_file_of_stored_noise_is_ignored(plan, tmp_path, text):
    kept = KeptNoise(tmp_path)
    (tmp_path / FILE).write_text(text)
    assert kept.recall(plan()) is None
    kept.keep(plan(), Schedule(noise=(2.0,)))
    assert kept.recall(plan()) == Schedule(noise=(2.0,))


def test_a_folder_in_place_of_the_stored_noise_file_is_ignored(plan, tmp_path):
    (tmp_path / FILE).mkdir()
    kept = KeptNoise(tmp_path)
    kept.keep(plan(), Schedule(noise=(2.0,)))
    assert kept.recall(plan()) is None


@pytest.mark.parametrize(
    "noise", [[], [1.0, 2.0], [float("nan")], ["1"], [0.0], [-1.0], [1e9], 1.0, None], ids=str
)
def test_an_invalid_value_of_stored_noise_is_ignored(plan, tmp_path, noise):
    kept = KeptNoise(tmp_path)
    kept.keep(plan(), Schedule(noise=(2.0,)))
    change(tmp_path, noise)
    assert kept.recall(plan()) is None


def test_calibrated_noise_is_not_stored_without_a_folder(plan):
    kept = KeptNoise(None)
    kept.keep(plan(), Schedule(noise=(2.0,)))
    assert kept.recall(plan()) is None
