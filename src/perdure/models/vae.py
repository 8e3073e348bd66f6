"""Classifier together with a variational autoencoder, for generative replay."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.bodies import fully_connected
from perdure.models.classifier import Classifier
from perdure.utils.seeding import derive, seeded


class Generative(Classifier):
    """Classifier together with a variational autoencoder; the two share no parameter.

    Kingma and Welling, Auto-Encoding Variational Bayes, ICLR 2014, with fully connected layers on
    the flattened input.

    Args:
        classifier: classifier whose body and head become parts of this model; parameters keep their
            names.
        input_shape: shape of one input, with numbers in [0, 1].
        latent: length of a latent vector.
        hidden: units of each hidden layer of the encoder, and of the decoder.
    """

    def __init__(
        self,
        classifier: Classifier,
        input_shape: tuple[int, ...],
        latent: int,
        hidden: tuple[int, ...],
    ) -> None:
        super().__init__(classifier.body, classifier.feature_size, classifier.num_classes)
        self.head = classifier.head
        self.input_shape = input_shape
        self.latent = latent
        pixels = math.prod(input_shape)
        down = (pixels, *hidden)
        up = (latent, *reversed(hidden))
        self.encoder = nn.Sequential(
            nn.Flatten(), *fully_connected(down), nn.Linear(down[-1], 2 * latent)
        )
        self.decoder = nn.Sequential(*fully_connected(up), nn.Linear(up[-1], pixels))

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance (n, latent) of the latent vectors of inputs (n, ...).

        Raises:
            ConfigError: if inputs have another shape than the generator.
        """
        if tuple(x.shape[1:]) != self.input_shape:
            raise ConfigError.of(
                "input shape",
                tuple(x.shape[1:]),
                f"{self.input_shape}, as the generator was made for",
            )
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, z: Tensor) -> Tensor:
        """Logits (n, ...) of an input's numbers in [0, 1], from latent vectors (n, latent)."""
        logits: Tensor = self.decoder(z).unflatten(1, self.input_shape)
        return logits


def generative(
    classifier: Classifier,
    *,
    input_shape: Sequence[int],
    latent: int = 100,
    hidden: tuple[int, ...] = (400, 400),
    seed: int = 0,
) -> Generative:
    """Add a generator to a classifier; the parameters of the classifier keep their names.

        generative(mlp(input_shape=(1, 28, 28), num_classes=10, seed=0), input_shape=(1, 28, 28))

    Args:
        classifier: classifier that becomes a part of the model (it is not copied).
        input_shape: shape of one input, with numbers in [0, 1].
        latent: length of a latent vector.
        hidden: units of each hidden layer of the encoder; the decoder mirrors them.
        seed: seed of the generator's initial parameters.

    Raises:
        ConfigError: if an argument is not allowed.
    """
    if latent < 1:
        raise ConfigError.of("latent", latent, "whole numbers from 1")
    if any(units < 1 for units in hidden):
        raise ConfigError.of("hidden", hidden, "positive whole numbers")
    # another seed than the classifier's layers, which may have the same shapes
    with seeded(derive(seed, "generator")):
        return Generative(classifier, tuple(input_shape), latent, hidden)
