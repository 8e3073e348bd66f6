"""Seeded faults and healthy set-ups of the doctor's benchmark, on the embedded digits.

Every set-up is a function from a seed; a fault changes one thing in a healthy set-up.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from doctor_streams import (
    CLASSES,
    as_pixels,
    as_sequences,
    few_records,
    halved_digits,
    imbalanced,
    noisy_labels,
    permuted_digits,
    shuffled_labels,
    split_digits,
    unscaled,
    whole,
)
from flwr.serverapp.strategy import FedAvgM
from torch import Tensor, nn
from torch.optim import Optimizer

from perdure import Experience, Privacy, Strategy, Stream
from perdure.data import iid
from perdure.federated import Federation
from perdure.models import Classifier, cnn, lstm, mlp, transformer
from perdure.strategies import EWC, Naive, Replay
from perdure.utils import derive, generator, seeded

SHAPE = (1, 8, 8)
MakeOptimizer = Callable[..., Optimizer]
ADAM: MakeOptimizer = partial(torch.optim.Adam, lr=3e-3)
PRIVACY: dict[str, Any] = {"epsilon": 8.0, "delta": 1e-4, "clip_norm": 1.0}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """One training.

    Args:
        name: name of the set-up.
        stream: function from a seed to the stream.
        model: function from a seed to the model.
        named: names of the rules that name the fault; () for a healthy set-up.
        optimizer: function from parameters to an optimiser.
        strategy: strategy against forgetting.
        privacy: arguments of `Privacy`; None for training without privacy.
        federation: settings of a federation; None for one party.
        clients: function from a stream to the streams of the clients.
        length: arguments of the learner that give the length of the training.
    """

    name: str
    stream: Callable[[int], Stream]
    model: Callable[[int], nn.Module]
    named: tuple[str, ...] = ()
    optimizer: MakeOptimizer = ADAM
    strategy: Strategy = field(default_factory=Naive)
    privacy: dict[str, Any] | None = None
    federation: dict[str, Any] | None = None
    clients: Callable[[Stream, int], list[Stream]] | None = None
    length: dict[str, Any] = field(default_factory=lambda: {"epochs": 15, "batch_size": 64})

    def privacy_of(self, seed: int) -> Privacy | None:
        """Return the privacy settings, with simulated noise of the seed."""
        return None if self.privacy is None else Privacy(**self.privacy, seed=seed)

    def federation_of(self, seed: int) -> Federation | None:
        """Return the settings of the federation."""
        return None if self.federation is None else Federation(**self.federation, seed=seed)


# --------------------------------------------------------------------------- models


def small_mlp(
    seed: int, hidden: tuple[int, ...] = (64, 64), activation: Any = "relu"
) -> Classifier:
    """Make a perceptron with two hidden layers."""
    return mlp(
        input_shape=SHAPE,
        num_classes=CLASSES,
        seed=seed,
        hidden=hidden,
        activation=activation,
    )


def small_cnn(seed: int) -> Classifier:
    """Make a small CNN with group normalisation."""
    return cnn(input_shape=SHAPE, num_classes=CLASSES, seed=seed, width=16)


def small_lstm(seed: int) -> Classifier:
    """Make an LSTM over 8 rows of pixels."""
    return lstm(input_shape=(8, 8), num_classes=CLASSES, seed=seed, hidden=32)


def small_transformer(seed: int) -> Classifier:
    """Make a transformer with two blocks over 16 patches."""
    return transformer(
        input_shape=SHAPE, num_classes=CLASSES, seed=seed, patch=2, width=32, depth=2, heads=2
    )


def layers_of(
    widths: tuple[int, ...], activation: type[nn.Module], seed: int, inputs: int = 64
) -> Classifier:
    """Make a perceptron of these widths with any activation, in PyTorch's initialisation."""
    with seeded(derive(seed, "layers")):
        parts: list[nn.Module] = [nn.Flatten()]
        for before, after in zip((inputs, *widths), widths, strict=False):
            parts += [nn.Linear(before, after), activation()]
        return Classifier(nn.Sequential(*parts), widths[-1], CLASSES)


def deep_sigmoid(seed: int) -> Classifier:
    """Make a perceptron with eight sigmoid layers and no normalisation: gradients vanish."""
    return layers_of((64,) * 8, nn.Sigmoid, seed)


class Recurrent(nn.Module):
    """Plain recurrent body with a tanh, whose state matrix is `gain` times an orthogonal one."""

    def __init__(self, hidden: int, gain: float) -> None:
        super().__init__()
        self.inputs = nn.Linear(1, hidden)
        self.state = nn.Linear(hidden, hidden, bias=False)
        nn.init.orthogonal_(self.state.weight, gain)

    def forward(self, x: Tensor) -> Tensor:
        """Return the last state (n, hidden) of sequences (n, L, 1)."""
        state = x.new_zeros(len(x), self.state.in_features)
        for now in self.inputs(x).unbind(1):
            state = torch.tanh(now + self.state(state))
        return state


def exploding_recurrent(seed: int) -> Classifier:
    """Make a recurrent network over 64 pixels whose gradients explode over time."""
    with seeded(derive(seed, "recurrent")):
        return Classifier(Recurrent(64, 2.0), 64, CLASSES)


def dead(seed: int) -> Classifier:
    """Make a perceptron whose second layer has large negative biases, so its units are dead."""
    model = small_mlp(seed)
    with torch.no_grad():
        dict(model.named_parameters())["body.3.bias"].fill_(-10.0)
    return model


def saturated(seed: int) -> Classifier:
    """Make a perceptron with tanh whose weights are 40 times too large."""
    model = small_mlp(seed, activation="tanh")
    with torch.no_grad():
        for name in ("body.1.weight", "body.3.weight"):
            dict(model.named_parameters())[name].mul_(40.0)
    return model


def unit_weights(seed: int) -> Classifier:
    """Make a perceptron whose weights are drawn from the standard normal distribution."""
    model = small_mlp(seed, hidden=(128, 128))
    draws = generator(seed, "weights")
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() > 1:
                value.copy_(torch.randn(value.shape, generator=draws))
    return model


class TwiceSoftmax(Classifier):
    """Perceptron that returns probabilities, to which the loss applies the softmax again."""

    def forward(self, x: Tensor) -> Tensor:
        """Probabilities (n, C) of inputs (n, ...)."""
        return super().forward(x).softmax(-1)


def twice_softmax(seed: int) -> Classifier:
    """Make a perceptron that ends in a softmax."""
    with seeded(derive(seed, "softmax")):
        return TwiceSoftmax(small_mlp(seed).body, 64, CLASSES)


def frozen_body(seed: int) -> Classifier:
    """Make a perceptron whose untrained body is frozen."""
    model = small_mlp(seed)
    model.body.requires_grad_(False)
    return model


# --------------------------------------------------------------------------- set-ups

FAULTS: tuple[Setup, ...] = (
    Setup(
        name="learning rate too high",
        stream=whole,
        model=small_mlp,
        named=("learning rate too high", "learning rate range"),
        optimizer=partial(torch.optim.Adam, lr=1.0),
    ),
    Setup(
        name="learning rate too low",
        stream=whole,
        model=small_mlp,
        named=("learning rate too low", "learning rate range"),
        optimizer=partial(torch.optim.Adam, lr=3e-6),
    ),
    Setup(
        name="vanishing gradient",
        stream=whole,
        model=deep_sigmoid,
        named=("vanishing gradient",),
    ),
    Setup(
        name="exploding gradient",
        stream=as_pixels,
        model=exploding_recurrent,
        named=("exploding gradient",),
        length={"epochs": 5, "batch_size": 64},
    ),
    Setup(name="dead units", stream=whole, model=dead, named=("dead units",)),
    Setup(
        name="saturated activation", stream=whole, model=saturated, named=("saturated activation",)
    ),
    Setup(
        name="poor initialisation",
        stream=whole,
        model=unit_weights,
        named=("initial variance",),
    ),
    Setup(name="label noise", stream=noisy_labels, model=small_mlp, named=("label noise",)),
    Setup(name="imbalance", stream=imbalanced, model=small_mlp, named=("class imbalance",)),
    Setup(name="unscaled input", stream=unscaled, model=small_mlp, named=("unscaled input",)),
    Setup(name="softmax twice", stream=whole, model=twice_softmax, named=("softmax twice",)),
    Setup(
        name="frozen parameters",
        stream=whole,
        model=frozen_body,
        named=("frozen parameters", "unlisted parameters"),
    ),
    Setup(
        name="shuffled labels", stream=shuffled_labels, model=small_mlp, named=("shuffled labels",)
    ),
    Setup(
        name="overfitting",
        stream=few_records,
        model=partial(small_mlp, hidden=(256, 256)),
        named=("overfitting",),
        length={"epochs": 300, "batch_size": 16},
    ),
)
"""Faults of training; the loss of a fault is not measured here (see benchmarks/challenges.py)."""

PRIVATELY: dict[str, Any] = {
    "privacy": PRIVACY,
    "length": {"epochs": 30, "batch_size": 128},
    "optimizer": partial(torch.optim.Adam, lr=5e-3),
}
FEDERATED: dict[str, Any] = {
    "federation": {"clients": 4, "rounds": 5},
    "clients": lambda stream, seed: iid(stream, clients=4, seed=seed),
}


CALIBRATION: tuple[Setup, ...] = (
    Setup(name="mlp", stream=whole, model=small_mlp),
    Setup(name="transformer", stream=whole, model=small_transformer),
    Setup(name="cnn, private", stream=whole, model=small_cnn, **PRIVATELY),
    Setup(name="lstm, private", stream=as_sequences, model=small_lstm, **PRIVATELY),
    Setup(name="mlp, federated", stream=whole, model=small_mlp, **FEDERATED),
    Setup(
        name="cnn, continual",
        stream=split_digits,
        model=small_cnn,
        strategy=Replay(memory_size=200),
    ),
)
"""Healthy set-ups on which thresholds are chosen."""

HELD_OUT: tuple[Setup, ...] = (
    Setup(name="cnn", stream=whole, model=small_cnn),
    Setup(name="lstm", stream=as_sequences, model=small_lstm),
    Setup(name="mlp, private", stream=whole, model=small_mlp, **PRIVATELY),
    Setup(name="transformer, private", stream=whole, model=small_transformer, **PRIVATELY),
    Setup(name="cnn, federated", stream=whole, model=small_cnn, **FEDERATED),
    Setup(
        name="mlp, continual",
        stream=permuted_digits,
        model=partial(small_mlp, hidden=(128, 128)),
        strategy=Replay(memory_size=300),
    ),
)
"""Healthy set-ups on which thresholds are tested; nothing was chosen by them."""


# --------------------------------------------------------------------------- other faults


def drifted(stream: Stream, seed: int) -> list[Stream]:
    """Split evenly over clients; the last one numbers its classes from another end."""
    clients = iid(stream, clients=4, seed=seed)
    wrong = clients[-1]
    only = wrong[0]
    train = replace(only.train, labels=CLASSES - 1 - only.train.labels)
    clients[-1] = replace(wrong, experiences=(replace(only, train=train),))
    return clients


def starving(stream: Stream, seed: int) -> list[Stream]:
    """Split evenly over clients; the last one has 12 records."""
    clients = iid(stream, clients=4, seed=seed)
    few = clients[-1]
    train = few[0].train.take(torch.arange(12))
    only = Experience(
        index=0,
        train=replace(train, declared_size=12),
        test=few[0].test,
        classes=few[0].classes,
    )
    clients[-1] = replace(few, experiences=(only,))
    return clients


OTHER_FAULTS: tuple[Setup, ...] = (
    Setup(
        name="signal below noise",
        stream=whole,
        model=small_mlp,
        named=("signal below noise", "weak signal"),
        **{**PRIVATELY, "privacy": {**PRIVACY, "epsilon": 0.02}},
    ),
    Setup(
        name="learning rate too high, private",
        stream=whole,
        model=small_mlp,
        named=("learning rate too high", "learning rate range", "private step size"),
        **{**PRIVATELY, "optimizer": partial(torch.optim.Adam, lr=1.0)},
    ),
    Setup(
        name="learning rate too low, private",
        stream=whole,
        model=small_mlp,
        named=("learning rate too low", "learning rate range"),
        **{**PRIVATELY, "optimizer": partial(torch.optim.Adam, lr=3e-6)},
    ),
    Setup(name="dead units, private", stream=whole, model=dead, named=("dead units",), **PRIVATELY),
    Setup(
        name="saturated activation, private",
        stream=whole,
        model=saturated,
        named=("saturated activation",),
        **PRIVATELY,
    ),
    Setup(
        name="poor initialisation, private",
        stream=whole,
        model=unit_weights,
        named=("initial variance",),
        **PRIVATELY,
    ),
    Setup(
        name="drifted client",
        stream=whole,
        model=small_mlp,
        named=("drifted client",),
        **{**FEDERATED, "clients": drifted},
    ),
    Setup(
        name="starving client",
        stream=whole,
        model=small_mlp,
        named=("starving client",),
        **{**FEDERATED, "clients": starving},
    ),
    Setup(
        name="diverging server step",
        stream=whole,
        model=small_mlp,
        named=("diverging server step",),
        **{
            **FEDERATED,
            "federation": {
                "clients": 4,
                "rounds": 5,
                "aggregator": FedAvgM(server_learning_rate=4.0, server_momentum=0.5),
            },
        },
    ),
    Setup(
        name="forgotten experience",
        stream=permuted_digits,
        model=partial(small_mlp, hidden=(32,)),
        named=("forgotten experience",),
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        length={"epochs": 30, "batch_size": 64},
    ),
    Setup(
        name="lost plasticity",
        stream=permuted_digits,
        model=small_mlp,
        strategy=EWC(strength=1e8),
        named=("lost plasticity",),
    ),
    Setup(
        name="dead memory",
        stream=split_digits,
        model=small_mlp,
        strategy=Replay(memory_size=5),
        named=("dead memory",),
    ),
    Setup(
        name="bias to new classes",
        stream=split_digits,
        model=small_mlp,
        named=("bias to new classes",),
    ),
    *(
        Setup(
            name=f"learning rate {rate:g}, {classes} classes at a time",
            stream=stream,
            model=small_mlp,
            strategy=Replay(memory_size=200),
            named=("learning rate too high", "learning rate range"),
            optimizer=partial(torch.optim.Adam, lr=rate),
        )
        for rate in (0.5, 3.0)
        for classes, stream in ((2, split_digits), (5, halved_digits))
    ),
)
"""Faults of privacy, of federations and of streams."""
