"""Set-ups of `challenges.py`: of each challenge a healthy one, a fault and a remedy.

Measures are declared here, before anything is run.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Changes = Mapping[str, object]
"""Paths in a config, such as "training.learning_rate", and their values; None removes a key."""
BASE: dict[str, Any] = {
    "name": "challenge",
    "data": {"name": "digits", "stream": "joint"},
    "model": {"name": "mlp", "hidden": [64]},
    "training": {
        "optimizer": "SGD",
        "learning_rate": 0.05,
        "momentum": 0.9,
        "epochs": 10,
        "batch_size": 32,
    },
    "arms": [{"strategy": "naive"}],
}


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """One challenge as three set-ups.

    Args:
        name: short name of the row.
        challenge: challenge as the documentation lists it.
        measure: one of `challenge_measures.MEASURES`.
        healthy: changes of `BASE` for the healthy set-up.
        fault: further changes for the faulty set-up.
        remedy: further changes for the remedied set-up.
        rules: names of the doctor's rules that name the fault; empty if no rule can.
        limits: limits of rules that a user declares, such as the memory of a device: name of the
            rule to its thresholds.
        note: remark for the documentation.
    """

    name: str
    challenge: str
    measure: str = "average_accuracy"
    healthy: Changes = field(default_factory=dict)
    fault: Changes
    remedy: Changes
    rules: tuple[str, ...]
    limits: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    note: str = ""


DEEP = {"model.hidden": [32] * 16, "model.activation": "tanh"}
CNN = {"model.name": "cnn", "model.hidden": None, "model.width": 8}
CLASSES = {"data.stream": "split", "data.scenario": "class", "data.experiences": 5}
ADAM = {"training.optimizer": "Adam", "training.momentum": None, "training.learning_rate": 3e-3}
MNIST = {"data.name": "challenge_data:small_mnist"}
PRIVATE = {
    "arms": [{"strategy": "naive", "private": True}],
    "privacy": {"epsilon": 2.0, "delta": 1e-4, "seed": 0},
}
SEQUENCES = {
    **ADAM,
    "data.name": "challenge_data:padded",
    "data.options": {"length": 16},
    "model": {"name": "lstm", "vocabulary": 9},
    "training.learning_rate": 0.01,
}
CHALLENGES = (
    Challenge(
        name="vanishing-gradients",
        challenge="vanishing gradients",
        healthy={"model.hidden": [32]},
        fault=DEEP,
        remedy={"model.skip": True},
        rules=("vanishing gradient", "initial variance"),
    ),
    Challenge(
        name="exploding-gradients",
        challenge="exploding gradients",
        healthy={"model": {"name": "challenge_models:large", "scale": 1.0}},
        fault={"model.scale": 6.0},
        remedy={"model.norm": "layer"},
        rules=("exploding gradient",),
        note="A deep MLP with tanh whose initial weights are six times too large.",
    ),
    Challenge(
        name="overfitting",
        challenge="overfitting",
        healthy={
            **ADAM,
            "data.name": "challenge_data:noisy",
            "data.options": {"share": 0.3, "each": 40},
            "model.hidden": [256],
            "training.epochs": 10,
        },
        fault={"training.epochs": 150},
        remedy={"training.validation": {"share": 0.15, "every": 0.02, "patience": 3}},
        rules=("overfitting",),
        note="30 % of the labels are wrong, so a model that learns them by heart is worse.",
    ),
    Challenge(
        name="augmentation",
        challenge="data augmentation and preprocessing",
        healthy={**CNN, **ADAM, "model.width": 16, "training.epochs": 12},
        fault={"data.name": "challenge_data:shifted"},
        remedy={"training.views": {"count": 1, "change": "shift_and_flip", "pixels": 1}},
        rules=("overfitting",),
        note="Test images are moved by up to one pixel.",
    ),
    Challenge(
        name="preprocessing",
        challenge="data augmentation and preprocessing",
        fault={"data.name": "challenge_data:unscaled"},
        remedy={"data.options": {"each_pixel": True}},
        rules=("unscaled input",),
    ),
    Challenge(
        name="label-noise",
        challenge="label noise",
        healthy={"model.hidden": [256], "training.epochs": 40},
        fault={"data.name": "challenge_data:noisy"},
        remedy={"training.loss": {"name": "generalised_cross_entropy", "q": 0.7}},
        rules=("label noise",),
    ),
    Challenge(
        name="imbalance",
        challenge="imbalanced data sets",
        healthy={
            "data.name": "challenge_data:imbalanced_adult",
            "training.learning_rate": 0.01,
            "training.epochs": 5,
        },
        fault={"data.options": {"ratio": 20.0}},
        remedy={"training.loss": {"name": "balanced_softmax"}},
        rules=("class imbalance",),
        note="Adult, 3,000 records of one class and 150 of the other; accuracy is the mean recall.",
    ),
    Challenge(
        name="computing",
        challenge="limited computing power",
        measure="multiply_adds",
        healthy={**CNN, "model.width": 16},
        fault={"model.width": 128},
        remedy={"model.name": "mobilenet", "model.width": 32},
        rules=("compute need",),
        limits={"compute_need": {"operations": 1e10}},
        note="The declared limit is 1e10 operations for the training.",
    ),
    Challenge(
        name="tuning",
        challenge="hyper-parameter tuning",
        fault={"training.learning_rate": 1e-3, "training.momentum": 0.0},
        remedy={"tune": {"learning_rate": [1e-3, 1.0], "momentum": [0.0, 0.95]}},
        rules=("learning rate range", "learning rate too low", "loss plateau"),
        note="The fault is torch's default of SGD; the remedy is `tune` with 15 trials.",
    ),
    Challenge(
        name="convergence",
        challenge="convergence speed",
        healthy={"training.epochs": 2},
        fault={"training.momentum": 0.0, "training.learning_rate": 0.005},
        remedy={"training.momentum": 0.9, "training.learning_rate": 0.05},
        rules=("learning rate too low", "loss plateau", "learning rate range"),
    ),
    Challenge(
        name="activation",
        challenge="activation function selection",
        healthy={"model.hidden": [16, 16, 16], "model.activation": "gelu"},
        fault={"model.activation": "relu", "training.learning_rate": 0.4},
        remedy={"model.activation": "leaky_relu", "training.learning_rate": 0.05},
        rules=("dead units", "saturated activation", "learning rate too high"),
    ),
    Challenge(
        name="optimiser",
        challenge="gradient descent optimisation",
        healthy={"training.optimizer": "Adam", "training.momentum": None},
        fault={
            "data.name": "challenge_data:unscaled",
            "data.options": {"spread": 1.0},
            "training.optimizer": "SGD",
            "training.learning_rate": 1e-4,
        },
        remedy={"training.optimizer": "Adam", "training.learning_rate": 1e-2},
        rules=("unscaled input", "learning rate too low", "loss plateau"),
    ),
    Challenge(
        name="memory",
        challenge="memory constraints",
        measure="step_bytes",
        healthy={**CNN, "training.epochs": 1},
        fault={"training.batch_size": 512},
        remedy={"training.micro_batch_size": 32},
        rules=("memory need",),
        limits={"memory_need": {"available": 2_000_000}},
        note="The declared memory of the device is 2 MB.",
    ),
    Challenge(
        name="transfer",
        challenge="transfer learning and domain adaptation",
        healthy={
            "data.name": "challenge_data:second_half",
            "data.options": {"dimmed": True},
            "training.epochs": 60,
        },
        fault={"data.options": {"dimmed": True, "each": 5}},
        remedy={
            "model": {"name": "challenge_models:transferred"},
            "training.learning_rate": 0.005,
        },
        rules=("few records", "overfitting"),
        note="Five dimmed and noisy images of each digit; the remedy begins with a model that has "
        "learnt other images, neither dimmed nor noisy.",
    ),
    Challenge(
        name="architecture",
        challenge="architecture design space",
        healthy={"model.activation": "gelu"},
        fault={"model.hidden": [2]},
        remedy={"model.hidden": [64]},
        rules=("narrow features", "cannot overfit"),
    ),
    Challenge(
        name="adversarial",
        challenge="adversarial attacks",
        measure="robust_accuracy",
        healthy={
            **MNIST,
            "data.options": {"records": 4_000},
            "model.hidden": [128],
            "training.epochs": 5,
        },
        fault={"attack": {"name": "pgd", "epsilon": 0.1, "steps": 10, "step_size": 0.025}},
        remedy={
            "training.adversary": {"name": "pgd", "epsilon": 0.1, "steps": 3, "step_size": 0.06}
        },
        rules=("fragile to attacks",),
        note="MNIST; the healthy number is the accuracy without an attack.",
    ),
    Challenge(
        name="interpretability",
        challenge="interpretability",
        measure="fidelity",
        healthy={"explain": {"method": "lime", "samples": 4096}},
        fault={"explain.samples": 132},
        remedy={"explain.samples": 2176},
        rules=("few samples",),
        note="LIME; fewer samples than 130 are refused.",
    ),
    Challenge(
        name="sequences",
        challenge="sequential data",
        healthy=SEQUENCES,
        fault={"data.options": {"length": 32}},
        remedy={"model.padding": 0},
        rules=("read padding",),
        note="Digits as 16 tokens, filled to 32.",
    ),
    Challenge(
        name="limited-data",
        challenge="limited data",
        healthy={"data.name": "challenge_data:second_half", "training.epochs": 60},
        fault={"data.options": {"each": 5}},
        remedy={
            "model": {"name": "challenge_models:transferred"},
            "training.learning_rate": 0.005,
        },
        rules=("few records", "overfitting"),
        note="Five images of each digit; the remedy begins with a model of other, public images.",
    ),
    Challenge(
        name="forgetting",
        challenge="catastrophic forgetting",
        healthy={"data.experiences": 1, **CLASSES, "arms": [{"strategy": "joint"}]},
        fault={"arms": [{"strategy": "naive"}]},
        remedy={"arms": [{"strategy": "replay", "memory_size": 500}]},
        rules=("forgotten experience", "bias to new classes"),
    ),
    Challenge(
        name="deployment",
        challenge="hardware and deployment constraints",
        measure="exported_bytes",
        fault={"model.hidden": [400, 400]},
        remedy={"export": {"student": "hidden = [64]"}},
        rules=("large model",),
        limits={"large_model": {"bytes": 100_000}},
        note="The declared limit is 100 kB; the remedy is a distilled student.",
    ),
    Challenge(
        name="privacy",
        challenge="data privacy and security",
        healthy={**PRIVATE, "training.batch_size": 256, "training.learning_rate": 0.25},
        fault={"privacy.clip_norm": 20.0},
        remedy={"privacy.clip_norm": 1.0},
        rules=("private step size", "weak signal", "signal below noise"),
        note="All set-ups are private, with epsilon 2; the fault is a clip norm far too large.",
    ),
    Challenge(
        name="long-training",
        challenge="long training times",
        measure="cpu_seconds",
        healthy={**CLASSES, "arms": [{"strategy": "naive"}], "training.epochs": 20},
        fault={"arms": [{"strategy": "joint"}]},
        remedy={"arms": [{"strategy": "replay", "memory_size": 100}]},
        rules=("compute need",),
        limits={"compute_need": {"operations": 2e9}},
        note="The declared limit is 2e9 operations for the training.",
    ),
    Challenge(
        name="memory-growth",
        challenge="exploding memory usage",
        measure="stored_bytes",
        healthy={**CLASSES, "arms": [{"strategy": "ewc", "strength": 10.0}]},
        fault={"arms": [{"strategy": "ogd"}]},
        remedy={"arms": [{"strategy": "replay", "memory_size": 200}]},
        rules=("large state",),
    ),
    Challenge(
        name="schedule",
        challenge="learning rate scheduling",
        healthy={"model.activation": "tanh", "training.learning_rate": 0.1},
        fault={"training.learning_rate": 0.5},
        remedy={"training.schedule": {"name": "CosineAnnealingLR"}},
        rules=("learning rate too high", "unstable loss"),
    ),
    Challenge(
        name="saddle",
        challenge="local minima and saddle points",
        healthy={"model.hidden": [64, 64, 64]},
        fault={"model": {"name": "challenge_models:saddle"}},
        remedy={"model": {"name": "mlp", "hidden": [64, 64, 64], "init": "he"}},
        rules=("saddle point", "initial variance", "vanishing gradient", "loss plateau"),
    ),
    Challenge(
        name="unstable",
        challenge="unstable loss surfaces",
        healthy={"model.activation": "tanh"},
        fault={"training.batch_size": 2, "training.learning_rate": 0.03},
        remedy={"training.averaging": {"name": "ema", "decay": 0.9995}},
        rules=("unstable loss", "learning rate too high"),
    ),
)
