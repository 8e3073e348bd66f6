"""Private noise: drawn from a secret key, discrete or correlated over steps.

Import `NoiseKey`, the source of all private noise and of the coins (secret random numbers that
decide which records enter a step), and `noise_key`, which opens the key of a folder.
"""

from perdure.privacy.noise.key import NoiseKey, noise_key

__all__ = [
    "NoiseKey",
    "noise_key",
]
