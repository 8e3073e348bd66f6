"""Rows with NaN or infinity count as zero in every private sum, without any sign of them."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from perdure.contract.forward import Forward, cross_entropy_of
from perdure.contract.strategy import Strategy
from perdure.data.records import Batch, Records
from perdure.data.scenarios import split
from perdure.learner.learner import Learner
from perdure.models.classifiers import mlp
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.guard import fix
from perdure.privacy.settings import Privacy
from perdure.queries import Gram, SquaredGradient, histogram, quantile
from perdure.queries.batch_gradients import clipped_gradient
from perdure.queries.evaluation import bounded_sum
from perdure.queries.grouped_gradients import GroupedGradient
from perdure.strategies import AGEM, DER, EWC, Naive

POISONS = [math.nan, math.inf, -math.inf, 1e30]


class Picky(nn.Module):
    """A model whose forward pass does not run under torch.func.vmap."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        float(x.nan_to_num().sum())  # vmap refuses to turn a value into a number
        return self.head(x)


class Series(nn.Module):
    """A recurrent layer over the five numbers of a record."""

    def __init__(self):
        super().__init__()
        self.recurrent = nn.GRU(1, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        states, _ = self.recurrent(x[:, :, None])
        return self.head(states[:, -1])


class Own(nn.Module):
    """A model with a parameter of its own, so that records run one by one."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(x * self.scale)


MODELS = {
    "by rules": lambda: mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=0),
    "by samplers": lambda: fix(Series()),
    "not under vmap": Picky,
    "record by record": Own,
}


def model_of(kind):
    torch.manual_seed(0)
    return MODELS[kind]()


def losses(forward, batch):
    return cross_entropy_of(forward(batch.inputs), batch.labels)


def rows(n=9):
    inputs = torch.rand(n, 5, generator=torch.Generator().manual_seed(0))
    return Batch.current(Records(inputs=inputs, labels=torch.arange(n) % 4), 0)


def poisoned(batch, poison, place=3):
    inputs = batch.inputs.clone()
    inputs[place] = poison
    return Batch.from_tensors(batch.tensors() | {"inputs": inputs})


def without(batch, place=3):
    return batch.take(torch.arange(len(batch)) != place)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("clip", [Clip(norm=0.5), Clip(norm=0.5, per_layer=True)])
def test_the_gradient_of_a_nan_record_counts_as_zero(kind, poison, clip):
    model = model_of(kind)
    params = dict(model.named_parameters())
    ask = partial(clipped_gradient, Forward(model), losses, params, clip=clip, at_once=None)
    got = ask(batch=poisoned(rows(), poison))
    rest = ask(batch=without(rows()))
    moved = math.sqrt(sum(float((got[n] - rest[n]).square().sum()) for n in rest))
    if (poison == 1e30 and kind in ("by samplers", "record by record")) or clip.per_layer:
        assert moved <= clip.norm * (1 + 1e-5)  # a finite row, or a layer of it, may count
    else:
        assert moved < 1e-6


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_of_nan_records_sums_to_zero(kind):
    model = model_of(kind)
    params = dict(model.named_parameters())
    bad = poisoned(rows(2), math.nan, place=slice(None))
    clip = Clip(norm=1.0, counted=kind != "record by record")
    got = clipped_gradient(Forward(model), losses, params, bad, clip, None)
    assert set(params) <= got.keys()
    assert all(float(got[n].abs().sum()) == 0 and got[n].shape == params[n].shape for n in params)


QUERIES = {
    "rows": lambda forward, batch: batch.inputs,
    "logits": lambda forward, batch: forward(batch.inputs),
    "gram": Gram(
        lambda forward, batch: batch.inputs, lambda forward, batch: batch.inputs[:, :2], totals=1.0
    ),
    "squares": SquaredGradient(
        lambda forward, batch: (losses(forward, batch)[:, None], torch.ones(len(batch), 1))
    ),
    "groups": GroupedGradient(
        lambda forward, batch: (losses(forward, batch)[:, None], torch.ones(len(batch), 1)),
        group=lambda batch: batch.labels,
        groups=4,
    ),
}


@pytest.mark.parametrize("kind", ["by rules", "record by record"])
@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("poison", POISONS[:3])
def test_the_query_row_of_a_nan_record_counts_as_zero(kind, query, poison):
    model = model_of(kind)
    params = {name: value.detach() for name, value in model.named_parameters()}
    ask = partial(bounded_sum, QUERIES[query], model, params, clip=Clip(norm=0.5))
    got = ask(tensors=poisoned(rows(), poison).tensors())
    rest = ask(tensors=without(rows()).tensors())
    assert all(torch.allclose(got[name], rest[name], atol=1e-6) for name in rest)


# --------------------------------------------------------------------------- whole runs


class Asking(Strategy):
    """A strategy that asks for every kind of release at the end of an experience."""

    def after_experience(self, curator, params, state):
        curator.release(QUERIES["rows"], clip_norm=1.0, purpose="rows")
        numbers = lambda batch: batch.inputs[:, 0]  # noqa: E731
        histogram(curator, lambda batch: (4 * numbers(batch)).long(), bins=4, purpose="bins")
        quantile(curator, numbers, q=0.5, candidates=torch.linspace(0, 1, 5), purpose="median")
        return state


@pytest.mark.parametrize(
    "strategy",
    [Naive(), EWC(strength=1.0), DER(memory_size=12), AGEM(memory_size=12), Asking()],
    ids=lambda strategy: strategy.name,
)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_private_run_with_nan_records_ends_without_error(toy_data, strategy, poison):
    from dataclasses import replace

    inputs = toy_data.train.inputs.clone()
    inputs[::5] = poison
    data = replace(toy_data, train=replace(toy_data.train, inputs=inputs))
    stream = split(data, scenario="class", experiences=2)
    learner = Learner(
        model=mlp(input_shape=(5,), num_classes=4, hidden=(6,), seed=0, activation="tanh"),
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.05),
        iterations=4,
        batch_size=12,
        privacy=Privacy(noise_multiplier=1.0, seed=0, clipping=Adaptive(quantile=0.5)),
    )
    learner.prepare(stream)  # `fit` would refuse the rows at the door
    for index in range(len(stream)):
        learner.begin(index)
        learner.train(learner.training.block(index, 0, 1))
        learner.finish()
    assert learner.evaluate(stream)
    assert all(value.isfinite().all() for value in learner.params.values())
