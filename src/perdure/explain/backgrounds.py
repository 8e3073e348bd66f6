"""Values of absent features: one number everywhere, or a token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perdure.errors import ConfigError
from perdure.explain._model import Rows
from perdure.utils.checked_fields import CheckedFields


@dataclass(frozen=True, kw_only=True)
class TokenBackground(CheckedFields):
    """Background of token numbers: absent tokens are replaced by one token, and some never are.

    It takes the place of the background rows of an explainer for sequences of token numbers.

    Args:
        baseline: token that stands for an absent one, such as that of a mask or of padding.
        kept: tokens that are always present, such as those at the start and end of a text; their
            value is 0.

    Raises:
        ConfigError: if a token is negative.

    >>> TokenBackground(baseline=0, kept=(1, 2))
    TokenBackground(baseline=0, kept=(1, 2))
    """

    baseline: int
    kept: Sequence[int] = ()

    def __post_init__(self) -> None:
        for name, tokens in (("baseline", (self.baseline,)), ("kept", tuple(self.kept))):
            if min(tokens, default=0) < 0:
                raise ConfigError.of(name, getattr(self, name), "token numbers from 0")


Background = Rows | TokenBackground
"""Rows (b, ...) that give the values of absent features, or a rule for tokens."""


def constant_background(
    inputs: Tensor, baseline: float = 0.0, *, kept: Sequence[int] = ()
) -> Background:
    """Return a background with the same value for every absent feature.

    Args:
        inputs: (n, ...) rows in the shape and dtype of the instances; their values are not used.
        baseline: the value; for token numbers the token of an absent one.
        kept: tokens that are always present.

    Raises:
        ConfigError: if inputs are token numbers and the value is none, or tokens are kept of other
            inputs.

    >>> import torch
    >>> constant_background(torch.rand(5, 2), 0.5)
    tensor([[0.5000, 0.5000]])
    >>> constant_background(torch.tensor([[3, 1, 4]]), kept=(1,))
    TokenBackground(baseline=0, kept=(1,))
    """
    numbers = inputs.is_floating_point()
    if numbers and kept:
        shown = str(inputs.dtype).removeprefix("torch.")
        raise ConfigError.of("kept", tuple(kept), f"no tokens, because inputs are {shown} numbers")
    if not numbers and (baseline < 0 or baseline != int(baseline)):
        raise ConfigError.of("baseline", baseline, "a token number from 0, as inputs are tokens")
    if kept:
        return TokenBackground(baseline=int(baseline), kept=tuple(kept))
    return torch.full_like(inputs[:1], baseline)
