"""Squared, absolute and grouped gradients of models that torch.func.vmap cannot run."""

from functools import partial

import pytest
import torch
from torch import nn

from perdure.contract.forward import Forward
from perdure.data.records import Batch, Records
from perdure.data.scenarios import split
from perdure.learner.learner import Learner
from perdure.queries.grouped_gradients import GroupedGradient
from perdure.queries.squared_gradients import AbsoluteGradient, SquaredGradient
from perdure.queries.unrolled_recurrence import unrolled_recurrence
from perdure.strategies import EWC, MAS, OGD, RWalk

# torch says so once a process
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")


class Recurrent(nn.Module):
    """A model that reads the numbers of a record one by one."""

    def __init__(self, layer, classes=4):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(2 * 3 if layer.bidirectional else 3, classes)

    def forward(self, x):
        return self.head(self.layer(x[:, :, None])[0][:, -1])


class Branching(nn.Module):
    """A model that branches on a value, which vmap does not support."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(x) if float(x.detach().sum()) > 0 else self.head(x.tanh())


LAYERS = {
    "GRU": partial(nn.GRU, 1, 3, batch_first=True),
    "GRU, two layers both ways": partial(
        nn.GRU, 1, 3, num_layers=2, bidirectional=True, batch_first=True
    ),
    "LSTM": partial(nn.LSTM, 1, 3, batch_first=True),
    "LSTM without bias": partial(nn.LSTM, 1, 3, bias=False, batch_first=True),
    "LSTM, projected": partial(nn.LSTM, 1, 6, proj_size=3, batch_first=True),
    "RNN": partial(nn.RNN, 1, 3, batch_first=True),
    "RNN, relu": partial(nn.RNN, 1, 3, nonlinearity="relu", batch_first=True),
}
QUERIES = {
    "squared": (SquaredGradient, lambda g: g.square()),
    "absolute": (AbsoluteGradient, lambda g: g.abs()),
    "grouped": (partial(GroupedGradient, group=lambda batch: batch.labels % 2, groups=2), None),
}


def model_of(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Branching() if name == "branch" else Recurrent(LAYERS[name]())


def terms(forward, batch):
    log_p = torch.log_softmax(forward(batch.inputs), dim=1)
    return -log_p, log_p.exp().detach()


def one_by_one(model, batch, size, groups):
    """Return plain autograd rows, one record and one term at a time."""
    params = dict(model.named_parameters())
    total = {
        n: torch.zeros(groups, *p.shape) if groups else torch.zeros_like(p)
        for n, p in params.items()
    }
    for i in range(len(batch)):
        losses, weights = terms(model, batch.take(slice(i, i + 1)))
        for loss, weight in zip(losses[0], weights[0], strict=True):
            found = torch.autograd.grad(loss, list(params.values()), retain_graph=True)
            for name, gradient in zip(params, found, strict=True):
                place = total[name][int(batch.labels[i]) % 2] if groups else total[name]
                place += weight * (size(gradient) if size else gradient)
    return {name: value.detach() for name, value in total.items()}


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("name", ["GRU", "LSTM", "branch"])
def test_sums_of_recurrent_models_equal_a_loop_of_autograd(name, query):
    place = torch.Generator().manual_seed(1)
    records = Records(inputs=torch.randn(3, 5, generator=place), labels=torch.arange(3))
    batch = Batch.current(records, 0)
    model = model_of(name).eval()
    make, size = QUERIES[query]
    found = make(terms=terms).exact_sum(Forward(model), batch, 4)
    wanted = one_by_one(model, batch, size, 2 if size is None else 0)
    for key, value in wanted.items():
        torch.testing.assert_close(found[key].detach(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "strategy", [EWC(strength=1.0), MAS(strength=1.0), RWalk(strength=1.0), OGD()]
)
def test_strategies_train_a_recurrent_model_on_a_whole_stream(toy_data, strategy):
    stream = split(toy_data, scenario="class", experiences=2)
    learner = Learner(
        model=model_of("GRU"),
        strategy=strategy,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=2,
        batch_size=8,
    )
    assert learner.fit(stream).isfinite().all()


@pytest.mark.parametrize("name", LAYERS)
def test_an_unrolled_recurrent_layer_equals_the_torch_layer(name):
    layer = LAYERS[name]().double()
    rows = torch.randn(4, 5, 1, dtype=torch.float64)
    with torch.no_grad():
        outputs, last = layer(rows)
        with unrolled_recurrence(layer):
            again, end = layer(rows)
            alone, _ = layer(rows[0])
    torch.testing.assert_close(again, outputs)
    torch.testing.assert_close(end, last)
    torch.testing.assert_close(alone, outputs[0])


def test_an_unrolled_layer_leaves_packed_sequences_to_torch():
    layer = nn.GRU(1, 3, batch_first=True)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(2, 5, 1), [5, 3], batch_first=True)
    with torch.no_grad(), unrolled_recurrence(layer):
        found = layer(packed)[0].data
    torch.testing.assert_close(found, layer(packed)[0].data.detach())
