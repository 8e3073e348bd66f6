"""Defences: losses of rows and their perturbed versions, alone, with strategies and privacy."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from helpers.learners import SIMULATED
from perdure.adversarial import FGSM, PGD, RSFGSM
from perdure.adversarial.certificates import ball, worst_logits
from perdure.adversarial.defences import (
    MOVED,
    TRADES,
    Defence,
    DefensiveDistillation,
    IntervalBounds,
    Madry,
    RobustDistillation,
    find,
    names,
)
from perdure.contract.context import contexts
from perdure.contract.forward import Forward
from perdure.data.client_splits import dirichlet
from perdure.data.mixing import Mixup
from perdure.data.records import Batch
from perdure.errors import ConfigError, PrivacyError
from perdure.federated import Federation, run_federation
from perdure.learner import Validation
from perdure.learner.learner import Learner
from perdure.learner.loss_path import LossPath
from perdure.models.classifiers import mlp
from perdure.strategies import EWC, Naive, Replay

ATTACK = PGD(epsilon=0.05, steps=2, bounds=None)


def learner_for(stream, **given):
    return Learner(
        **{
            "model": mlp(
                input_shape=stream.input_shape, num_classes=stream.num_classes, hidden=(8,), seed=0
            ),
            "strategy": Naive(),
            "optimizer": partial(torch.optim.SGD, lr=0.1),
            "iterations": 2,
            "batch_size": 8,
            "adversary": ATTACK,
            "show_progress": False,
            **given,
        }
    )


class Seen(TRADES):
    """TRADES that keeps the rows of the steps."""

    def losses(self, losses, forward, batch, context):
        found = super().losses(losses, forward, batch, context)
        SEEN.append((batch, found.detach()))
        return found


SEEN: list[tuple[Batch, torch.Tensor]] = []


def rows_of(stream, index=0):
    return Batch.current(stream[index].train.take(slice(0, 6)), index)


def distilled(**given):
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(2))
    return RobustDistillation(teacher=teacher, **given)


def test_trades_equals_its_formula_on_masked_classes(toy_stream):
    stream = toy_stream()
    learner = learner_for(stream)
    learner.prepare(stream)
    context = contexts(stream, "cpu")(0)
    rows = rows_of(stream)
    moved = rows.inputs + 0.1
    forward = Forward(learner.model)
    defence = TRADES(beta=2.5)
    path = LossPath(strategy=Naive(), adversary=ATTACK, defence=defence)
    found = path.losses(forward, defence.attach(rows, moved, 0.0), context, learner.session.state)
    allowed = context.allowed.nonzero().flatten()
    clean = learner.model(rows.inputs)[:, allowed]
    other = learner.model(moved)[:, allowed]
    p = clean.softmax(1)
    expected = F.cross_entropy(clean, torch.searchsorted(allowed, rows.labels), reduction="none")
    expected = expected + 2.5 * (p * (p.log() - other.log_softmax(1))).sum(1)
    assert torch.allclose(found, expected, atol=1e-5)
    # a release asks for the losses of the rows as they are
    plain = path.losses(forward, rows, context, learner.session.state)
    assert torch.allclose(plain, found - (expected - plain), atol=1e-5)


@pytest.mark.parametrize("alpha", [1.0, 0.25])
def test_robust_distillation_equals_its_formula(toy_stream, alpha):
    stream = toy_stream()
    teacher = learner_for(stream).model
    learner = learner_for(stream, strategy=Naive())
    with torch.no_grad():
        learner.model.head.weight.add_(0.5)
    learner.prepare(stream)
    context = contexts(stream, "cpu")(0)
    rows = rows_of(stream)
    moved = rows.inputs + 0.1
    defence = RobustDistillation(teacher=teacher, alpha=alpha, temperature=4.0)
    path = LossPath(strategy=Naive(), adversary=ATTACK, defence=defence)
    found = path.losses(
        Forward(learner.model), defence.attach(rows, moved, 0.0), context, learner.session.state
    )
    allowed = context.allowed.nonzero().flatten()
    answers = (teacher(rows.inputs)[:, allowed] / 4).softmax(1)
    student = (learner.model(moved)[:, allowed] / 4).log_softmax(1)
    expected = alpha * 16 * (answers * (answers.log() - student)).sum(1)
    labels = torch.searchsorted(allowed, rows.labels)
    clean = F.cross_entropy(learner.model(rows.inputs)[:, allowed], labels, reduction="none")
    assert torch.allclose(found, expected + (1 - alpha) * clean, atol=1e-5)
    assert found.requires_grad and teacher.training


def test_the_attack_of_trades_raises_the_divergence(toy_stream):
    stream = toy_stream()
    SEEN.clear()
    learner = learner_for(stream, defence=Seen(beta=1.0), strategy=EWC(strength=1.0))
    learner.fit(stream)
    assert len(SEEN) == 2 * len(stream)
    for batch, _ in SEEN:
        change = batch.stored[MOVED] - batch.inputs
        assert 0.01 < change.abs().max() <= 0.05 + 1e-6


def test_adversarial_replay_attacks_rows_of_memory_too(toy_stream):
    stream = toy_stream()
    for memory in (True, False):
        SEEN.clear()
        learner = learner_for(stream, defence=Seen(memory=memory), strategy=Replay(memory_size=8))
        learner.fit(stream)
        old = torch.cat([(b.stored[MOVED] - b.inputs)[b.from_memory].flatten() for b, _ in SEEN])
        new = torch.cat([(b.stored[MOVED] - b.inputs)[~b.from_memory].flatten() for b, _ in SEEN])
        assert len(old) and bool(old.any()) is memory
        assert bool(new.any())


def test_madry_as_a_defence_equals_an_adversary_alone(toy_stream):
    stream = toy_stream()
    found = []
    for defence in (None, Madry()):
        learner = learner_for(stream, defence=defence, strategy=Replay(memory_size=8))
        found.append(learner.fit(stream).nan_to_num())
        found.append(torch.cat([each.flatten() for each in learner.model.parameters()]))
    assert torch.equal(found[0], found[2])
    assert torch.allclose(found[1], found[3], atol=1e-6)


@pytest.mark.parametrize("defence", [TRADES(beta=2.0), Madry(memory=False)])
def test_a_record_is_clipped_as_a_whole_under_privacy(toy_stream, defence):
    stream = toy_stream()
    learner = learner_for(
        stream, defence=defence, privacy=SIMULATED, strategy=Replay(memory_size=8)
    )
    learner.fit(stream)
    epsilon = learner.private_sum.ledger.worst(1e-5)[1]
    plain = learner_for(stream, adversary=None, privacy=SIMULATED, strategy=Replay(memory_size=8))
    plain.fit(stream)
    assert epsilon == plain.private_sum.ledger.worst(1e-5)[1]


def test_interval_training_equals_its_formula_and_schedule(toy_stream):
    stream = toy_stream()
    defence = IntervalBounds(epsilon=0.2, bounds=None, kappa=0.4, warm_up=0.2, ramp=0.5)
    learner = learner_for(stream, adversary=None, defence=defence)
    learner.prepare(stream)
    context = contexts(stream, "cpu")(0)
    path = LossPath(strategy=Naive(), defence=defence)
    rows = rows_of(stream)
    forward = Forward(learner.model)
    plain = path.losses(forward, rows, context, learner.session.state)
    for progress, share in ((0.1, 0.0), (0.45, 0.5), (0.9, 1.0)):
        batch = defence.attach(rows, None, progress)
        found = path.losses(forward, batch, context, learner.session.state)
        worst = worst_logits(learner.model, ball(rows.inputs, 0.2 * share, None), rows.labels)
        kappa = 1 - 0.6 * share
        expected = kappa * plain + (1 - kappa) * context.losses(worst, rows)
        assert torch.allclose(found, expected, atol=1e-5)
    learner.fit(stream)


class Foreign(Madry):
    """Defence of a user: the mean over the batch couples the records."""

    def losses(self, losses, forward, batch, context):
        found = super().losses(losses, forward, batch, context)
        return found + found.mean()


def test_a_defence_that_couples_records_is_refused_under_privacy(toy_stream):
    stream = toy_stream()
    with pytest.raises(PrivacyError, match=r"Foreign|coupl|depend"):
        learner_for(stream, defence=Foreign(), privacy=SIMULATED).prepare(stream)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"adversary": None, "defence": TRADES()}, ConfigError, "None with the defence TRADES"),
        ({"defence": IntervalBounds(epsilon=0.1)}, ConfigError, "the defence uses no attack"),
        ({"adversary": FGSM(epsilon=0.1), "defence": TRADES()}, ConfigError, "random start"),
        ({"defence": TRADES(), "mixing": Mixup()}, ConfigError, "mixing"),
        ({"defence": "trades"}, ConfigError, "defence"),
        ({"defence": distilled(), "privacy": SIMULATED}, PrivacyError, "training of its teacher"),
        ({"defence": RobustDistillation()}, ConfigError, "defence.teacher = None is not allowed"),
        ({"defence": distilled(), "adversary": None}, ConfigError, "None with the defence Robust"),
        (
            {"adversary": None, "defence": IntervalBounds(epsilon=0.1), "privacy": SIMULATED},
            PrivacyError,
            "norm of a record's gradient",
        ),
    ],
)
def test_a_defence_that_does_not_fit_is_refused_with_a_reason(toy_stream, given, error, words):
    stream = toy_stream()
    with pytest.raises(error, match=words):
        learner_for(stream, **given).prepare(stream)


def test_every_defence_is_found_by_its_name():
    assert names() == (
        "defensive_distillation",
        "interval_bounds",
        "madry",
        "robust_distillation",
        "trades",
    )
    assert all(issubclass(find(name), Defence) for name in names())
    with pytest.raises(ConfigError, match="beta"):
        TRADES(beta=0.0)
    with pytest.raises(ConfigError, match="alpha"):
        distilled(alpha=0.0)
    with pytest.raises(ConfigError, match="temperature"):
        distilled(temperature=0.5)
    with pytest.raises(ConfigError, match="kappa"):
        IntervalBounds(epsilon=0.1, kappa=2.0)


def test_validation_under_attack_stops_and_keeps_the_best(toy_stream):
    stream = toy_stream()
    attack = RSFGSM(epsilon=0.02, bounds=None)
    validation = Validation(attack=attack, share=0.3, every=1, patience=2)
    learner = learner_for(stream, iterations=8, validation=validation, adversary=attack)
    learner.fit(stream)
    scores = {}
    for experience, _, score in learner.validated:
        scores.setdefault(experience, []).append(score)
    assert all(0 <= score <= 100 for row in scores.values() for score in row)
    for row in scores.values():
        top = row.index(max(row))
        assert len(row) == 8 or len(row) == top + 3  # two measurements without an improvement


def test_a_federation_trains_its_clients_with_a_defence(toy_stream):
    stream = toy_stream()
    streams = dirichlet(stream, clients=2, alpha=10.0)
    SEEN.clear()

    def make(client=0, folder=None):
        return learner_for(stream, defence=Seen(beta=1.0), client=client, owner=f"client-{client}")

    run_federation(make, streams, Federation(clients=2, rounds=1))
    assert len(SEEN) == 2 * 2 * len(stream)


def test_defensive_distillation_hides_gradients_and_is_broken():
    from perdure.adversarial import measure_robustness
    from perdure.data import digits, split

    stream = split(digits(), scenario="class", experiences=1)

    def trained(teacher):
        learner = learner_for(
            stream,
            adversary=None,
            iterations=250,
            batch_size=32,
            optimizer=partial(torch.optim.Adam, lr=0.05),
            defence=DefensiveDistillation(temperature=40.0, teacher=teacher),
        )
        learner.fit(stream)
        return learner.model

    student = trained(trained(None).eval().requires_grad_(False))
    test = stream[0].test
    rows = test.inputs[:200], test.labels[:200]
    attack = PGD(epsilon=0.2, steps=10, random_start=False)

    def card(*objectives):
        return measure_robustness(student, *rows, attack, generator=None, objectives=objectives)

    assert card("margin").clean_accuracy > 75
    assert card("margin").zero_gradients > 20
    assert card("cross_entropy").robust_accuracy > card("margin").robust_accuracy + 20
    assert card("margin").robust_accuracy < 20


def test_a_student_keeps_the_robustness_of_its_teacher():
    from perdure.adversarial import measure_robustness
    from perdure.data import digits, split

    stream = split(digits(), scenario="class", experiences=1)
    attack = PGD(epsilon=0.1, steps=5)

    def trained(hidden, **given):
        learner = learner_for(
            stream,
            model=mlp(input_shape=(1, 8, 8), num_classes=10, hidden=hidden, seed=0),
            iterations=500,
            batch_size=32,
            optimizer=partial(torch.optim.Adam, lr=5e-3),
            **given,
        )
        learner.fit(stream)
        return learner.model

    def robust(model):
        rows = stream[0].test
        draws = torch.Generator().manual_seed(0)
        card = measure_robustness(model, rows.inputs, rows.labels, attack, generator=draws)
        return card.robust_accuracy

    teacher = trained((128, 128), adversary=attack)
    plain = robust(trained((16,), adversary=None))
    defence = RobustDistillation(teacher=teacher, alpha=0.5, temperature=5.0)
    student = robust(trained((16,), adversary=attack, defence=defence))
    assert robust(teacher) > student > plain + 15
