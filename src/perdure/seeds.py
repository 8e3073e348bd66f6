"""Randomness that is a function of one seed and of where it is used, never of what ran before.

So a resumed run needs no generator state: it derives the same numbers again.
Private noise and coins do not come from here: see `perdure.privacy.noise`.
"""

import hashlib
import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64
"""2^64 over the golden ratio, as a signed number: what SplitMix64 counts in."""


def derive(seed: int | str, *where: object) -> int:
    """63-bit seed for one place: SHA-256 of the seed and the names of the place."""
    text = "/".join(str(part) for part in (seed, *where))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *where: object) -> torch.Generator:
    """CPU generator for one place."""
    return torch.Generator().manual_seed(derive(seed, *where))


def normals(ids: Tensor, step: Tensor, count: int, *, seed: int = 0) -> Tensor:
    """(n, count) standard normal numbers, a function of each record's id, the step and the seed alone.

    Every row is a stream of SplitMix64 that begins at a hash of the three, so that rows need no generator, run under
    `torch.func.vmap`, and are the same whatever rows stand beside them.

    Args:
        ids: (n,) int64. step: () int64. count: numbers a row.

    Source: Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", section 5.

    >>> normals(torch.arange(3), torch.tensor(0), 2).shape
    torch.Size([3, 2])
    """
    start = scrambled(scrambled(scrambled(torch.full_like(ids, seed) + GOLDEN) + ids) + step)
    bits = scrambled(start[:, None] + GOLDEN * torch.arange(1, count + 1, device=ids.device))
    odd = 2 * ((bits >> 41) & (2**23 - 1)) + 1 - 2**23  # never 0 and below 2^23: exact in float32, symmetric, no inf
    return math.sqrt(2) * torch.erfinv(odd.float() / 2**23)


def scrambled(numbers: Tensor) -> Tensor:
    """Whole numbers of 64 bits, one to one, so that near ones have nothing in common (SplitMix64's last step)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        numbers = (numbers ^ shifted(numbers, shift)) * factor
    return numbers ^ shifted(numbers, 31)


def shifted(numbers: Tensor, places: int) -> Tensor:
    """Shift to the right with zeros coming in; torch's own brings in the sign."""
    return torch.bitwise_and(numbers >> places, 2 ** (64 - places) - 1)
