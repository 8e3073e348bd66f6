"""Losses of records: formulas, references, gradients, masks, tasks and strategies that use them."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap
from torchvision.ops import sigmoid_focal_loss

from helpers.task_streams import learner_of as task_learner
from helpers.task_streams import stream_of
from perdure import Learner, Privacy, strategies
from perdure.contract import Combine, Strategy
from perdure.data import Experience, Records, Stream
from perdure.errors import ConfigError, GuardError, PerdureError, PrivacyError, RunError
from perdure.models import mlp
from perdure.strategies import EWC, NCM, ICaRL, LwF, Naive, Replay
from perdure.tasks import MASKED, MultiLabel, NextToken, Regression, SingleLabel, losses
from perdure.tasks.losses import (
    BalancedSoftmax,
    Bootstrapping,
    ClassWeights,
    CrossEntropy,
    Focal,
    GeneralisedCrossEntropy,
    Loss,
    SymmetricCrossEntropy,
)

N, C = 8, 5
ALLOWED = torch.tensor([True, True, True, True, False])
COUNTS = (50.0, 5.0, 20.0, 1.0, 8.0)
EACH = {
    "smoothed": CrossEntropy(label_smoothing=0.2),
    "generalised": GeneralisedCrossEntropy(q=0.7),
    "symmetric": SymmetricCrossEntropy(alpha=0.3, beta=0.8),
    "soft": Bootstrapping(mode="soft", beta=0.6),
    "hard": Bootstrapping(mode="hard", beta=0.7),
    "focal": Focal(gamma=1.5),
    "flat focal": Focal(gamma=0.5),
    "balanced": BalancedSoftmax(counts=COUNTS, tau=0.7),
    "weights": ClassWeights(weights=COUNTS, divisor=3.0),
}
every = pytest.mark.parametrize("loss", EACH.values(), ids=EACH.keys())


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


LOGITS = drawn(N, C)
LABELS = torch.arange(N) % 4


def by_hand(loss: Loss, z: torch.Tensor, y: int, allowed: torch.Tensor) -> float:
    """Return the loss of one record by the formula of its file, over the allowed classes."""
    known = [c for c in range(C) if allowed[c]]
    total = sum(math.exp(z[c]) for c in known)
    p = {c: math.exp(z[c]) / total for c in known}
    match loss:
        case CrossEntropy(label_smoothing=s):
            return -(1 - s) * math.log(p[y]) - s / len(known) * sum(map(math.log, p.values()))
        case GeneralisedCrossEntropy(q=q):
            return (1 - p[y] ** q) / q
        case SymmetricCrossEntropy(alpha=a, beta=b, log_zero=zero):
            return -a * math.log(p[y]) - b * sum(p[c] * zero for c in known if c != y)
        case Bootstrapping(mode="soft", beta=b):
            return -sum((b * (c == y) + (1 - b) * p[c]) * math.log(p[c]) for c in known)
        case Bootstrapping(beta=b):
            return -b * math.log(p[y]) - (1 - b) * math.log(max(p.values()))
        case Focal(gamma=g):
            return -((1 - p[y]) ** g) * math.log(p[y])
        case BalancedSoftmax(counts=n, tau=tau):
            shifted = {c: math.exp(z[c]) * n[c] ** tau for c in known}
            return -math.log(shifted[y] / sum(shifted.values()))
        case ClassWeights(weights=w, divisor=d):
            return -w[y] / d * math.log(p[y])
    raise AssertionError(loss)


# --------------------------------------------------------------------------- formulas, references


@every
@pytest.mark.parametrize("mask", [None, ALLOWED, ALLOWED.expand(N, C)], ids=["all", "C", "n, C"])
def test_each_loss_equals_its_formula(loss, mask):
    found = SingleLabel(loss=loss).losses(LOGITS, LABELS, mask)
    allowed = torch.ones(C).bool() if mask is None else ALLOWED
    expected = [by_hand(loss, z, int(y), allowed) for z, y in zip(LOGITS, LABELS, strict=True)]
    torch.testing.assert_close(found, found.new_tensor(expected), rtol=1e-9, atol=1e-9)


@every
def test_each_loss_has_a_correct_gradient_and_independent_rows(loss):
    task = SingleLabel(loss=loss)
    inputs = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: task.losses(z, LABELS, ALLOWED), inputs)
    rows = vmap(lambda z, y: task.losses(z[None], y[None], ALLOWED)[0])(LOGITS, LABELS)
    torch.testing.assert_close(rows, task.losses(LOGITS, LABELS, ALLOWED))


@every
def test_each_loss_is_finite_for_extreme_logits(loss):
    """A label with probability 0 or 1 in float32 has a finite loss and gradient."""
    logits = torch.tensor([[1e4, 0.0, 0, 0, 0], [-1e4, 0, 0, 0, 0]]).requires_grad_()
    found = SingleLabel(loss=loss).losses(logits, torch.tensor([0, 0]), ALLOWED)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    assert found.isfinite().all() and gradient.isfinite().all()


def test_label_smoothing_equals_pytorch():
    loss = CrossEntropy(label_smoothing=0.3)
    expected = F.cross_entropy(LOGITS, LABELS, label_smoothing=0.3, reduction="none")
    torch.testing.assert_close(SingleLabel(loss=loss).losses(LOGITS, LABELS), expected)


@pytest.mark.parametrize("alpha", [None, 0.25])
def test_the_focal_loss_of_labels_equals_torchvision(alpha):
    targets = (drawn(N, C, seed=1) > 0).double()
    given = -1 if alpha is None else alpha
    expected = sigmoid_focal_loss(LOGITS, targets, alpha=given, gamma=1.5, reduction="none")
    found = MultiLabel(loss=Focal(gamma=1.5, alpha=alpha)).losses(LOGITS, targets, ALLOWED)
    torch.testing.assert_close(found, expected[:, ALLOWED].mean(1))


@pytest.mark.parametrize(
    ("loss", "weights"),
    [
        (CrossEntropy(label_smoothing=0.0), torch.ones(C)),
        (ClassWeights(weights=COUNTS, divisor=2.0), torch.tensor(COUNTS) / 2),
    ],
)
def test_losses_of_labels_equal_weighted_binary_cross_entropy(loss, weights):
    targets = (drawn(N, C, seed=1) > 0).double()
    each = F.binary_cross_entropy_with_logits(LOGITS, targets, reduction="none", weight=weights)
    torch.testing.assert_close(MultiLabel(loss=loss).losses(LOGITS, targets), each.mean(1))


@every
def test_the_loss_of_a_sequence_is_the_sum_over_its_tokens(loss):
    outputs = drawn(2, 3, C, seed=4)
    targets = torch.tensor([[0, 1, 2], [3, 0, -100]])
    mask = torch.stack([ALLOWED, torch.ones(C).bool()])
    found = NextToken(loss=loss).losses(outputs, targets, mask)
    single = SingleLabel(loss=loss)
    for i, length in enumerate((3, 2)):
        rows = single.losses(outputs[i, :length], targets[i, :length], mask[i])
        torch.testing.assert_close(found[i], rows.sum())


def test_a_class_that_is_not_allowed_gets_no_gradient():
    for loss in EACH.values():
        logits = LOGITS.clone().requires_grad_()
        total = SingleLabel(loss=loss).losses(logits, LABELS, ALLOWED).sum()
        (gradient,) = torch.autograd.grad(total, logits)
        assert not gradient[:, ~ALLOWED].any() and float(total.detach()) < -MASKED / 10


# --------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CrossEntropy(label_smoothing=1.0), "label_smoothing = 1.0 .* 0 to below 1"),
        (lambda: GeneralisedCrossEntropy(q=0.0), "q = 0.0 .* above 0"),
        (lambda: SymmetricCrossEntropy(log_zero=0.0), "log_zero = 0.0 .* below 0"),
        (lambda: SymmetricCrossEntropy(alpha=-1.0), "alpha = -1.0 "),
        (lambda: Bootstrapping(mode="firm"), "mode = 'firm' .* soft, hard"),
        (lambda: Bootstrapping(beta=2.0), "beta = 2.0 .* 0 to 1"),
        (lambda: Focal(gamma=-1.0), "gamma = -1.0 "),
        (lambda: Focal(alpha=1.0), "alpha = 1.0 "),
        (lambda: BalancedSoftmax(counts=(1.0, 0.0)), r"counts = \(1.0, 0.0\) .* above 0"),
        (lambda: BalancedSoftmax(tau=-1.0), "tau = -1.0 "),
        (lambda: ClassWeights(weights=()), r"weights = \(\) "),
        (lambda: ClassWeights(divisor=0.0), "divisor = 0.0 .* above 0"),
        (lambda: Focal(gamma="2"), "focal.gamma = '2' "),
        (lambda: Regression(loss=Focal()), "focal does not support regression records"),
        (lambda: MultiLabel(loss=Bootstrapping()), "bootstrapping does not support multi-label"),
        (lambda: SingleLabel(loss=Focal(alpha=0.5)), "alpha = 0.5 .* class_weights"),
        (lambda: losses.find("dice"), "loss = 'dice' is not allowed; allowed: balanced_softmax"),
        (
            lambda: SingleLabel(loss=BalancedSoftmax()).losses(LOGITS, LABELS),
            'counts = "balanced" needs a learner',
        ),
    ],
)
def test_values_and_tasks_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_every_loss_is_found_by_its_name():
    found = [losses.find(name) for name in losses.names()]
    assert [each.name for each in found] == list(losses.names())
    assert {each.__name__ for each in found} <= set(losses.__all__)


# --------------------------------------------------------------------------- in training


LABELS_OF = (torch.tensor([0, 0, 0, 1] * 4), torch.tensor([2, 2, 3, 3] * 4))


@pytest.fixture(scope="module")
def stream() -> Stream:
    """Return two class-incremental experiences of 16 records with 2 classes each."""
    centres = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    experiences = []
    for index, labels in enumerate(LABELS_OF):
        noise = torch.randn(16, 3, generator=torch.Generator().manual_seed(index))
        inputs = (centres[labels] + noise).sigmoid()
        ids = 100 * index + torch.arange(16)
        part = f"part-{index}"
        train = Records(inputs=inputs, labels=labels, ids=ids, partition=part, declared_size=16)
        test = Records(inputs=inputs + 0.01, labels=labels, ids=ids + 50)
        experiences.append(
            Experience(index=index, train=train, test=test, classes=(2 * index, 2 * index + 1))
        )
    return Stream(
        name="four",
        scenario="class",
        experiences=tuple(experiences),
        num_classes=4,
        input_shape=(3,),
        assigned_by_record=True,
    )


def learner_of(strategy: Strategy, **options) -> Learner:
    model = strategy.small_model(input_shape=(3,), num_classes=4)
    made = {
        "model": model or mlp(input_shape=(3,), num_classes=4, hidden=(6,), seed=0),
        "optimizer": partial(torch.optim.SGD, lr=0.5),
        "iterations": 3,
        "batch_size": 8,
    }
    return Learner(strategy=strategy, **made | options)


def parameters(learner: Learner) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in learner.model.parameters()])


PLAIN = ("ewc", "lwf", "replay", "naive", "cwr_star", "bic", "der", "er_ace", "si", "agem")


@pytest.mark.parametrize("name", PLAIN)
def test_strategies_use_the_chosen_loss(stream, name):
    strategy = strategies.find(name).example()
    trained = []
    for loss in (None, ClassWeights(weights=(1.0,) * 4), ClassWeights(weights=(9.0, 1, 9, 1))):
        learner = learner_of(strategy, loss=loss)
        learner.fit(stream)
        trained.append(parameters(learner))
    torch.testing.assert_close(trained[0], trained[1])
    assert not torch.allclose(trained[0], trained[2])


def test_no_strategy_ignores_a_loss_in_silence(stream):
    """A strategy calls the loss, trains nothing, or declares the reason."""
    called: list[str] = []

    @dataclass(frozen=True, kw_only=True)
    class Watched(Loss):
        name: ClassVar[str] = "watched"

        def losses(self, logits, labels, allowed):
            called.append("losses")
            return F.cross_entropy(logits, labels, reduction="none")

    silent = []
    for name in strategies.names():
        strategy = strategies.find(name).example()
        learner = learner_of(strategy, loss=Watched())
        called.clear()
        try:
            learner.prepare(stream)
        except PerdureError as refusal:  # of the loss with its reason, or of the model or stream
            assert "loss" not in str(refusal) or "because it" in str(refusal), name
            continue
        learner.begin(0)
        learner.train(range(1))
        silent += [] if called else [name]
    assert silent == []


@pytest.mark.parametrize(
    ("strategy", "reason"),
    [
        (ICaRL(memory_size=4), "ICaRL, because it distils by a binary cross entropy"),
        (NCM(), "NCM, because it uses no gradient"),
        (Combine(EWC(strength=1.0), ICaRL(memory_size=4)), "because it distils"),
    ],
)
def test_strategies_with_a_loss_of_their_own_refuse_another(stream, strategy, reason):
    with pytest.raises(ConfigError, match=reason):
        learner_of(strategy, loss=Focal()).prepare(stream)


def test_a_wrong_number_of_counts_is_refused_before_training(stream):
    with pytest.raises(ConfigError, match=r"counts = '2 numbers' .* each of the 4 classes"):
        learner_of(Naive(), loss=BalancedSoftmax(counts=(1.0, 2.0))).prepare(stream)
    with pytest.raises(ConfigError, match=r"loss = 'focal' .* None, or a loss"):
        learner_of(Naive(), loss="focal")


def test_balanced_counts_labels_of_this_and_earlier_experiences(stream):
    learner = learner_of(Naive(), loss=BalancedSoftmax())
    learner.prepare(stream)
    first, second = (learner.session.context(index).task.loss.counts for index in range(2))
    assert first == (12, 4, 1, 1) and second == (12, 4, 8, 8)
    weights = ClassWeights().with_counts([12, 4, 0, 0]).weights
    assert weights == pytest.approx((16 / 24, 16 / 8, 1, 1))


def test_private_labels_are_never_counted(stream):
    private = Privacy(noise_multiplier=1.0, seed=0)
    with pytest.raises(PrivacyError, match='class_weights with "balanced" counts private labels'):
        learner_of(Naive(), loss=ClassWeights(), privacy=private).prepare(stream)
    task = SingleLabel(loss=BalancedSoftmax())
    with pytest.raises(PrivacyError, match="counts private labels"):
        carried = carrying(stream, task)
        learner_of(Naive(), privacy=private).prepare(carried)


def carrying(stream: Stream, task: SingleLabel) -> Stream:
    """Return the stream with records of another task."""
    experiences = tuple(
        replace(each, train=replace(each.train, task=task), test=replace(each.test, task=task))
        for each in stream
    )
    return replace(stream, experiences=experiences)


def test_a_loss_of_the_records_task_equals_one_of_the_learner(stream):
    own = learner_of(Replay(memory_size=4), loss=Focal())
    own.fit(stream)
    carried = learner_of(Replay(memory_size=4))
    carried.fit(carrying(stream, SingleLabel(loss=Focal())))
    assert torch.equal(parameters(own), parameters(carried))


def test_a_loss_is_clipped_by_construction_under_privacy(stream):
    private = Privacy(noise_multiplier=1.0, clip_norm=0.1, seed=0)
    trained = []
    for chosen in (None, CrossEntropy(label_smoothing=0.2)):
        learner = learner_of(LwF(), loss=chosen, privacy=private, iterations=2)
        learner.fit(stream)
        trained.append(parameters(learner))
        (entry, *_) = learner.private_sum.ledger.entries
        assert entry.independence == "by construction"
    assert not torch.equal(*trained)


def test_a_foreign_loss_is_tested_before_it_is_private(stream):
    @dataclass(frozen=True, kw_only=True)
    class Mean(Loss):
        name: ClassVar[str] = "mean"

        def losses(self, logits, labels, allowed):
            each = F.cross_entropy(logits, labels, reduction="none")
            return each - each.mean()

    learner = learner_of(Naive(), loss=Mean(), privacy=Privacy(noise_multiplier=1.0, seed=0))
    with pytest.raises(GuardError, match=r"Naive.losses\(\)"):
        learner.prepare(stream)


def test_evaluation_does_not_depend_on_the_loss():
    for task in (SingleLabel(), MultiLabel(), NextToken()):
        plain, other = (task_learner(task, loss=loss) for loss in (None, Focal()))
        plain.prepare(stream_of(task))
        other.prepare(stream_of(task))
        assert plain.evaluate(stream_of(task)) == other.evaluate(stream_of(task))


def test_another_loss_is_refused_on_resume(stream, tmp_path):
    learner_of(Naive(), loss=Focal(gamma=1.0), folder=tmp_path).fit(stream)
    with pytest.raises(RunError, match=r"loss.gamma \(given 2.0, stored 1.0\)"):
        learner_of(Naive(), loss=Focal(gamma=2.0), folder=tmp_path).fit(stream)
    with pytest.raises(RunError, match="loss"):
        learner_of(Naive(), folder=tmp_path).fit(stream)


def test_a_loss_without_the_method_for_labels_is_refused_by_name():
    @dataclass(frozen=True, kw_only=True)
    class Half(Loss):
        name = "half"
        tasks = ("single-label", "multi-label")

        def losses(self, logits, labels, allowed):
            return logits.sum(1) / 2

    task = MultiLabel(loss=Half())
    with pytest.raises(ConfigError, match="the loss half has no method label_losses"):
        task.losses(torch.zeros(2, 3), torch.zeros(2, 3))
