"""Refuse outputs of a model that are NaN or infinite, before predictions are made from them."""

import torch
from torch import Tensor

from perdure.errors import NonFiniteError


def finite_outputs(outputs: Tensor, *, first: int = 0) -> Tensor:
    """Return a model's outputs (n, ..., C) unchanged, if the largest one of each record is finite.

    `argmax` treats NaN as the largest number, so a model with NaN outputs would seem to predict its
    first class. A class may be excluded by -infinity.

    Args:
        outputs: outputs of the model.
        first: number of the first record, for the message.

    Raises:
        NonFiniteError: if the largest output of a record is NaN or infinite.
    """
    largest = torch.isfinite(outputs.amax(-1))
    if not bool(largest.all()):
        lost = ~largest.view(len(largest), -1).all(1)
        raise NonFiniteError(
            f"outputs of the model are NaN or infinite for {int(lost.sum())} of {len(lost)} "
            f"records, first record {first + int(lost.nonzero()[0])}; allowed: finite numbers; "
            "look for NaN in its input, for an overflow in the model, or lower the learning rate"
        )
    return outputs
