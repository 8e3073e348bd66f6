"""Independence of records by construction or by test, and record-by-record mode."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import nn

from helpers.learners import SIMULATED
from perdure.adversarial import FGSM
from perdure.contract.combine import Combine
from perdure.contract.forward import Forward, cross_entropy_of
from perdure.contract.strategy import Strategy
from perdure.data import InputDomain
from perdure.data.records import Batch
from perdure.errors import ConfigError, GuardError
from perdure.models import RandomConvolutions, adapted, frozen, prompted, tiny
from perdure.models.classifiers import cnn, mlp, resnet18
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.guard import fix
from perdure.privacy.guard.independence import independence, unlisted
from perdure.privacy.settings import Privacy
from perdure.queries.batch_gradients import clipped_gradient
from perdure.strategies import EWC, LwF, Naive, Replay

IMAGE = {"input_shape": (1, 16, 16), "num_classes": 3, "seed": 0}


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        return self.head(x)


LISTED = {
    "mlp": lambda: mlp(input_shape=(5,), num_classes=3, hidden=(6,), seed=0),
    "cnn": lambda: cnn(**IMAGE),
    "resnet": lambda: resnet18(**IMAGE, width=4),
    "frozen": lambda: frozen(
        RandomConvolutions(seed=0), input_shape=(1, 28, 28), num_classes=10, seed=0
    ),
    "encoder": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1
    ),
    "repaired encoder": lambda: fix(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1)
    ),
    "bag": lambda: nn.Sequential(nn.EmbeddingBag(9, 4), nn.ReLU(), nn.Linear(4, 3)),
    "dropout": lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.LogSoftmax(dim=-1)),
}


@pytest.mark.parametrize("name", LISTED)
def test_listed_modules_keep_records_independent(name):
    model = LISTED[name]()
    assert unlisted(model) == () and independence(model) == "by construction"


def hooked():
    layer = nn.Linear(5, 4)
    layer.register_forward_hook(lambda _, inputs, output: output - output.mean(0))
    return layer


def patched():
    layer = nn.Linear(5, 4)
    layer.forward = lambda x: x - x.mean(0)
    return layer


class Posing(nn.Linear):
    """A subclass that claims to be a class of the library."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


Posing.__module__ = "perdure.models.classifier"
Posing.__qualname__ = Posing.__name__ = "Classifier"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (Custom, "Custom"),
        (hooked, "Linear"),
        (patched, "Linear"),
        (lambda: Posing(5, 4), "Classifier"),
        (lambda: nn.Softmax(dim=0), "Softmax"),
        (lambda: nn.Softmax(), "Softmax"),
        (lambda: nn.Flatten(0), "Flatten"),
        (lambda: nn.Embedding(9, 4, max_norm=1.0), "Embedding"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "TransformerEncoderLayer"),
        (lambda: nn.MultiheadAttention(8, 2), "MultiheadAttention"),
        (lambda: fix(nn.MultiheadAttention(8, 2)), "RepairedAttention"),
        (lambda: fix(nn.GRU(5, 6)), "DPGRU"),
        (lambda: nn.BatchNorm1d(5), "BatchNorm1d"),
        (lambda: nn.InstanceNorm1d(5, track_running_stats=True), "InstanceNorm1d"),
        (
            lambda: frozen(lambda x: x - x.mean(0), input_shape=(5,), num_classes=3, seed=0),
            "Fixed",
        ),
        (
            lambda: nn.TransformerEncoderLayer(
                8, 2, 16, batch_first=True, activation=lambda x: x - x.mean(0)
            ),
            "TransformerEncoderLayer",
        ),
    ],
)
def test_records_of_unlisted_modules_have_tested_independence(make, named):
    model = nn.Sequential(nn.Identity(), make())
    assert independence(model) == "tested"
    assert any(line.startswith("1") and line.endswith(named) for line in unlisted(model))


def test_records_without_axes_have_only_tested_independence():
    assert independence(nn.Identity(), InputDomain(shape=())) == "tested"
    assert independence(nn.Identity(), InputDomain(shape=(5,))) == "by construction"


def encoder():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


@pytest.mark.parametrize(
    ("make", "flat", "enough"),
    [
        (lambda: nn.ConstantPad2d((0, 0, 1, -1), 0.0), (8,), (3, 8)),  # a shift in time
        (lambda: nn.ZeroPad2d((0, 0, 1, -1)), (8,), (1, 3, 8)),
        (encoder, (8,), (3, 8)),
        (lambda: nn.TransformerEncoder(encoder(), 1), (8,), (3, 8)),
        (lambda: fix(encoder()), (8,), (3, 8)),
        (lambda: nn.Conv1d(3, 3, 1), (8,), (3, 8)),
        (lambda: nn.Conv2d(3, 3, 1), (8, 8), (3, 8, 8)),
        (lambda: nn.LayerNorm((3, 8)), (8,), (3, 8)),
        (lambda: nn.RMSNorm((3, 8)), (8,), (3, 8)),
    ],
)
def test_layers_that_reach_the_batch_axis_are_only_tested(make, flat, enough):
    model = nn.Sequential(make())
    assert independence(model) == "by construction"
    assert independence(model, InputDomain(shape=flat)) == "tested"
    assert independence(model, InputDomain(shape=enough)) == "by construction"


@pytest.mark.parametrize("make", [prompted, partial(adapted, experiences=2)])
def test_built_in_transformers_keep_records_independent(make):
    model = make(tiny((1, 8, 8)), num_classes=3)
    assert unlisted(model) == ()


# --------------------------------------------------------------------------- the statement


@dataclass(frozen=True, kw_only=True)
class OwnLosses(Strategy):
    def losses(self, forward, batch, context, state):
        return super().losses(forward, batch, context, state)


@pytest.mark.parametrize(
    ("model", "strategy", "word"),
    [
        (None, Naive(), "by construction"),
        (None, Combine(EWC(strength=1.0), LwF()), "by construction"),
        (None, Replay(memory_size=8), "by construction"),
        (Custom(), EWC(strength=1.0), "tested"),
        (None, OwnLosses(), "tested"),
        (None, Combine(EWC(strength=1.0), OwnLosses()), "tested"),
    ],
)
def test_the_statement_names_the_independence_of_records(
    learner_of, toy_stream, model, strategy, word
):
    learner = learner_of(strategy, model=model, privacy=SIMULATED)
    learner.fit(toy_stream())
    statement = learner.private_sum.ledger.statement(1e-3)
    assert statement.independence == word
    assert f", independence of records {word}" in str(statement)


# --------------------------------------------------------------------------- record by record


class Coupled(Custom):
    """A model that centres its input over the batch, so that one record alone becomes 0."""

    def forward(self, x):
        return self.head(x - 0.5 * x.mean(0))


class Branching(Custom):
    def forward(self, x):
        return self.head(x) if float(x.sum()) > 0 else self.head(-x)


ALONE = Privacy(noise_multiplier=1.0, seed=0, custom_forward="record-by-record")


def test_record_by_record_mode_accepts_a_coupled_model(learner_of, toy_stream):
    with pytest.raises(GuardError, match=r"Naive.losses.. couples records"):
        learner_of(model=Coupled(), privacy=SIMULATED, batch_size=12).prepare(toy_stream())
    learner = learner_of(model=Coupled(), privacy=ALONE, batch_size=12)
    assert learner.fit(toy_stream()).isfinite().all()
    assert learner.private_sum.ledger.statement(1e-3).independence == "by construction"


def test_one_record_changes_record_by_record_sums_by_clip_norm(toy_stream):
    torch.manual_seed(0)
    model = Coupled()
    rows = Batch.current(toy_stream()[0].train, 0)
    params = dict(model.named_parameters())
    clip = Clip(norm=0.01)

    def losses(forward, batch):
        return cross_entropy_of(forward(batch.inputs), batch.labels)

    def moved(batch, alone):
        ask = partial(clipped_gradient, Forward(model), losses, params, clip=clip, at_once=None)
        sums = [ask(batch=some, alone=alone) for some in (batch, batch.take(slice(0, -1)))]
        return math.sqrt(sum(float((sums[0][n] - sums[1][n]).square().sum()) for n in params))

    far = Batch.from_tensors(rows.tensors() | {"inputs": rows.inputs.index_fill(0, LAST, 50.0)})
    assert moved(far, alone=False) > 2 * clip.norm
    assert moved(far, alone=True) <= clip.norm * (1 + 1e-5)


SIZES = []
LAST = torch.tensor([23])


class Counting(Coupled):
    def forward(self, x):
        SIZES.append(len(x))
        return super().forward(x)


def test_the_model_gets_one_record_at_a_time_in_private_steps(learner_of, toy_stream):
    SIZES.clear()
    seen = []

    def look(point, _):
        if point == "step.sampled":
            SIZES.clear()
        if point == "step.gradient":
            seen.extend(SIZES)

    learner_of(model=Counting(), privacy=ALONE, callbacks=[look]).fit(toy_stream())
    assert seen and set(seen) == {1}


def test_record_by_record_mode_keeps_proven_independence(learner_of, toy_stream):
    learner = learner_of(privacy=ALONE)
    learner.prepare(toy_stream())
    assert learner.private_sum.independence == "by construction"


def test_a_model_failing_on_one_record_is_refused_before_charges(learner_of, toy_stream, tmp_path):
    learner = learner_of(model=Branching(), privacy=ALONE, folder=tmp_path)
    with pytest.raises(
        GuardError, match=r"Naive.losses\(\), record by record, fails on synth.*vmap"
    ):
        learner.prepare(toy_stream())
    assert not (tmp_path / "ledger.jsonl").exists()


class Keeping(Custom):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))

    def forward(self, x):
        self.mean.add_(x.detach().mean(0))
        return self.head(x)


def test_record_by_record_mode_refuses_a_model_storing_records(learner_of, toy_stream):
    with pytest.raises(GuardError, match="buffer mean of the model changes"):
        learner_of(model=Keeping(), privacy=ALONE).prepare(toy_stream())


def test_record_by_record_mode_refuses_an_adversary(learner_of, toy_stream):
    learner = learner_of(model=Custom(), privacy=ALONE, adversary=FGSM(epsilon=0.1))
    with pytest.raises(GuardError, match="the adversary FGSM runs the model in batches"):
        learner.prepare(toy_stream())


def test_privacy_refuses_an_unknown_value_of_custom_forward():
    with pytest.raises(ConfigError, match="custom_forward = 'proved' is not allowed; allowed: tes"):
        Privacy(epsilon=1.0, custom_forward="proved")
