"""Training with an adversary and within a budget: moved inputs, charges, and noise."""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR

from helpers.learners import SIMULATED, bits
from perdure.adversarial import FGSM, PGD, robust_accuracy
from perdure.contract.combine import Combine
from perdure.contract.context import contexts
from perdure.contract.strategy import Strategy
from perdure.data.augmentation import Views
from perdure.data.records import Batch
from perdure.errors import ConfigError, PrivacyError
from perdure.learner.learner import Learner
from perdure.learner.loss_path import LossPath
from perdure.models.classifiers import mlp
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.settings import Privacy
from perdure.strategies import EWC, Naive, Replay

# --------------------------------------------------------------------------- adversaries


class Watched(FGSM):
    """An attack that keeps its inputs, its results, and the losses before and after."""

    def perturb(self, losses, inputs, *, generator=None):
        moved = super().perturb(losses, inputs, generator=generator)
        SEEN.append(
            (inputs.clone(), moved, losses(inputs).detach().sum(), losses(moved).detach().sum())
        )
        return moved


SEEN = []


@pytest.mark.parametrize(
    ("privacy", "update"), [(None, "experience"), (None, "step"), (SIMULATED, "experience")]
)
def test_the_adversary_raises_the_loss_of_training_inputs_only(
    learner_of, toy_stream, privacy, update
):
    SEEN.clear()
    stream = toy_stream()
    trained = []
    attacked = []  # places in SEEN; under privacy the guard has asked the attack before
    copies = [bits({"inputs": e.train.inputs, "test": e.test.inputs}) for e in stream]

    def look(point, learner):
        if point == "step.sampled":
            held = learner.session.held
            attacked.append(len(SEEN))
            trained.append(held.drawn_rows if privacy else held.sample(learner.position.step))

    attack = Watched(epsilon=0.05)
    learner = learner_of(
        Replay(memory_size=12, update=update), adversary=attack, callbacks=[look], privacy=privacy
    )
    learner.fit(stream)
    assert len(trained) == 8 and (privacy or len(SEEN) == 8)
    for at, batch in zip(attacked, trained, strict=True):
        inputs, moved, before, after = SEEN[at]
        # a private batch is filled up with its first row
        filling = batch.inputs[:1].expand(len(inputs) - len(batch), -1)
        assert torch.equal(inputs, torch.cat([batch.inputs, filling])) and after > before
        assert len(inputs) == (max(16, len(batch)) if privacy else len(batch))
        assert float((moved - inputs).abs().max()) <= 0.05 + 1e-6
    for experience, copy in zip(stream, copies, strict=True):
        assert torch.equal(experience.train.inputs, copy["inputs"])
        assert torch.equal(experience.test.inputs, copy["test"])
    rows = learner.session.held.memory.rows
    originals = torch.cat([e.train.inputs for e in stream])[
        torch.cat([e.train.ids for e in stream]).argsort()
    ]
    order = torch.cat([e.train.ids for e in stream]).sort().values
    # memory keeps what was seen
    assert torch.equal(rows.inputs, originals[torch.searchsorted(order, rows.ids)])


def test_adversarial_training_raises_robust_accuracy_on_digits():
    from perdure.data.datasets.digits import digits
    from perdure.data.scenarios import split

    stream = split(digits(), scenario="domain", experiences=1)
    attack = PGD(epsilon=0.15, steps=4)
    robust = {}
    for adversary in (None, attack):
        model = mlp(input_shape=(1, 8, 8), num_classes=10, hidden=(32,), seed=0)
        learner = Learner(
            model=model,
            strategy=Naive(),
            optimizer=partial(torch.optim.Adam, lr=0.01),
            iterations=80,
            batch_size=128,
            adversary=adversary,
        )
        assert learner.fit(stream).min() > 80
        test = stream[0].test
        place = torch.Generator().manual_seed(0)
        predict = learner.predictor(0, after=0)
        robust[adversary] = robust_accuracy(
            predict, test.inputs, test.labels, attack, generator=place
        )
    assert robust[attack] > robust[None] + 5


def test_an_adversary_moves_no_statistics_and_keeps_rows_apart(toy_stream):
    stream = toy_stream()
    shape = stream.input_shape
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(math.prod(shape), 8), nn.BatchNorm1d(8), nn.Dropout(0.5)
    )
    model.append(nn.Linear(8, stream.num_classes))
    SEEN.clear()
    learner = Learner(
        model=model,
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.01),
        iterations=3,
        batch_size=8,
        adversary=Watched(epsilon=0.05),
    )
    learner.fit(stream)
    # one update in each step, none for the two passes of the attack
    assert int(model[2].num_batches_tracked) == 3 * len(stream)
    model.train()
    records = stream[0].train.take(torch.arange(4))
    zeros = torch.zeros(4, dtype=torch.int64)
    batch = Batch(
        inputs=records.inputs,
        labels=records.labels,
        ids=records.ids,
        tasks=zeros,
        from_memory=zeros > 0,
        valid=zeros == 0,
    )

    def losses(forward, part):
        return cross_entropy(forward(part.inputs), part.labels, reduction="none")

    path = LossPath(strategy=Naive(), adversary=FGSM(epsilon=0.05))
    params = dict(model.named_parameters())
    alone, together = (
        path.perturbed(
            lambda forward, part: cross_entropy(
                forward(part.inputs), part.labels, reduction="none"
            ),
            model,
            params,
            rows,
            torch.Generator(),
            context=contexts(stream, "cpu")(0),
        ).inputs
        for rows in (batch.take(slice(0, 1)), batch)
    )
    assert torch.allclose(alone, together[:1], atol=1e-6)
    assert all(part.training for part in model.modules())


@pytest.mark.parametrize("privacy", [None, SIMULATED])
def test_inputs_outside_the_bounds_of_an_adversary_are_refused(learner_of, toy_stream, privacy):
    stream = toy_stream()
    stream = replace(
        stream,
        experiences=tuple(
            replace(
                e,
                train=replace(e.train, inputs=3 * e.train.inputs, domain=None),
                test=replace(e.test, inputs=3 * e.test.inputs, domain=None),
            )
            for e in stream
        ),
    )
    learner = learner_of(Naive(), adversary=FGSM(epsilon=0.1), privacy=privacy)
    with pytest.raises(ConfigError, match=r"^adversary\.bounds = .* % of their entries"):
        learner.fit(stream)
    free = FGSM(epsilon=0.1, bounds=None)
    learner_of(Naive(), adversary=free, privacy=privacy).prepare(stream)


# --------------------------------------------------------------------------- budgets


def test_the_noise_is_calibrated_before_any_noise_is_drawn(learner_of, toy_stream):
    learner = learner_of(EWC(strength=1.0), privacy=Privacy(epsilon=4.0, delta=1e-2, seed=0))
    learner.prepare(toy_stream())
    ledger = learner.private_sum.ledger
    assert not ledger.entries and ledger.epsilon(delta=1e-2) == 0
    learner.fit(toy_stream())
    spent = learner.private_sum.ledger.epsilon(delta=1e-2)
    assert 3.5 < spent <= 4.0


def test_a_release_that_was_not_planned_is_refused(learner_of, toy_stream):
    from perdure.errors import BudgetError

    @dataclass(frozen=True, kw_only=True)
    class Greedy(EWC):
        """A strategy that asks for one release more than it declares."""

        def after_experience(self, curator, params, state):
            curator.release(lambda forward, batch: batch.inputs, clip_norm=1.0, purpose="mean")
            return super().after_experience(curator, params, state)

    learner = learner_of(Greedy(strength=1.0), privacy=Privacy(epsilon=4.0, delta=1e-2, seed=0))
    with pytest.raises(BudgetError, match="the grant allows 0 such steps"):
        learner.fit(toy_stream())


def test_two_fisher_releases_are_charged_twice(learner_of, toy_stream):
    both = Combine(EWC(strength=1.0), EWC(strength=1.0, fisher="empirical"))
    learner = learner_of(both, privacy=SIMULATED)
    learner.fit(toy_stream())
    purposes = [entry.purpose for entry in learner.private_sum.ledger.entries]
    assert purposes == ["gradient", "release:fisher", "release:fisher"] * 2


def test_a_private_step_without_records_still_adds_noise(learner_of, toy_stream):
    """The rate is so low that no record is drawn; noise alone changes the model, also with an
    adversary.
    """
    privacy = replace(SIMULATED, sampling_rate=1e-9)
    learner = learner_of(
        privacy=privacy,
        adversary=PGD(epsilon=0.1, steps=2),
        optimizer=partial(torch.optim.SGD, lr=1e-9),
    )
    before = bits(learner.model.state_dict())
    learner.fit(toy_stream())
    assert not any(
        torch.equal(before[name], value) for name, value in learner.model.state_dict().items()
    )


def test_batch_current_contains_the_rows_of_an_experience(toy_stream):
    batch = Batch.current(toy_stream()[1].train, 1)
    assert len(batch) == 24 and batch.tasks.unique().tolist() == [1] and not batch.from_memory.any()


def test_a_changed_loss_or_view_gets_new_noise(learner_of, toy_stream):
    """Names and settings are equal and only the code differs; the block's start depends on the
    code.

    The start of a block is keyed by what it does.
    """

    def start(factor, scale):
        @dataclass(frozen=True, kw_only=True)
        class Scaled(Strategy):
            def losses(self, forward, batch, context, state):
                return factor * super().losses(forward, batch, context, state)

        views = Views(count=1, change=lambda record: scale * record)
        learner = learner_of(Scaled(), privacy=SIMULATED, views=views)
        learner.prepare(toy_stream())
        learner.begin(0)
        return learner.noise_digest()

    assert start(1.0, 0.9) == start(1.0, 0.9)
    assert len({start(1.0, 0.9), start(2.0, 0.9), start(1.0, 0.8)}) == 3


def test_a_changed_release_with_an_unchanged_name_gets_new_noise(learner_of, toy_stream):
    """The same checkpoint with another query: the two answers must not differ by the records
    alone.
    """

    def answer(query):
        learner = learner_of(privacy=SIMULATED)
        learner.prepare(toy_stream())
        learner.begin(0)
        return learner.curator.release(query, clip_norm=100.0, purpose="mean")[
            "value"
        ], learner.private_sum.ledger

    (one, ledger), (same, _), (other, others) = (
        answer(lambda f, b, k=k: k * b.inputs) for k in (1.0, 1.0, 2.0)
    )
    assert torch.equal(one, same)
    records = toy_stream()[0].train.inputs.sum(0)
    assert not torch.allclose(other - one, records, atol=1e-2)
    assert ledger.entries[-1].digest != others.entries[-1].digest


SETTINGS = (
    {},
    {"privacy": replace(SIMULATED, clipping="per-layer")},
    {"privacy": replace(SIMULATED, bands=2)},
    {"privacy": replace(SIMULATED, bands=3)},
    {"privacy": replace(SIMULATED, clipping=Adaptive(count_noise=0.5))},
    {"privacy": replace(SIMULATED, clipping=Adaptive(count_noise=0.6))},
    {"micro_batch_size": 2},
    {"scheduler": lambda optimizer, steps: LambdaLR(optimizer, lr_lambda=lambda step: 0.5)},
    {"scheduler": lambda optimizer, steps: LambdaLR(optimizer, lr_lambda=lambda step: 0.4)},
)


def test_each_changed_setting_gives_a_new_ledger_digest(learner_of, toy_stream):
    """Every setting gives another digest of the ledger entry, on which the noise depends."""

    def digest(options):
        learner = learner_of(**{"privacy": SIMULATED} | options)
        learner.prepare(toy_stream())
        learner.begin(0)
        learner.session.held.reserve(range(2), learner.noise_digest())
        return learner.private_sum.ledger.entries[-1].digest

    first, again = ([digest(options) for options in SETTINGS] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(SETTINGS)


def test_a_private_step_cannot_be_drawn_twice(learner_of, toy_stream):
    """With the same noise on another sum, the difference of the two answers would have no noise."""
    learner = learner_of(privacy=SIMULATED)
    learner.prepare(toy_stream())
    learner.begin(0)
    learner.train(learner.training.block(0, 0, 1))
    with pytest.raises(PrivacyError, match="step 0 is not the next step; each step is drawn once"):
        learner.curator.gradient(
            learner.session.losses, learner.params, learner.session.held.rows, 0
        )
