"""Records and curator of one party on a stream, with its model, ledger and trace."""

from dataclasses import replace

import pytest

from helpers.parties import open_experience, private_sum_of
from perdure.contract.forward import task_losses
from perdure.contract.plan import MemoryPlan, Plan
from perdure.curator.held_records import HeldRecords
from perdure.curator.local_curator import LocalCurator
from perdure.privacy.settings import Privacy

REPLAY = Plan(memory=MemoryPlan(capacity=1000))


def declared(stream, *sizes):
    parts = zip(stream, sizes, strict=True)
    experiences = tuple(replace(e, train=replace(e.train, declared_size=size)) for e, size in parts)
    return replace(stream, experiences=experiences)


class Bench:
    """Records and curator of one party on a stream, with model, ledger and the order of events."""

    def __init__(self, stream, model, *, privacy=None, batch_size=8, seed=0):
        self.stream = stream
        self.model = model
        self.trace = []
        self.params = dict(model.named_parameters())
        self.private_sum = privacy and private_sum_of(stream, privacy, trace=self.trace)
        self.held = HeldRecords(seed=seed, batch_size=batch_size, private_sum=self.private_sum)
        self.curator = LocalCurator(self.held)

    @property
    def ledger(self):
        return self.private_sum.ledger

    def open(self, index=0, plan=None, steps=range(0)):
        """Open an experience, with these steps charged, and return this bench."""
        open_experience(self.held, self.stream, self.model, experience=index, plan=plan)
        if len(steps):
            self.held.reserve(steps, "start")
        return self

    def whole(self, index=0, plan=None, remember=lambda forward, batch: {}, **options):
        """Run an experience from beginning to end."""
        self.open(index, plan, **options)
        self.finish(remember)

    def finish(self, remember=lambda forward, batch: {}):
        self.held.store(remember)
        self.held.close()

    def gradient(self, batch, step=0):
        losses = lambda forward, rows: task_losses(forward, rows, self.curator.context)  # noqa: E731
        return self.curator.gradient(losses, self.params, batch, step)


@pytest.fixture
def bench(toy_stream, toy_model):
    def make(privacy=None, stream=None, model=None, **options):
        stream = stream or toy_stream()
        return Bench(stream, model or toy_model(stream), privacy=privacy, **options)

    return make


def simulated(**changes):
    return Privacy(**{"noise_multiplier": 1.0, "seed": 0} | changes)
