"""Parts of the library with a planted fault that a replay or the ledger must find."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from helpers.faulty_models import Fault
from perdure.curator.known_rows import KnownRows
from perdure.curator.local_curator import LocalCurator
from perdure.curator.memory import Memory, reservoir
from perdure.curator.sampling import PrivateSampler
from perdure.learner.learner import Learner
from perdure.planning.exposure import exposure
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.clipping.clip import WITHIN, Clip
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.private_sum import PrivateSum
from perdure.strategies.agem import AGEM
from perdure.strategies.ewc import EWC
from perdure.strategies.ncm import NCM
from perdure.strategies.replay import Replay
from perdure.testing.replay import without_record

RECORD = 4
"""Id of a record of the first experience."""


class Unclipped(PrivateSum):
    """A private sum that does not clip."""

    def gradient(self, clipped, params, *, step):
        return super().gradient(lambda clip: clipped(replace(clip, norm=1e6)), params, step=step)


class TwiceClipped(PrivateSum):
    """A private sum that clips at twice the bound."""

    def gradient(self, clipped, params, *, step):
        def at_twice(clip):
            return clipped(replace(clip, norm=2 * clip.norm, steps=2 * clip.steps))

        return super().gradient(at_twice, params, step=step)


class ExactVotes(PrivateSum):
    """A clip norm that follows the exact count."""

    def gradient(self, clipped, params, *, step):
        seen = {}

        def noted(clip):
            total = clipped(clip)
            seen.update(total or {WITHIN: torch.zeros(())})
            return total

        before = self.clip_norm
        released = super().gradient(noted, params, step=step)
        self.clip_norm = self.privacy.clipping.updated(before, float(seen[WITHIN]), 12.0)
        return released


class LowRate(PrivateSum):
    """A private sum that records half the sampling rate in the ledger."""

    def reserve(self, *, scope, **facts):
        super().reserve(scope={name: rate / 2 for name, rate in scope.items()}, **facts)


def plant_careless_coins(monkeypatch):
    real = PrivateSampler.positions

    def positions(sampler, mechanism, step):
        wider = replace(sampler.exposure, rate=min(1.0, 1.5 * sampler.exposure.rate))
        return real(replace(sampler, exposure=wider), mechanism, step)

    monkeypatch.setattr(PrivateSampler, "positions", positions)


def plant_realised_divisor(monkeypatch):
    real = LocalCurator.gradient

    def gradient(curator, losses, params, batch, step):
        total = real(curator, losses, params, batch, step)
        share = curator.exposure.expected / max(1, len(batch))
        return {name: value * share for name, value in total.items()}

    monkeypatch.setattr(LocalCurator, "gradient", gradient)


def plant_realised_rate(monkeypatch):
    def realised(experiences, plan, **options):
        counted = [
            replace(e, train=replace(e.train, declared_size=len(e.train))) for e in experiences
        ]
        return exposure(counted, plan, **options)

    monkeypatch.setattr("perdure.curator.held_records.exposure", realised)


def plant_reservoir(monkeypatch):
    def offer(memory, new, tags, threshold):
        capacity = round(threshold * 24)
        place = torch.Generator().manual_seed(0)
        kept = reservoir(len(memory), memory.offered, len(new), capacity, place)
        everything = torch.cat([memory.tags, tags])
        memory.tags = everything[kept]
        memory.rows = new.take(kept) if memory.rows is None else memory.rows
        memory.offered += len(new)

    monkeypatch.setattr(Memory, "offer_by_coin", offer)


def plant_realised_threshold(monkeypatch):
    real = Memory.offer_by_coin

    def offer(memory, new, tags, threshold):
        real(memory, new, tags, threshold * 24 / (8 * (len(new) - 21)))

    monkeypatch.setattr(Memory, "offer_by_coin", offer)


class BareRelease(PrivateSum):
    """A release without noise and without a ledger entry."""

    def release(self, clipped, *, purpose, occasion, shapes, clip_norm):
        zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
        return clipped(Clip(norm=clip_norm)) or zeros


def plant_shared_ids(monkeypatch):
    monkeypatch.setattr(KnownRows, "refuse_shared_ids", lambda self, records: None)


def twins(toy_stream):
    """Put the record into the stream twice, under one id."""
    stream = toy_stream()
    ids = stream[0].train.ids.clone()
    at = int((ids == RECORD).nonzero())
    other = (stream[0].train.labels == stream[0].train.labels[at]).nonzero().flatten()
    ids[int(other[other != at][0])] = RECORD
    train = replace(stream[0].train, ids=ids)
    return replace(stream, experiences=(replace(stream[0], train=train), stream[1]))


def by_position(stream):
    """Remove the record and shift all later ids."""
    fewer = without_record(stream, RECORD)
    parts = []
    for e in fewer:
        ids = torch.where(e.train.ids > RECORD, e.train.ids - 1, e.train.ids)
        train = replace(e.train, ids=ids)
        parts.append(replace(e, train=train))
    return replace(fewer, experiences=tuple(parts))


class StepsOfData(Learner):
    """A plan with as many steps as records."""

    def prepare(self, stream):
        self.iterations = len(stream[0].train) // 8
        super().prepare(stream)


def mean_loss(learner):
    """Return the training loss at the end, as a progress bar shows it."""
    train = learner.stream[0].train
    with torch.no_grad():
        return {"loss": F.cross_entropy(learner.model(train.inputs), train.labels)}


def loss_of_test(learner):
    """Return the loss of the public test records."""
    test = learner.stream[0].test
    with torch.no_grad():
        return {"loss": F.cross_entropy(learner.model(test.inputs), test.labels)}


REPLAY = {
    "a forgotten clip": Fault(kind=Unclipped),
    "a clip at twice the bound": Fault(kind=TwiceClipped),
    "a clip norm that follows the exact count": Fault(
        kind=ExactVotes, privacy={"clipping": Adaptive(count_noise=0.5)}
    ),
    "a wrong rate in the ledger": Fault(kind=LowRate),
    "coins at another rate than charged": Fault(plant=plant_careless_coins),
    "a realised size in the divisor": Fault(plant=plant_realised_divisor),
    "a realised size in the rate": Fault(plant=plant_realised_rate),
    "a realised size in the number of steps": Fault(changes={"kind": StepsOfData}),
    "a memory by reservoir": Fault(plant=plant_reservoir, strategy=Replay(memory_size=8)),
    "a realised size in the threshold of memory": Fault(
        plant=plant_realised_threshold, strategy=Replay(memory_size=8)
    ),
    "a release outside the ledger": Fault(kind=BareRelease, strategy=EWC(strength=1.0)),
    "a record that is counted twice": Fault(plant=plant_shared_ids, strategy=NCM(), stream=twins),
    "ids that follow positions": Fault(neighbour=by_position),
    "a training loss in an output": Fault(outputs=mean_loss, honest_outputs=loss_of_test),
}


class KeyBetween:
    """A key that changes a request before passing it on."""

    def __init__(self, key):
        self._key = key

    def __getattr__(self, name):
        return getattr(self._key, name)


class HalfScale(KeyBetween):
    def add_noise(self, total, scale, **place):
        self._key.add_noise(total, scale / 2, **place)


class OneStep(KeyBetween):
    def add_noise(self, total, scale, *, step, **place):
        self._key.add_noise(total, scale, step=0, **place)


class OneEntry(KeyBetween):
    """A key that draws for entries that are not in the ledger."""

    def add_noise(self, total, scale, *, entry, **place):
        self._key.add_noise(total, scale, entry=entry[::-1], **place)


def with_key(kind):
    """Return a private sum that draws with another key."""

    class Drawing(PrivateSum):
        def __init__(self, *, key, **parts):
            super().__init__(key=kind(key), **parts)

    return Drawing


class LessNoise(PrivateSum):
    """A private sum that lowers its noise multiplier without a ledger entry."""

    def reserve(self, **facts):
        super().reserve(**facts)
        self.noise_multiplier /= 2


class SecondLook(PrivateSum):
    """A private sum that draws noise twice for the same sum and charges once."""

    def release(self, clipped, *, occasion, **facts):
        first = super().release(clipped, occasion=occasion, **facts)
        self.ledger.charge = lambda entry: entry.digest
        again = super().release(
            clipped, occasion=replace(occasion, numbers=range(100, 101)), **facts
        )
        del self.ledger.charge
        return {name: (value + again[name]) / 2 for name, value in first.items()}


def plant_uncharged(monkeypatch):
    real = Ledger.charge

    def charge(ledger, entry):
        return entry.digest if entry.purpose == "reference" else real(ledger, entry)

    monkeypatch.setattr(Ledger, "charge", charge)


UNPAID = {
    "half the noise": Fault(kind=with_key(HalfScale)),
    "a noise multiplier that is halved": Fault(kind=LessNoise),
    "noise used for another sum": Fault(kind=with_key(OneStep)),
    "noise without a ledger entry": Fault(kind=with_key(OneEntry)),
    "a second draw of a release": Fault(kind=SecondLook, strategy=EWC(strength=1.0)),
    "references that are not charged": Fault(plant=plant_uncharged, strategy=AGEM(memory_size=8)),
}
