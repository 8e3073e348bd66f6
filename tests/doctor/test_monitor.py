"""The monitor: what it finds in real short trainings, and what it leaves as it is."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from perdure import Learner, Privacy
from perdure.adversarial import FGSM, PGD
from perdure.data import digits, iid, joint, permuted, split
from perdure.doctor import Monitor, Rule, Trace, examine
from perdure.doctor.rules import find
from perdure.doctor.trace import Layers, Probe
from perdure.errors import ConfigError, PrivacyError
from perdure.federated import Federation, fit_federated
from perdure.learner import Validation
from perdure.models import Classifier, mlp
from perdure.strategies import EWC, OGD, Naive, Replay
from perdure.tasks.losses import GeneralisedCrossEntropy

DATA = digits(declared_size=1_250)
STREAM = joint(DATA)
PRIVACY = Privacy(noise_multiplier=1.0, delta=1e-4, seed=0)


def small(activation="relu", hidden=(32, 32)):
    return mlp(input_shape=(1, 8, 8), num_classes=10, seed=0, hidden=hidden, activation=activation)


def watched(model=None, stream=STREAM, *, rate=3e-3, rules=None, **options):
    """Train for a short time, and return the monitor and the learner."""
    monitor = Monitor(every=2, rules=rules)
    given = {
        "strategy": Naive(),
        "iterations": 40,
        "batch_size": 64,
        "callbacks": [monitor],
    }
    learner = Learner(
        model=small() if model is None else model,
        optimizer=partial(torch.optim.Adam, lr=rate),
        **{**given, **options},
    )
    learner.fit(stream)
    return monitor, learner


def rules_of(monitor):
    return [finding.rule for finding in monitor.findings]


def with_bias(value):
    model = small()
    with torch.no_grad():
        model.body[3].bias.fill_(value)
    return model


def scaled(factor, activation):
    model = small(activation)
    with torch.no_grad():
        for layer in (model.body[1], model.body[3]):
            layer.weight.mul_(factor)
    return model


def deep_sigmoid():
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(64, 64), nn.Sigmoid())]
    return Classifier(nn.Sequential(nn.Flatten(), *layers), 64, 10)


class Growing(nn.Module):
    """Layers in which the gradient grows towards the input: tanh with large orthogonal weights."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(64, 64)
        self.again = nn.Linear(64, 64, bias=False)
        nn.init.orthogonal_(self.again.weight, 3.0)

    def forward(self, x):
        state = self.first(x.flatten(1))
        for _ in range(20):
            state = torch.tanh(self.again(state))
        return state


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.used = nn.Linear(64, 32)
        self.unused = nn.Linear(64, 32)

    def forward(self, x):
        return torch.tanh(self.used(x.flatten(1)))


FAULTS = {
    "learning rate too high": lambda: watched(rate=1.0),
    "learning rate too low": lambda: watched(rate=1e-6),
    "vanishing gradient": lambda: watched(deep_sigmoid()),
    "exploding gradient": lambda: watched(Classifier(Growing(), 64, 10)),
    "dead units": lambda: watched(with_bias(-10.0)),
    "saturated activation": lambda: watched(scaled(40.0, "tanh")),
    "initial variance": lambda: watched(scaled(40.0, "relu")),
    "unchanged parameters": lambda: watched(Classifier(Unused(), 32, 10)),
}


@pytest.mark.parametrize("rule", FAULTS)
def test_a_monitor_names_a_seeded_fault_first(rule):
    monitor, _ = FAULTS[rule]()
    assert rules_of(monitor)[:1] == [rule]


def test_findings_before_and_in_training_are_one_list():
    model = small()
    optimizer = partial(torch.optim.Adam, lr=3e-6)
    examined = examine(model, STREAM, optimizer=optimizer, iterations=40, batch_size=64)
    monitor = Monitor(every=2, examined=examined)
    watched(model, rate=3e-6, callbacks=[monitor])
    assert [(each.rule, each.found) for each in monitor.findings] == [
        ("learning rate range", "before training"),
        ("learning rate too low", "experience 1, step 20"),
    ]


def test_a_monitor_finds_nothing_in_a_healthy_training():
    monitor, learner = watched()
    assert rules_of(monitor) == []
    assert learner.matrix[0][0] > 50


def changed(labels=None, rows=None):
    """Return the stream with other training labels, or with the first rows only."""
    train = DATA.train if rows is None else DATA.train.take(torch.arange(rows))
    train = replace(train, labels=train.labels if labels is None else labels(train.labels))
    return joint(replace(DATA, train=replace(train, declared_size=len(train))))


def half_random(labels):
    generator = torch.Generator().manual_seed(0)
    other = torch.randint(10, labels.shape, generator=generator)
    return torch.where(torch.rand(labels.shape, generator=generator) < 0.5, other, labels)


def test_a_monitor_finds_noisy_labels():
    monitor, _ = watched(stream=changed(half_random), iterations=80)
    assert rules_of(monitor) == ["label noise"]


def test_a_monitor_finds_overfitting():
    monitor, _ = watched(stream=changed(rows=20), iterations=80, batch_size=20, rate=1e-2)
    assert rules_of(monitor) == ["overfitting"]


def test_a_monitor_finds_a_loss_that_stays_at_chance():
    monitor, _ = watched(stream=changed(lambda labels: labels[torch.arange(len(labels)) - 7]))
    assert rules_of(monitor) == ["loss plateau"]


def test_a_monitor_finds_no_noise_under_a_robust_loss():
    loss = GeneralisedCrossEntropy()
    monitor, _ = watched(stream=changed(half_random), iterations=80, loss=loss)
    assert "label noise" not in rules_of(monitor)


def test_a_monitor_measures_each_of_the_first_steps():
    seen = []

    class Steps(Rule):
        name = "steps"
        cause = "fit"
        source = ""

        def watch(self, trace):
            seen.append(trace.at)

    learner = Learner(
        model=small(),
        strategy=Naive(),
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        iterations=30,
        callbacks=[Monitor(rules=[Steps()])],
    )
    learner.fit(STREAM)
    assert seen[-2] == (0, 1, 2, 3, 4, 20)


def test_a_monitor_finds_a_model_that_an_attack_misleads():
    def rules_under(attack):
        monitor = Monitor(every=2, attack=attack)
        watched(callbacks=[monitor])
        return rules_of(monitor)

    assert rules_under(FGSM(epsilon=0.3)) == ["fragile to attacks"]
    assert rules_under(FGSM(epsilon=0.001)) == []


def test_a_hardened_model_needs_a_stronger_attack():
    trace = replace(course((), ()), clean=80.0, attacked=20.0, attack_epsilon=0.2)

    def remedy(adversary):
        found = find("fragile_to_attacks")().watch(replace(trace, adversary=adversary))
        return found.remedy.advice, found.remedy.changes["training.adversary"]

    assert remedy(None)[0] == "adversarial training"
    advice, attack = remedy(FGSM(epsilon=0.1))
    assert advice.startswith("stronger adversarial training than the present FGSM")
    assert (attack["steps"], attack["epsilon"]) == (5, 0.2)
    assert remedy(PGD(epsilon=0.3, steps=7))[1]["steps"] == 14
    assert remedy(PGD(epsilon=0.3, steps=7))[1]["epsilon"] == 0.3


def test_a_collapse_of_fast_adversarial_training_is_found():
    rule = find("catastrophic_overfitting")()
    trace = replace(course((), ()), adversary=FGSM(epsilon=0.1))

    def found(*robust):
        return rule.watch(replace(trace, robust=robust))

    assert found(30.0, 60.0, 20.0).remedy.changes["training.validation.patience"] == 1
    assert "from 60 to 20 %" in found(30.0, 60.0, 20.0).evidence
    assert found(30.0, 60.0, 50.0) is None  # a small fall is chance
    assert found(15.0, 2.0) is None  # never robust
    assert rule.watch(replace(trace, robust=(60.0, 20.0), adversary=None)) is None


def course(train, public):
    """A trace of 12 probes, 10 steps apart, with the loss of a step and of a probe at each."""
    probes = [Probe(step=10 * at, layers=Layers(), loss=loss) for at, loss in enumerate(public)]
    return Trace(
        experience=0,
        steps=110,
        done=110,
        private=False,
        names=(),
        matrices=(),
        losses=tuple(loss for loss in train for _ in range(10)),
        probes=tuple(probes),
        chance=2.3,
        sharpness=0.0,
    )


FALLING = [2.3, 1.5, 1.0, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.08]


@pytest.mark.parametrize(
    ("rule", "train", "public"),
    [
        # the labels are learnt by heart in the end
        ("label_noise", [2.3, 1.9, 1.6, 1.4, 1.2, 1.0, 0.8, 0.5, 0.3, 0.1, 0.05], FALLING),
        ("unstable_loss", FALLING[:11], [*FALLING[:5], 0.4, 0.8, 0.3, 0.9, 0.2, 0.8, 0.3]),
    ],
)
def test_a_rule_finds_its_course_of_losses(rule, train, public):
    found = find(rule)()
    assert found.watch(course(train, public)) is not None
    assert found.watch(course(FALLING[:11], FALLING)) is None


# --------------------------------------------------------------------------- streams


def test_a_monitor_finds_a_state_far_larger_than_the_model():
    stream = split(DATA, scenario="class", experiences=2)
    options = {"stream": stream, "rules": ["large_state"], "iterations": 3}
    assert set(rules_of(watched(strategy=OGD(), **options)[0])) == {"large state"}
    assert rules_of(watched(strategy=EWC(strength=1.0), **options)[0]) == []


def test_replay_of_other_classes_is_no_lost_plasticity():
    """The newest classes are told from each other, although stored ones take outputs away."""
    after = replace(
        course([], []),
        matrix=[[98.0, 0.0], [96.0, 40.0]],
        chances=(50.0, 25.0),
        guesses=(50.0, 50.0),
    )
    rule = find("lost_plasticity")()
    assert rule.watch(replace(after, learnt=(98.0, 95.0))) is None
    assert rule.watch(replace(after, learnt=(98.0, 55.0))) is not None


def test_a_monitor_finds_a_forgotten_experience():
    stream = permuted(DATA, experiences=2)
    monitor, _ = watched(small(hidden=(32,)), stream, rate=1e-2)
    assert "forgotten experience" in rules_of(monitor)


def test_a_monitor_finds_new_classes_that_take_all():
    monitor, _ = watched(stream=split(DATA, scenario="class", experiences=2))
    assert rules_of(monitor) == ["bias to new classes"]


def test_a_monitor_finds_a_memory_that_is_too_small():
    stream = split(DATA, scenario="class", experiences=2)
    monitor, _ = watched(stream=stream, strategy=Replay(memory_size=10))
    assert rules_of(monitor) == ["dead memory"]


def test_a_monitor_finds_nothing_in_a_healthy_stream():
    stream = split(DATA, scenario="class", experiences=2)
    monitor, _ = watched(stream=stream, strategy=Replay(memory_size=200))
    assert rules_of(monitor) == []


def test_a_monitor_finds_lost_plasticity():
    """The second experience cannot be learnt, because the units have died in the first."""

    def kill(point, learner):
        if point == "experience.begin" and learner.position.experience == 1:
            with torch.no_grad():
                learner.model.body[3].bias.fill_(-20.0)

    stream = permuted(DATA, experiences=2)
    monitor = Monitor(every=2)
    learner = Learner(
        model=small(),
        strategy=Naive(),
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        iterations=40,
        callbacks=[kill, monitor],
    )
    learner.fit(stream)
    assert "lost plasticity" in rules_of(monitor)


# --------------------------------------------------------------------------- federations


def federated(clients):
    monitor = Monitor(every=2)

    def make(client):
        return Learner(
            model=small(),
            strategy=Naive(),
            optimizer=partial(torch.optim.Adam, lr=3e-3),
            epochs=3,
            batch_size=64,
            blocks=3,
            callbacks=[monitor],
        )

    federation = Federation(clients=len(clients), rounds=3)
    fit_federated(make, clients, federation, callbacks=[monitor.server])
    return monitor


def of_client(stream, change):
    only = stream[0]
    return replace(stream, experiences=(replace(only, train=change(only.train)),))


def test_a_monitor_finds_nothing_in_a_healthy_federation():
    assert rules_of(federated(iid(STREAM, clients=4))) == []


def test_a_monitor_finds_a_client_with_other_labels():
    clients = iid(STREAM, clients=4)
    clients[3] = of_client(clients[3], lambda train: replace(train, labels=9 - train.labels))
    [finding] = federated(clients).findings
    assert finding.rule == "drifted client"
    assert "client 3" in finding.evidence


def test_a_monitor_finds_a_client_with_few_records():
    clients = iid(STREAM, clients=4)
    clients[2] = of_client(
        clients[2], lambda train: replace(train.take(torch.arange(8)), declared_size=8)
    )
    [finding] = federated(clients).findings
    assert finding.rule == "starving client"
    assert "client 2 has 8 records" in finding.evidence


# --------------------------------------------------------------------------- privacy


def test_a_monitor_finds_a_signal_below_the_noise():
    noisy = Privacy(noise_multiplier=200.0, delta=1e-4, seed=0)
    monitor, _ = watched(privacy=noisy, iterations=20, batch_size=128)
    assert rules_of(monitor) == ["signal below noise"]


def test_a_monitor_refuses_a_debug_rule_under_privacy():
    with pytest.raises(PrivacyError, match="'label noise' reads raw values"):
        watched(privacy=PRIVACY, iterations=2, rules=["label_noise"])


@pytest.mark.parametrize("privacy", [None, PRIVACY])
def test_a_monitor_does_not_change_the_training(privacy):
    def parameters(callbacks):
        learner = Learner(
            model=small(hidden=(8,)),
            strategy=Naive(),
            optimizer=partial(torch.optim.Adam, lr=3e-3),
            iterations=6,
            privacy=privacy,
            callbacks=callbacks,
        )
        learner.fit(STREAM)
        return [value.detach() for value in learner.params.values()]

    pairs = zip(parameters([]), parameters([Monitor(every=1)]), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


# --------------------------------------------------------------------------- findings


def test_a_finding_is_made_once_per_experience():
    monitor, _ = watched(with_bias(-10.0), iterations=20)
    assert len(monitor.findings) == len(monitor.findings) == 1
    assert monitor.findings[0].experience == 0


def test_a_monitor_uses_the_given_rules_only():
    monitor, _ = watched(with_bias(-10.0), iterations=20, rules=["vanishing_gradient"])
    assert rules_of(monitor) == []


def test_a_monitor_refuses_an_unknown_rule():
    with pytest.raises(ConfigError, match="rules"):
        Monitor(rules=["no_such_rule"])


def test_a_monitor_checks_the_test_records_of_every_stream():
    monitor = Monitor()
    learner = Learner(
        model=small(),
        strategy=Naive(),
        optimizer=partial(torch.optim.Adam, lr=3e-3),
        iterations=2,
        privacy=PRIVACY,
        warm_start=True,
        callbacks=[monitor],
    )
    learner.prepare(STREAM)
    learner.begin(0)
    learnt = replace(STREAM, experiences=(replace(STREAM[0], test=STREAM[0].train),))
    learner.prepare(learnt)
    with pytest.raises(PrivacyError, match="training records of a model with privacy"):
        learner.begin(0)


def test_rules_of_something_else_are_refused():
    with pytest.raises(ConfigError, match="rules = "):
        Monitor(rules=[1])


def test_a_monitor_that_is_added_in_a_step_watches_from_there():
    monitor = Monitor(every=2)

    def late(point, learner):
        if point == "step.done" and monitor not in learner.callbacks:
            learner.callbacks = [*learner.callbacks, monitor]

    found, _ = watched(with_bias(-50.0), callbacks=[late], iterations=8)
    assert found.findings == []
    assert "dead units" in rules_of(monitor)


def test_findings_of_an_experience_that_ended_early_are_kept():
    monitor = Monitor(every=1)
    early = Validation(share=0.2, every=1, patience=1)
    stream = split(DATA, scenario="class", experiences=2)
    watched(with_bias(-50.0), stream, callbacks=[monitor], validation=early, iterations=40)
    assert 0 in {finding.experience for finding in monitor.findings}
