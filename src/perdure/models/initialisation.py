"""Initial weights of linear layers and convolutions, by name.

    he          normal numbers of variance gain^2 / (inputs of a unit)
    xavier      uniform numbers of variance gain^2 * 2 / (inputs + outputs of a unit)
    orthogonal  orthogonal rows or columns, times gain

The gain is that of the activation after the layer, and 1 for the head. Biases start at 0.

Source: He, Zhang, Ren, Sun 2015, "Delving deep into rectifiers"; Glorot and Bengio 2010,
"Understanding the difficulty of training deep feedforward neural networks"; Saxe, McClelland,
Ganguli 2014, "Exact solutions to the nonlinear dynamics of learning".
"""

import math

from torch import nn

from perdure.models.classifier import Classifier
from perdure.models.config import Activation, Initialisation

GAINS: dict[Activation, float] = {
    "relu": nn.init.calculate_gain("relu"),
    "leaky_relu": nn.init.calculate_gain("leaky_relu", 0.01),
    "prelu": nn.init.calculate_gain("leaky_relu", 0.25),
    # torch has no gain for these two, which are close to ReLU
    "gelu": nn.init.calculate_gain("relu"),
    "silu": nn.init.calculate_gain("relu"),
    "tanh": nn.init.calculate_gain("tanh"),
}
"""Factor of the initial weights by which each activation keeps the size of its inputs."""


def initialise(classifier: Classifier, kind: Initialisation, activation: Activation) -> None:
    """Set the initial weights of a classifier, from torch's global generator.

    A cosine head, normalisation layers and PReLU keep theirs.

    Args:
        classifier: classifier to change.
        kind: name of the initialisation; `default` changes nothing.
        activation: activation of the body.
    """
    if kind == "default":
        return
    for layer in classifier.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            _fill(layer, kind, 1.0 if layer is classifier.head else GAINS[activation])


def _fill(layer: nn.Linear | nn.Conv2d, kind: Initialisation, gain: float) -> None:
    """Fill the weight of one layer, and set its bias to 0."""
    if kind == "he":
        inputs = layer.weight[0].numel()
        nn.init.normal_(layer.weight, std=gain / math.sqrt(inputs))
    elif kind == "xavier":
        nn.init.xavier_uniform_(layer.weight, gain)
    else:
        nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
