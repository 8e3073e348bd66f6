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
    """Configuration of a model: its name and sizes.

    Args:
        name: `mlp`, `cnn`, `resnet18`, or `generative` (an mlp with a variational autoencoder).
        hidden: number of units of each hidden layer (mlp, encoder and decoder).
        activation: relu, tanh or gelu (mlp, cnn); encoder and decoder have relu.
        norm: none, group or batch (cnn, resnet18). Batch is refused under differential privacy.
        width: number of channels of ResNet-18's first stage; the layers of the CNN have width/2,
            width and 2*width.
        latent: length of a latent vector (generative).
        head: `linear`, or `cosine` for logits from the angles between features and classes, without
            bias.

    Raises:
        ConfigError: if an argument is not allowed; the message names it.
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
