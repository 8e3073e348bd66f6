"""Numbers that belong to a record: drawn, as it were, by its id, and the same wherever and whenever they are asked for.

The hooks of a strategy have no generator: a row may depend on its record only, and a resumed run must say the same. So
what they draw is a hash of the record's id and of what it is drawn for. It runs under `torch.func.vmap`.

Guarantee: none; everyone can compute these numbers. They are never used for noise, nor for what must stay secret.

Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators, OOPSLA 2014 (the mixing function).
"""

import math

import torch
from torch import Tensor

STEP, FIRST, SECOND = (word - 2**64 for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def hashed(ids: Tensor, *stream: int | Tensor) -> Tensor:
    """Hash ids to int64 words of which every bit depends on all bits of the id.

    Args:
        ids: (n,) int64. stream: what the number is for, such as `seeds.derive("label", experience)`: another stream
            gives other numbers. Tensors int64 of any shape that goes with that of `ids`.
    """
    salt = torch.zeros((), dtype=torch.int64, device=ids.device)
    for part in stream:
        salt = _mixed(salt + part)
    return _mixed(_mixed(ids) ^ salt)


def uniforms(ids: Tensor, *stream: int | Tensor) -> Tensor:
    """Numbers uniform in the open interval (0, 1), float32, on a grid of 2^23 places. See `hashed`.

    >>> uniforms(torch.arange(3)[:, None], 7, torch.arange(5)).shape
    torch.Size([3, 5])
    """
    return (shifted(hashed(ids, *stream), 41).float() + 0.5) * 2.0**-23


def normals(ids: Tensor, *stream: int | Tensor) -> Tensor:
    """Standard normal numbers, float32, between -5.3 and 5.3. See `hashed`."""
    return math.sqrt(2) * torch.erfinv(2 * uniforms(ids, *stream) - 1)


def shifted(words: Tensor, places: int) -> Tensor:
    """Move bits to the right, zeros coming in, where torch's own brings in the sign."""
    moved: Tensor = (words >> places) & (2 ** (64 - places) - 1)
    return moved


def _mixed(words: Tensor) -> Tensor:
    """Mix 64-bit words; arithmetic is modulo 2^64, which is that of int64."""
    words = words + STEP
    words = (words ^ shifted(words, 30)) * FIRST
    words = (words ^ shifted(words, 27)) * SECOND
    return words ^ shifted(words, 31)
