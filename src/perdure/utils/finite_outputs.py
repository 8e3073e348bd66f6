"""Refusal of a model's outputs that are NaN or infinite, before any of them counts as largest."""

import torch
from torch import Tensor

from perdure.errors import ConfigError


def finite_outputs(outputs: Tensor, *, first: int = 0) -> Tensor:
    """Return a model's outputs (n, ..., C) as they are, where every record has a largest one.

    `argmax` takes NaN for the largest number, so a model that answers NaN would be measured as one
    that predicts its first class. A class may be ruled out by -infinity.

    Args:
        outputs: of the model.
        first: number of the first record, for the message.

    Raises:
        ConfigError: where the largest output of a record is NaN or infinite.
    """
    largest = torch.isfinite(outputs.amax(-1))
    if not bool(largest.all()):
        lost = ~largest.view(len(largest), -1).all(1)
        raise ConfigError(
            f"outputs of the model are NaN or infinite for {int(lost.sum())} of {len(lost)} "
            f"records, first record {first + int(lost.nonzero()[0])}; allowed: finite numbers; "
            "look for NaN in its input, for an overflow in the model, or lower the learning rate"
        )
    return outputs
