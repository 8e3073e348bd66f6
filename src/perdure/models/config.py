"""Configuration of the built-in models."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from torch import nn

from perdure.errors import ConfigError
from perdure.models.classifier import HEADS, Head
from perdure.utils.checked_fields import CheckedFields

Normalisation = Literal["none", "layer", "group", "batch"]
ModelName = Literal["mlp", "cnn", "resnet18", "mobilenet", "generative"]
Activation = Literal["relu", "leaky_relu", "prelu", "gelu", "silu", "tanh"]
Initialisation = Literal["default", "he", "xavier", "orthogonal"]

NORMS: tuple[Normalisation, ...] = ("none", "layer", "group", "batch")
MODELS: tuple[ModelName, ...] = ("mlp", "cnn", "resnet18", "mobilenet", "generative")
INITIALISATIONS: tuple[Initialisation, ...] = ("default", "he", "xavier", "orthogonal")
ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": partial(nn.LeakyReLU, 0.01),
    "prelu": partial(nn.PReLU, init=0.25),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}
FULLY_CONNECTED: tuple[ModelName, ...] = ("mlp", "generative")
"""Models of fully connected layers; they have no normalisation unless one is given."""
OF_MODELS: dict[str, tuple[ModelName, ...]] = {
    "hidden": FULLY_CONNECTED,
    "activation": ("mlp", "cnn", "mobilenet", "generative"),
    "width": ("cnn", "resnet18", "mobilenet"),
    "latent": ("generative",),
    "skip": ("mlp", "cnn", "generative"),
    "depth": ("cnn",),
}
"""Fields that only some models have."""
LARGEST_DEPTH = 100


@dataclass(frozen=True, kw_only=True)
class ModelConfig(CheckedFields):
    """Configuration of a model: its name and sizes.

    Args:
        name: `mlp`, `cnn`, `resnet18`, `mobilenet`, or `generative` (an mlp with a variational
            autoencoder).
        hidden: number of units of each hidden layer (mlp, encoder and decoder).
        activation: relu, leaky_relu, prelu, gelu, silu or tanh (mlp, cnn, mobilenet); encoder and
            decoder, and ResNet-18, have relu.
        norm: none, layer, group or batch, after each layer. None is group for convolutions, and
            none for fully connected layers. Batch is refused under differential privacy.
        width: number of channels of ResNet-18's first stage; the layers of the CNN have width/2,
            width and 2*width, and so have the blocks of MobileNet.
        latent: length of a latent vector (generative).
        head: `linear`, or `cosine` for logits from the angles between features and classes, without
            bias.
        init: initial weights of linear layers and convolutions: PyTorch's default, he, xavier or
            orthogonal, with the gain of the activation and biases of 0.
        skip: residual connections around every layer but the first (mlp, cnn), with a projection
            where widths differ.
        depth: number of convolutions of the CNN; after the third all have the same width.
        dropout: share of features that is set to 0 in training: after each hidden layer of
            an mlp, before the head of other models.

    Raises:
        ConfigError: if an argument is not allowed, or the model does not have it; the message names
            it.
    """

    name: ModelName = "mlp"
    hidden: tuple[int, ...] = (400, 400)
    activation: Activation = "relu"
    norm: Normalisation | None = None
    width: int = 64
    latent: int = 100
    head: Head = "linear"
    init: Initialisation = "default"
    skip: bool = False
    depth: int = 3
    dropout: float = 0.0

    def __post_init__(self) -> None:
        choices: tuple[tuple[str, Any], ...] = (
            ("name", MODELS),
            ("activation", ACTIVATIONS),
            ("head", HEADS),
            ("init", INITIALISATIONS),
        )
        for field, allowed in choices:
            value = getattr(self, field)
            if value not in allowed:
                raise ConfigError.of(field, value, allowed)
        if self.norm is not None and self.norm not in NORMS:
            raise ConfigError.of("norm", self.norm, NORMS)
        if any(units < 1 for units in self.hidden):
            raise ConfigError.of("hidden", self.hidden, "positive whole numbers")
        if self.width < 2 or self.width % 2:
            raise ConfigError.of("width", self.width, "even numbers from 2")
        if self.latent < 1:
            raise ConfigError.of("latent", self.latent, "whole numbers from 1")
        if not 1 <= self.depth <= LARGEST_DEPTH:
            raise ConfigError.of("depth", self.depth, f"whole numbers from 1 to {LARGEST_DEPTH}")
        if not 0 <= self.dropout < 1:
            raise ConfigError.of("dropout", self.dropout, "a number from 0 to below 1")
        self._refuse_unused()
        if self.name in FULLY_CONNECTED and self.norm in ("layer", "group") and 1 in self.hidden:
            # one number has no spread, so it would always become 0
            raise ConfigError.of("hidden", self.hidden, f"2 units or more with norm = {self.norm}")

    def _refuse_unused(self) -> None:
        """Refuse values of fields that have no meaning for the model."""
        defaults = {each.name: each.default for each in fields(self)}
        for field, models in OF_MODELS.items():
            value = getattr(self, field)
            if self.name not in models and value != defaults[field]:
                known = ", ".join(models)
                allowed = (
                    f"the default, because {self.name} has no {field}; models with it: {known}"
                )
                raise ConfigError.of(field, value, allowed)
        layers = len(self.hidden) if self.name in FULLY_CONNECTED else self.depth
        if self.skip and layers < 2:
            field = "hidden" if self.name in FULLY_CONNECTED else "depth"
            raise ConfigError.of("skip", True, f"false for one layer; give two or more in {field}")

    @property
    def normalisation(self) -> Normalisation:
        """Normalisation of the model; its own default if none is given."""
        own: Normalisation = "none" if self.name in FULLY_CONNECTED else "group"
        return own if self.norm is None else self.norm
