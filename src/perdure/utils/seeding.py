"""Randomness that is a function of one seed and of where it is used, never of what ran before.

So a resumed run needs no generator state: it derives the same numbers again.
Private noise and coins do not come from here: see `perdure.privacy.noise.key`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int | str, *where: object) -> int:
    """63-bit seed for one place: SHA-256 of the seed and the names of the place."""
    text = "/".join(str(part) for part in (seed, *where))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *where: object) -> torch.Generator:
    """CPU generator for one place."""
    return torch.Generator().manual_seed(derive(seed, *where))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let layers start as `seed` alone says, on the processor.

    The caller's generators are left as they are.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # not torch.manual_seed, which would also reseed every accelerator
        torch.default_generator.manual_seed(seed)
        yield
