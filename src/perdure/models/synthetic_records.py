"""Synthetic records from a model with a generator."""

import torch
from torch import nn

from perdure.data.domain import InputDomain
from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.models.vae import Generative
from perdure.utils.hashing import hashed
from perdure.utils.modules import evaluating
from perdure.utils.seeding import derive, generator


def synthetic_records(
    model: nn.Module, *, count: int, seed: int = 0, partition: str = "synthetic"
) -> Records:
    """Draw records from the generator of a trained model, labelled by its classifier.

        input = sigmoid(decode(z)),   z ~ N(0, I),   label = most probable class of the input

    Guarantee: a function of the model alone. Records of a model that was trained with privacy, as
    by `GenerativeReplay`, cost no further epsilon: train on them without privacy. Records of a
    model that was trained without privacy tell of its records; a private learner refuses both,
    because a ledger of synthetic records covers no real one (`Records.coupled_by`).

    Args:
        model: trained model of `perdure.models.generative`.
        count: number of records.
        seed: seed of the latent vectors, and of the ids.
        partition: name of the records' partition.

    Raises:
        ConfigError: if the model has no generator, or there are no records to draw.
    """
    if not isinstance(model, Generative):
        allowed = "a model of perdure.models.generative"
        raise ConfigError.of("model", type(model).__name__, allowed)
    if count < 1:
        raise ConfigError.of("count", count, "a whole number, 1 or more")
    place = next(model.parameters()).device
    latent = torch.randn(count, model.latent, generator=generator(seed, "latent vectors"))
    with torch.no_grad(), evaluating(model):
        inputs = model.decode(latent.to(place)).sigmoid()
        labels = model(inputs).argmax(1)
    return Records(
        inputs=inputs,
        labels=labels,
        ids=hashed(torch.arange(count), derive(seed, "synthetic records")).to(place),
        partition=partition,
        domain=InputDomain(shape=model.input_shape, range=(0.0, 1.0)),
        coupled_by="synthetic_records(...)",
    )
