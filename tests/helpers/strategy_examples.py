"""The example of every strategy and the model that it needs."""

import torch

from perdure import strategies


def example(name):
    return strategies.find(name).example()


def model_of(name, stream, otherwise):
    """Return the small model that the strategy needs, or `otherwise(stream)`."""
    own = example(name).small_model(input_shape=stream.input_shape, num_classes=stream.num_classes)
    return otherwise(stream) if own is None else own


def private():
    """Return the names of strategies that may run under privacy, because their losses do not couple
    records.
    """
    return [name for name in strategies.names() if not example(name).couples_records]


def moved(model):
    """Return the model with every parameter changed from its start, so that no parameter is 0."""
    place = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=place))
    return model
