"""Configuration of the built-in models."""

from dataclasses import dataclass
from typing import Literal

from torch import nn

from perdure.errors import ConfigError
from perdure.models.classifier import HEADS, Head
from perdure.utils.checked_fields import CheckedFields

Normalisation = Literal["none", "group", "batch"]
ModelName = Literal["mlp", "cnn", "resnet18", "generative"]
Activation = Literal["relu", "tanh", "gelu"]

NORMS: tuple[Normalisation, ...] = ("none", "group", "batch")
MODELS: tuple[ModelName, ...] = ("mlp", "cnn", "resnet18", "generative")
ACTIVATIONS: dict[Activation, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(CheckedFields):
    """Which model, and its shape.

    Args:
        name: mlp, cnn, resnet18, or generative: an mlp with a variational autoencoder beside it.
        hidden: units of each hidden layer (mlp; of encoder and decoder too).
        activation: relu, tanh or gelu (mlp, cnn); encoder and decoder have relu.
        norm: none, group or batch (cnn, resnet18). Batch is refused under differential privacy.
        width: channels of ResNet-18's first stage; the CNN's layers have width/2, width and
            2*width.
        latent: length of a latent vector (generative).
        head: linear, or cosine: logits by the angles between features and classes, without bias.

    Raises:
        ConfigError: naming the field.
    """

    name: ModelName = "mlp"
    hidden: tuple[int, ...] = (400, 400)
    activation: Activation = "relu"
    norm: Normalisation = "group"
    width: int = 64
    latent: int = 100
    head: Head = "linear"

    def __post_init__(self) -> None:
        choices = (("name", MODELS), ("activation", ACTIVATIONS), ("norm", NORMS), ("head", HEADS))
        for field, allowed in choices:
            value = getattr(self, field)
            if value not in allowed:
                raise ConfigError.of(field, value, allowed)
        if any(units < 1 for units in self.hidden):
            raise ConfigError.of("hidden", self.hidden, "positive whole numbers")
        if self.width < 2 or self.width % 2:
            raise ConfigError.of("width", self.width, "even numbers from 2")
        if self.latent < 1:
            raise ConfigError.of("latent", self.latent, "whole numbers from 1")
