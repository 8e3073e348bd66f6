"""A curator with its ledger, queries to ask, and streams with one record less or changed."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from helpers.parties import open_experience, opened_party, private_sum_of
from perdure.privacy.private_sum import PrivateSum
from perdure.privacy.settings import Privacy
from perdure.queries.gram import Gram

ROUNDING = 1 + 1e-5
NOISY = {"noise_multiplier": 1.0, "release_noise": 3.0, "seed": 0}
SILENT = {"noise_multiplier": 1e-3, "release_noise": 1e-3, "seed": 0}
GRID = [0.1 * i for i in range(11)]


class Listening(PrivateSum):
    """A private sum that keeps the sums before noise."""

    def __init__(self, **parts):
        super().__init__(**parts)
        self.heard = []

    def release(self, clipped, **facts):
        def kept(clip):
            self.heard.append(clipped(clip))
            return self.heard[-1]

        return super().release(kept, **facts)

    def count(self, counts, **facts):
        self.heard.append({"counts": counts})
        return super().count(counts, **facts)

    def select(self, scores, **facts):
        self.heard.append({"scores": scores})
        return super().select(scores, **facts)


class Party:
    """A curator on the toy stream's first experience, and the ledger behind it."""

    def __init__(self, stream, model, **privacy):
        self.trace = []
        self.private_sum = None
        if privacy:
            self.private_sum = private_sum_of(
                stream, Privacy(**privacy), kind=Listening, trace=self.trace
            )
        self.stream = stream
        self.model = model
        self.held, self.curator = opened_party(stream, model, private_sum=self.private_sum)

    @property
    def ledger(self):
        return self.private_sum.ledger

    def open(self):
        """Open the experience again and return the curator."""
        open_experience(self.held, self.stream, self.model)
        return self.curator


@pytest.fixture
def party(toy_stream, toy_model):
    def make(stream=None, model=None, **privacy):
        stream = stream or toy_stream()
        return Party(stream, model or toy_model(stream).eval(), **privacy)

    return make


def changed(stream, change):
    """Return the stream with other records in its first experience and the same declared facts."""
    first = stream[0]
    records = replace(change(first.train), declared_size=first.train.declared_size)
    return replace(stream, experiences=(replace(first, train=records), *stream.experiences[1:]))


def without(stream, place):
    return changed(stream, lambda records: records.take(torch.arange(len(records)) != place))


def nobody(stream):
    return changed(stream, lambda records: records.take(torch.zeros(0, dtype=torch.int64)))


def labels(batch):
    return batch.labels


def brightness(batch):
    return batch.inputs.mean(1)


def features(forward, batch):
    return forward.features(batch.inputs)


def one_hot(forward, batch):
    return F.one_hot(batch.labels, 4).float()


JOINT = Gram(features, one_hot, weight=2.0, totals=0.5)


def flat(answer):
    parts = answer.values() if isinstance(answer, dict) else [torch.as_tensor(answer)]
    return torch.cat([part.detach().double().flatten() for part in parts])


def moved(party, stream, place, ask, **privacy):
    """Return the change of each sum, before noise, if one record is dropped."""
    heard = []
    for each in (stream, without(stream, place)):
        test = party(each, **(SILENT | privacy))
        ask(test.curator)
        heard.append(test.private_sum.heard[-1])
    return {name: heard[0][name].double() - heard[1][name].double() for name in heard[0]}


def poisoned(stream, place, value):
    def change(records):
        inputs = records.inputs.clone()
        inputs[place, :2] = value
        return replace(records, inputs=inputs)

    return changed(stream, change)


def has_scale(noise, scale):
    """True if the normals have standard deviation `scale` within 5.5 standard errors (4e-8)."""
    return abs(float(noise.std()) / scale - 1) < 5.5 / math.sqrt(2 * noise.numel())
