"""A curator on a stream, with its model, contexts, ledger and trace."""

from dataclasses import replace

import pytest

from perdure.contract.context import contexts
from perdure.contract.forward import Forward, cross_entropy
from perdure.contract.plan import MemoryPlan, Plan
from perdure.curator.local_curator import LocalCurator
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import PrivateSum, Schedule
from perdure.privacy.settings import Privacy

REPLAY = Plan(memory=MemoryPlan(capacity=1000))


def declared(stream, *sizes):
    parts = zip(stream, sizes, strict=True)
    experiences = tuple(replace(e, train=replace(e.train, declared_size=size)) for e, size in parts)
    return replace(stream, experiences=experiences)


class Bench:
    """A curator on a stream, with its model, contexts, ledger and the trace of what happened in
    which order.
    """

    def __init__(self, stream, model, *, privacy=None, batch_size=8, seed=0):
        self.stream = stream
        self.model = model
        self.trace = []
        self.params = dict(model.named_parameters())
        self.context = contexts(stream, "cpu")
        self.mechanism = self._mechanism(privacy) if privacy else None
        self.curator = LocalCurator(seed=seed, batch_size=batch_size, mechanism=self.mechanism)

    def _mechanism(self, privacy):
        key = NoiseKey.from_seed(privacy.seed)
        self.ledger = Ledger.open(None, key=key, trace=self.trace.append)
        for e in self.stream:
            self.ledger.declare(e.train.partition, e.train.declared_size)
        self.trace.clear()
        schedule = Schedule(noise=(privacy.noise_multiplier,))
        return PrivateSum(privacy=privacy, schedule=schedule, ledger=self.ledger, key=key)

    def open(self, index=0, plan=None, steps=range(0)):
        past = self.stream.experiences[: index + 1]
        self.curator.open(past, plan or Plan(), self.context(index), Forward(self.model))
        if len(steps):
            self.curator.reserve(steps, "start")
        return self.curator

    def whole(self, index=0, plan=None, remember=lambda forward, batch: {}, **options):
        """An experience from beginning to end."""
        self.open(index, plan, **options)
        self.finish(remember)

    def finish(self, remember=lambda forward, batch: {}):
        self.curator.store(remember)
        self.curator.close()

    def gradient(self, batch, step=0):
        losses = lambda forward, rows: cross_entropy(forward, rows, self.curator.context)  # noqa: E731
        return self.curator.gradient(losses, self.params, batch, step)


@pytest.fixture
def bench(toy_stream, toy_model):
    def make(privacy=None, stream=None, model=None, **options):
        stream = stream or toy_stream()
        return Bench(stream, model or toy_model(stream), privacy=privacy, **options)

    return make


def simulated(**changes):
    return Privacy(**{"noise_multiplier": 1.0, "seed": 0} | changes)
