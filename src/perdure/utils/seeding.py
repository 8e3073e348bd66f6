"""Randomness that is a function of one seed and of where it is used, never of what ran before.

So a resumed run needs no generator state: it derives the same numbers again.
Private noise and coins do not come from here: see `perdure.privacy.noise.key`.
"""

import hashlib

import torch


def derive(seed: int | str, *where: object) -> int:
    """63-bit seed for one place: SHA-256 of the seed and the names of the place."""
    text = "/".join(str(part) for part in (seed, *where))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *where: object) -> torch.Generator:
    """CPU generator for one place."""
    return torch.Generator().manual_seed(derive(seed, *where))
