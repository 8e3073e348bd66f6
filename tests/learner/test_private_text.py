"""Token models under privacy: bags of embeddings, recurrent layers and a transformer encoder."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perdure.contract.forward import Forward, cross_entropy_of
from perdure.data import InputDomain
from perdure.data.experience import Experience, Stream
from perdure.data.records import Batch, Records
from perdure.learner.learner import Learner
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import Clip, clipped_sum
from perdure.privacy.guard import fix
from perdure.privacy.settings import Privacy
from perdure.queries.batch_gradients import clipped_gradient
from perdure.queries.per_record import gradient_rows
from perdure.strategies import Naive

LENGTH = 16
WORDS = 40
DOMAIN = InputDomain(
    shape=(LENGTH,), dtype=torch.int64, vocabulary=WORDS, padding=0, sequence_axes=(0,)
)

PLAY = (
    "first citizen before we proceed any further hear me speak",
    "you are all resolved rather to die than to famish",
    "what shall he have that killed the deer",
    "the quality of mercy is not strained",
    "now is the winter of our discontent",
    "good morrow to you both what counterfeit did i give you",
)
"""Lines whose letters are the tokens of the transformer."""


class Bag(nn.Module):
    """A bag of embeddings with a linear head."""

    def __init__(self, mode="mean"):
        super().__init__()
        self.bag = nn.EmbeddingBag(WORDS, 12, mode=mode, padding_idx=0)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bag(x)))


class Recurrent(nn.Module):
    """An embedding, a recurrent layer, and a head on the state at the last token."""

    def __init__(self, kind):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8, padding_idx=0)
        self.recurrent = kind(8, 10, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        states, _ = self.recurrent(self.embed(x))
        last = (x != 0).sum(1).clamp(min=1) - 1
        here = torch.arange(x.shape[1], device=x.device) == last[:, None]
        return self.head((states * here[:, :, None]).sum(1))


class Encoder(nn.Module):
    """A transformer encoder with masked padding, and a head on the mean state."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 16, padding_idx=0)
        self.place = nn.Parameter(0.1 * torch.randn(LENGTH, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        words = x != 0
        states = self.encoder(self.embed(x) + self.place, src_key_padding_mask=~words)
        states = torch.where(words[:, :, None], states, 0.0)
        return self.head(states.sum(1) / words.sum(1, keepdim=True).clamp(min=1))


MODELS = {
    "bag": Bag,
    "bag of sums": partial(Bag, "sum"),
    "GRU": partial(Recurrent, nn.GRU),
    "LSTM": partial(Recurrent, nn.LSTM),
    "encoder": Encoder,
}


def model_of(kind):
    torch.manual_seed(0)
    return fix(MODELS[kind]())


def tokens(n, seed=0):
    """Return random sequences of different lengths, padded at the end."""
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(1, WORDS, (n, LENGTH), generator=rng)
    lengths = torch.randint(1, LENGTH + 1, (n, 1), generator=rng)
    return torch.where(torch.arange(LENGTH) < lengths, words, 0)


def losses(forward, batch):
    return cross_entropy_of(forward(batch.inputs), batch.labels)


def rows_of(model, batch):
    """Return the gradients of each record, one at a time by plain autograd."""
    params = dict(model.named_parameters())
    rows = []
    for i in range(len(batch)):
        loss = losses(Forward(model), batch.take(slice(i, i + 1))).sum()
        rows.append(torch.autograd.grad(loss, list(params.values())))
    return {n: torch.stack(g) for n, g in zip(params, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("clip_norm", [0.05, 100.0])
def test_token_model_sums_equal_a_loop_over_records(kind, clip_norm):
    model = model_of(kind)
    batch = Batch.current(Records(inputs=tokens(9), labels=torch.arange(9) % 3), 0)
    params = dict(model.named_parameters())
    clip = Clip(norm=clip_norm)
    got = clipped_gradient(Forward(model), losses, params, batch, clip, None)
    expected = {}
    rows = rows_of(model, batch)
    norms = sum(row.flatten(1).square().sum(1) for row in rows.values()).sqrt()
    for name, row in rows.items():
        factors = (clip_norm / norms).clamp(max=1.0)
        expected[name] = (factors.view(-1, *[1] * (row.dim() - 1)) * row).sum(0)
    size = math.sqrt(sum(float(value.square().sum()) for value in expected.values()))
    for name, value in expected.items():
        assert float((got[name] - value).norm()) < 1e-5 * size, name
    if "bag" not in kind:  # torch has no batching rule for bags
        alone = clipped_sum(gradient_rows(losses, model), params, batch.tensors(), clip, 4)
        for name, value in alone.items():
            assert float((got[name] - value).norm()) < 1e-5 * size, name


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding", [None, 0])
def test_clipped_embedding_bag_sums_equal_a_loop_over_records(mode, padding):
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(WORDS, 6, mode=mode, padding_idx=padding))
    x = tokens(7)
    x[0] = 0  # nothing but padding
    batch = Batch.current(Records(inputs=x, labels=torch.arange(7) % 3), 0)
    params = dict(model.named_parameters())
    clip = Clip(norm=0.1)
    run = partial(losses, Forward(model), batch)
    got = clipped_gradient_sum(model, params, run, 7, clip)
    rows = rows_of(model, batch)["0.weight"]
    norms = rows.flatten(1).norm(dim=1)
    expected = ((0.1 / norms.clamp(min=1e-30)).clamp(max=1.0)[:, None, None] * rows).sum(0)
    assert float((got["0.weight"] - expected).norm()) < 1e-6


# --------------------------------------------------------------------------- training


def topics(n, seed):
    """Return token sequences of three topics, with words of one topic and shared words."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    own = 1 + 12 * labels[:, None] + torch.randint(12, (n, LENGTH), generator=rng)
    shared = torch.randint(37, WORDS, (n, LENGTH), generator=rng)
    words = torch.where(torch.rand(n, LENGTH, generator=rng) < 0.7, own, shared)
    lengths = torch.randint(4, LENGTH + 1, (n, 1), generator=rng)
    return torch.where(torch.arange(LENGTH) < lengths, words, 0), labels


def lines(n, seed):
    """Return windows of a play's letters; the label is the third of the text that a window is
    from.
    """
    rng = torch.Generator().manual_seed(seed)
    letters = [torch.tensor([1 + ord(c) % 32 for c in line]) for line in PLAY]
    inputs, labels = [], []
    for i in range(n):
        line = letters[i % len(letters)]
        start = int(torch.randint(len(line) - 4, (1,), generator=rng))
        window = line[start : start + LENGTH]
        inputs.append(F.pad(window, (0, LENGTH - len(window))))
        labels.append(i % len(letters) // 2)
    return torch.stack(inputs), torch.tensor(labels)


def stream_of(make, n):
    parts = []
    for count, seed, first in ((n, 0, 0), (200, 1, 10**6)):
        inputs, labels = make(count, seed)
        ids = first + torch.arange(count)
        parts.append(Records(inputs=inputs, labels=labels, ids=ids, domain=DOMAIN))
    experience = Experience(index=0, train=parts[0], test=parts[1], classes=(0, 1, 2))
    return Stream(
        name="text",
        scenario="class",
        experiences=(experience,),
        num_classes=3,
        input_shape=(LENGTH,),
        assigned_by_record=True,
    )


@pytest.mark.parametrize(
    ("kind", "make", "least"),
    [
        ("bag", topics, 80.0),
        ("GRU", topics, 60.0),
        ("LSTM", topics, 60.0),
        ("encoder", lines, 45.0),
    ],
)
def test_private_token_models_learn_at_epsilon_8(kind, make, least):
    model = model_of(kind)
    learner = Learner(
        model=model,
        strategy=Naive(),
        optimizer=partial(torch.optim.Adam, lr=0.02),
        iterations=60,
        batch_size=120,
        privacy=Privacy(epsilon=8.0, delta=1e-4, seed=0),
    )
    accuracy = float(learner.fit(stream_of(make, 1200))[0, 0])
    stated = learner.private_sum.ledger.statement(1e-4)
    assert stated.epsilon <= 8.0 and stated.independence == "tested"
    assert accuracy > least
