"""Probabilities as 64-bit integers, for arrays of NumPy and for compiled loops."""

from collections.abc import Callable
from typing import Any

import numpy as np

from perdure.privacy.noise.table import Words

Share = Callable[[Words, Words, Words], Words]
"""Function for the probability, times 2^63, that integers of their cells are kept."""
_HALF = np.uint64(32)
_LOW = np.uint64(2**32 - 1)


def share_of(high: Callable[[Any, Any], Any]) -> Share:
    """Build the function exp(-y) times 2^63, with y = G (2 j + t) t below 1/16.

    exp(-y) = 1 - y (1 - y/2 (1 - y/3 (...))). The arguments are 2 j + t times 2^50, t times 2^64
    and G times 2^78. `high` computes the upper 64 bits of a product.
    """
    one = np.uint64(2**63)

    def share(doubled: Words, place: Words, slope: Words) -> Words:
        y = high(high(doubled, place), slope)
        value: Any = one
        for k in range(9, 0, -1):
            value = one - high(y, value) // np.uint64(k)
        kept: Words = value
        return kept

    return share


def upper_product(a: Words, b: Words) -> Words:
    """Upper 64 bits of the products of two arrays, computed from halves of 32 bits."""
    a_low = a & _LOW
    a_high = a >> _HALF
    b_low = b & _LOW
    b_high = b >> _HALF
    cross = a_high * b_low + (a_low * b_low >> _HALF)
    other = a_low * b_high + (cross & _LOW)
    product: Words = a_high * b_high + (cross >> _HALF) + (other >> _HALF)
    return product
