"""The digest of simulated noise: an explicit and complete list of fields, independent of printed
forms.
"""

import hashlib
from dataclasses import dataclass, field, fields, replace
from functools import partial

import pytest
import torch
from torch import nn

from helpers.learners import SIMULATED
from perdure.contract.exposure import Exposure
from perdure.contract.plan import MemoryPlan, Plan
from perdure.data.augmentation import shift_and_flip
from perdure.errors import ConfigError
from perdure.learner.noise_digest import (
    VERSION,
    exposure_settings,
    memory_settings,
    module_settings,
    noise_digest,
    plan_settings,
    probe_strategy,
    settings,
)
from perdure.learner.schedules import ReplayedRates
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.private_sum import clipping_settings
from perdure.strategies import EWC, Replay
from perdure.utils.hashing import canonical, canonical_text, digest

PLAN = Plan(memory=MemoryPlan(capacity=10))
OTHER_PLANS = {
    "pool": "all",
    "memory": MemoryPlan(capacity=11),
    "restart": True,
    "trainable": ("head.",),
    "train": False,
    "applies_penalty": False,
}
OTHER_MEMORIES = {
    "capacity": 12,
    "selection": "ring",
    "per_class": 2,
    "batch_size": 3,
    "update": "step",
    "use": "reference",
}
EXPOSURE = Exposure(scope={"a": 0.5}, rate=0.5, pool_size=10.0)
OTHER_EXPOSURES = {"scope": {"b": 0.5}, "rate": 0.25, "pool_size": 11.0, "slots": 2}
OTHER_CLIPPINGS = {"quantile": 0.4, "learning_rate": 0.1, "count_noise": 0.1}


@pytest.mark.parametrize(
    ("settings", "value", "others"),
    [
        (plan_settings, PLAN, OTHER_PLANS),
        (memory_settings, MemoryPlan(capacity=10), OTHER_MEMORIES),
        (exposure_settings, EXPOSURE, OTHER_EXPOSURES),
        (clipping_settings, Adaptive(), OTHER_CLIPPINGS),
    ],
    ids=["plan", "memory", "exposure", "adaptive"],
)
def test_the_noise_digest_depends_on_every_field(settings, value, others):
    assert {own.name for own in fields(value)} == set(others), (
        "a new field belongs into the digest and into this test"
    )
    texts = {
        canonical_text(settings(replace(value, **{name: other}))) for name, other in others.items()
    }
    assert len(texts | {canonical_text(settings(value))}) == len(others) + 1


def test_different_values_have_different_canonical_texts():
    values = [
        1,
        2,
        1.5,
        "1",
        True,
        None,
        (1, 2),
        (2, 1),
        {"a": 1},
        {"a": 2},
        {3},
        torch.tensor([1.0]),
        torch.tensor([2.0]),
        EWC(strength=1.0),
        EWC(strength=2.0),
        Replay(memory_size=5),
        Replay(memory_size=6),
        partial(int, base=2),
        partial(int, base=3),
        shift_and_flip(pixels=1),
        shift_and_flip(pixels=2),
        torch.device("cpu"),
        torch.float32,
    ]
    texts = [canonical_text(value) for value in values]
    assert len(set(texts)) == len(values)
    assert canonical_text(EWC(strength=1.0)) == texts[13]
    assert canonical_text({"b": 1, "a": {2, 1}}) == canonical_text({"a": {1, 2}, "b": 1})


def test_the_canonical_text_of_an_object_does_not_use_its_repr():
    @dataclass(frozen=True)
    class Quiet:
        size: int = field(default=1, repr=False)

        def __repr__(self):
            return "always the same"

    assert canonical(Quiet(size=1)) != canonical(Quiet(size=2))


def test_canonical_text_refuses_objects_without_a_stable_form():
    with pytest.raises(ConfigError, match="object"):
        canonical(object())


def test_module_settings_show_the_arguments_of_a_layer():
    assert module_settings("a", nn.Dropout(0.1)) != module_settings("a", nn.Dropout(0.2))
    assert module_settings("a", nn.ReLU()) != module_settings("a", nn.Tanh())
    assert module_settings("a", nn.Linear(2, 3)) == module_settings("a", nn.Linear(2, 3))


class Counted(torch.optim.lr_scheduler.ExponentialLR):
    """A schedule that counts the steps of all its instances."""

    steps = 0

    def step(self, *args):
        Counted.steps += 1
        super().step(*args)


def decaying(gamma):
    return lambda optimizer, steps: Counted(optimizer, gamma=gamma)


@pytest.fixture
def counted(learner_of):
    Counted.steps = 0
    return learner_of(privacy=SIMULATED, scheduler=decaying(0.9), iterations=12, blocks=4)


def test_the_noise_digest_runs_a_schedule_once_for_all_blocks(counted, toy_stream):
    counted.prepare(toy_stream())
    made = Counted.steps
    counted.begin(0)
    for block in counted.training.remaining_blocks(0, 0):
        counted.train(block)
    # the run takes 12 steps and the replay 12; making each of them takes one
    assert Counted.steps - made == 12 + 12 + 2


def test_the_noise_digest_runs_a_schedule_again_after_a_restore(counted, toy_stream):
    counted.prepare(toy_stream())
    counted.begin(0)
    snapshot = counted.snapshot()
    first = counted.noise_digest()
    counted.scheduler = decaying(0.8)
    assert counted.noise_digest() != first
    counted.scheduler = decaying(0.9)
    counted.restore(snapshot)
    before = Counted.steps
    assert counted.noise_digest() == first
    assert Counted.steps - before >= 12


def test_the_noise_digest_hashes_all_settings(counted, toy_stream):
    counted.prepare(toy_stream())
    counted.begin(0)
    session = counted.session
    snapshot = counted.snapshot()
    optimizer = counted.current_optimizer
    schedule = counted.scheduler(counted.optimizer(counted.params.values()), steps=12)
    rates = ReplayedRates(counted.optimizer, counted.scheduler, 12).rates
    asked = settings(session, snapshot, optimizer, schedule)
    whole = {"version": VERSION, **asked, "scheduler": [*asked["scheduler"], rates]}
    shown = digest({**snapshot.tensors, **probe_strategy(session)})
    expected = hashlib.sha256(canonical_text(whole).encode() + shown).hexdigest()
    assert noise_digest(session, snapshot, optimizer, schedule, canonical_text(rates)) == expected
    assert counted.noise_digest() == expected
