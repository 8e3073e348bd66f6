"""Learners with reference gradients, and every noise stream with the sums that it was added to."""

from functools import partial

import pytest
import torch

from perdure.contract.forward import task_losses
from perdure.data.scenarios import permuted, split
from perdure.learner.learner import Learner
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import PrivateSum
from perdure.privacy.settings import Privacy
from perdure.strategies import AGEM, GEM

BOTH = pytest.mark.parametrize(
    "strategy", [AGEM(memory_size=12), GEM(memory_size=12)], ids=["agem", "gem"]
)
PRIVATE = Privacy(noise_multiplier=1.0, seed=0)


def learner_of(model, strategy, **changes):
    options = {
        "optimizer": partial(torch.optim.SGD, lr=0.5),
        "iterations": 4,
        "batch_size": 4,
        "privacy": PRIVATE,
    }
    return Learner(model=model, strategy=strategy, **options | changes)


def opened(learner, stream, index=0):
    """Train the experiences before `index` and open that one."""
    learner.prepare(stream)
    for before in range(index):
        learner.begin(before)
        learner.train(range(learner.training.steps(before)))
        learner.finish()
    learner.begin(index)
    return learner


def reserved(learner, steps=range(4)):
    """Return the curator of an open experience with these steps charged and the first one
    sampled.
    """
    learner.session.held.reserve(steps, "start")
    learner.session.held.sample(steps.start)
    return learner.curator


def loss_of(learner, scale=1.0):
    return lambda forward, batch: scale * task_losses(forward, batch, learner.curator.context)


def flat(params):
    return torch.cat([value.detach().flatten() for value in params.values()])


@pytest.fixture
def four(toy_data):
    """Return a stream of four experiences with 12 records of one class each."""
    return split(toy_data, scenario="class", experiences=4)


@pytest.fixture
def copies(toy_data):
    """Return a stream of three permuted copies of the same 48 records."""
    return permuted(toy_data, experiences=3)


class Meetings:
    """Record every noise stream that is drawn, and the sums that it is added to."""

    def __init__(self, monkeypatch):
        self.sums = {}
        self.of = {}
        self._total = None
        # All call the real one and write down what went through: noise and exact sum are seen
        # nowhere else. The sum is taken first, then its noise is drawn.
        monkeypatch.setattr(NoiseKey, "add_noise", self._noting(NoiseKey.add_noise))
        for name in ("gradient", "reference", "release"):
            monkeypatch.setattr(PrivateSum, name, self._keeping(getattr(PrivateSum, name)))

    def _keeping(self, summed):
        def keeping(private_sum, clipped, *rest, **more):
            def kept(clip):
                self._total = clipped(clip)
                return self._total

            return summed(private_sum, kept, *rest, **more)

        return keeping

    def _noting(self, add_noise):
        def noting(key, units, scale, *, purpose, entry, step, **more):
            before = units.clone()
            add_noise(key, units, scale, purpose=purpose, entry=entry, step=step, **more)
            drawn = units - before
            noise = drawn.double() / scale
            exact = torch.zeros_like(noise) if self._total is None else flat(self._total).clone()
            self.sums.setdefault(drawn.numpy().tobytes(), []).append(exact)
            self.of[entry, purpose, step] = noise, exact

        return noting

    @property
    def reused(self):
        """Return the number of noise streams that were added to two different sums."""
        return sum(
            any(not torch.equal(sums[0], other) for other in sums) for sums in self.sums.values()
        )

    def noises(self, prefix):
        return [
            noise for (_, purpose, _), (noise, _) in self.of.items() if purpose.startswith(prefix)
        ]

    def exact(self, purpose):
        return [exact for (_, own, _), (_, exact) in self.of.items() if own == purpose]


@pytest.fixture
def meetings(monkeypatch):
    return Meetings(monkeypatch)


class Stopped(BaseException):
    """An exception in place of the end of the process."""


def stopping(at):
    """Stop after step `at` of the second experience."""

    def look(point, learner):
        if point == "step.done" and (learner.position.experience, learner.position.step) == (1, at):
            raise Stopped

    return look
