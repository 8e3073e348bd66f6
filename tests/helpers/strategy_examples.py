"""The example of every strategy, and the model it needs."""

import torch

from perdure import strategies


def example(name):
    return strategies.find(name).example()


def model_of(name, stream, otherwise):
    """The small model that the strategy needs, else what `otherwise` makes of the stream."""
    own = example(name).small_model(input_shape=stream.input_shape, num_classes=stream.num_classes)
    return otherwise(stream) if own is None else own


def private():
    """Names of those that may run under privacy: no loss of theirs couples records."""
    return [name for name in strategies.names() if not example(name).couples_records]


def moved(model):
    """The model with every parameter off its start, so that what begins at 0 counts."""
    place = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.3 * torch.randn(value.shape, generator=place))
    return model
