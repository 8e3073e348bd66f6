"""A clip norm that follows a quantile of the gradient norms, at a privacy cost in every step.

Andrew, Thakkar, McMahan and Ramaswamy, Differentially Private Learning with Adaptive Clipping,
NeurIPS 2021.

    C_{t+1} = C_t exp(-eta (b_t - gamma))
    b_t     = 1/2 + (sum_i (1[norm_i <= C_t] - 1/2) + N(0, s^2)) / m

with gamma the quantile, eta the learning rate and m the expected batch size, a declared number.
Gradient and count are one release: with noise multipliers z_g and 2s (a record moves the count by
1/2) they cost as much as one Gaussian with a multiplier z, where z^-2 = z_g^-2 + (2s)^-2 (theorem
1). The ledger charges z; the gradient gets the larger z_g.
"""

import math
from dataclasses import dataclass

from perdure.errors import ConfigError, PrivacyError
from perdure.utils.checked_fields import CheckedFields

LEAST = 1e-9
MOST = 1e9


@dataclass(frozen=True, kw_only=True)
class Adaptive(CheckedFields):
    """Settings of adaptive clipping: the clip norm follows a quantile of the gradient norms.

    Args:
        quantile: share of records whose gradient should not be scaled down (gamma).
        learning_rate: learning rate of the logarithm of the clip norm (eta).
        count_noise: standard deviation of the noise on the count, as a share of the expected batch
            (s / m).

    Raises:
        ConfigError: if a value is outside its range.
    """

    quantile: float = 0.5
    learning_rate: float = 0.2
    count_noise: float = 0.05

    def __post_init__(self) -> None:
        for name, most in (("quantile", 1.0), ("learning_rate", 10.0), ("count_noise", 100.0)):
            if not 0 < getattr(self, name) <= most:
                raise ConfigError.of(
                    f"adaptive.{name}", getattr(self, name), f"a number above 0 and up to {most:g}"
                )

    def gradient_noise(self, noise_multiplier: float, expected: float) -> float:
        """Return the noise multiplier z_g of the gradient sum, released together with a count.

        The count is the noisy number of records whose gradient norm is within the clip norm.
        Gradient and count together are charged as one release with `noise_multiplier`.

        Args:
            noise_multiplier: noise multiplier z that the ledger charges.
            expected: declared number of records in a step.

        Raises:
            PrivacyError: if the count alone would use the whole privacy cost of the step.
        """
        left = noise_multiplier**-2 - (2 * self.count_noise * expected) ** -2
        if left <= 0:
            raise PrivacyError(
                f"count_noise = {self.count_noise:g} is too small for {expected:g} records per "
                f"step at noise multiplier {noise_multiplier:g}: the count alone would use the "
                "whole privacy cost of the step; allowed: more than "
                f"{noise_multiplier / (2 * expected):.3g}"
            )
        return 1 / math.sqrt(left)

    def updated(self, clip_norm: float, counted: float, expected: float) -> float:
        """Compute the next clip norm from the noisy sum of votes.

        A record votes 1/2 if its norm is at most the current clip norm, and -1/2 if not.

        Args:
            clip_norm: the current clip norm.
            counted: noisy sum of the votes.
            expected: declared number of records in a step.
        """
        share = 0.5 + counted / expected
        return min(
            max(clip_norm * math.exp(-self.learning_rate * (share - self.quantile)), LEAST), MOST
        )
