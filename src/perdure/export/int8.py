"""Weights of linear layers as 8-bit whole numbers, by torchao."""

import logging
import warnings

from torch import nn

from perdure.errors import ConfigError
from perdure.utils.extras import imported


def quantise(model: nn.Module) -> None:
    """Store the weights of every `nn.Linear` as int8, with one scale per output (weight-only).

    Activations and other layers stay in float32. Files become up to four times smaller; on a
    processor a call is not faster, because the weights are converted in every call.

    Args:
        model: model that is changed in place.

    Raises:
        ConfigError: for a model without a linear layer, or without the package torchao.
    """
    if not any(isinstance(part, nn.Linear) for part in model.modules()):
        raise ConfigError.of("int8", True, "only for a model with an nn.Linear layer")
    # its source has escapes that newer Pythons warn of when they compile it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
        quantization = imported("torchao.quantization", "export", "int8")
        utils = imported("torchao.utils", "export", "int8")
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig(version=2))
        # plain tensors: the artifact needs no torchao
        utils.unwrap_tensor_subclass(model)
