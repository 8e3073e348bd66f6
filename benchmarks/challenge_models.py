"""Models of `challenges.py`, which names them as "challenge_models:NAME"."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from perdure.data import digits
from perdure.models import Classifier, mlp
from perdure.utils import generator

Norm = Literal["none", "layer", "group", "batch"]
Activation = Literal["relu", "leaky_relu", "prelu", "gelu", "silu", "tanh"]
Initialisation = Literal["default", "he", "xavier", "orthogonal"]


def saddle(
    input_shape: tuple[int, ...], num_classes: int, seed: int, scale: float = 1e-3
) -> Classifier:
    """Make an MLP whose initial weights are so small that training begins at a saddle point."""
    model = mlp(input_shape=input_shape, num_classes=num_classes, hidden=(64, 64, 64), seed=seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(scale)
                module.bias.zero_()
    return model


def large(
    input_shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    scale: float = 4.0,
    norm: Norm | None = None,
) -> Classifier:
    """Make a deep MLP with tanh whose hidden weights are some times those of Xavier."""
    model = mlp(
        input_shape=input_shape,
        num_classes=num_classes,
        hidden=(64,) * 8,
        activation="tanh",
        init="xavier",
        norm=norm or "none",
        seed=seed,
    )
    with torch.no_grad():
        for module in model.body.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(scale)
    return model


def spoilt(
    input_shape: tuple[int, ...],
    num_classes: int,
    seed: int,
    fault: str,
    activation: Activation = "relu",
    init: Initialisation | None = None,
    norm: Norm = "none",
    skip: bool = False,
    dropout: float = 0.0,
) -> nn.Module:
    """Make an MLP with a fault.

    Args:
        input_shape: shape of an input.
        num_classes: number of classes.
        seed: seed of the initial weights.
        fault: `dead` (large negative biases), `saturated` (weights 40 times too large), `normal`
            (weights from the standard normal distribution), `softmax` (before the loss) or `frozen`
            (the body).
        activation: activation of the hidden layers.
        init: initialisation, which replaces a faulty one; None for the faulty one.
        norm: normalisation of the hidden layers.
        skip: True for residual connections.
        dropout: share of the features that is set to 0 in training.
    """
    model = mlp(
        input_shape=input_shape,
        num_classes=num_classes,
        hidden=(64, 64),
        activation=activation,
        init=init or "default",
        norm=norm,
        skip=skip,
        dropout=dropout,
        seed=seed,
    )
    if fault == "softmax":
        return nn.Sequential(model, nn.Softmax(-1))
    if fault == "frozen":
        model.body.requires_grad_(False)
        return model
    draws = generator(seed, "spoilt weights")
    layers = [] if init else [each for each in model.modules() if isinstance(each, nn.Linear)]
    with torch.no_grad():
        for layer in layers[:-1]:
            if fault == "dead":
                layer.bias.fill_(-10.0)
            elif fault == "saturated":
                layer.weight.mul_(40.0)
            else:
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=draws))
    return model


def transferred(input_shape: tuple[int, ...], num_classes: int, seed: int) -> Classifier:
    """Make an MLP that has learnt the first half of the digits, as they are published."""
    model = mlp(input_shape=input_shape, num_classes=num_classes, hidden=(64,), seed=seed)
    records = digits().train
    half = slice(0, len(records) // 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(20):
        for rows in torch.split(torch.randperm(half.stop), 32):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(records.inputs[rows]), records.labels[rows])
            torch.autograd.backward(loss)
            optimizer.step()
    return model
