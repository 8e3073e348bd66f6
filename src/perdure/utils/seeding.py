"""Random numbers that depend only on one seed and the place of use, never on earlier draws.

So a resumed run needs no state of a generator: it derives the same numbers again. Private noise and
sampling do not use this module: see `perdure.privacy.noise.key`. Random numbers of torch inside a
private step (dropout, views, attack starts) use a generator that is filled with secret bytes of
that key: see `generator_from`.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from perdure.errors import ConfigError

Seed = int | bytes
"""A public number, or at least `SECRET_BYTES` secret bytes."""

SECRET_BYTES = 32
TWISTER_WORDS = 624
# torch's state of a CPU generator: seed, words left and next word take 24 bytes before the words,
# each of 32 bits in eight bytes; what is cached of normal numbers follows.
TWISTER_START = 24
TWISTER_STATE_BYTES = 5056


def derive(seed: int | str, *where: object) -> int:
    """Derive a 63-bit seed for one use: SHA-256 of the seed and the names of the use."""
    text = "/".join(str(part) for part in (seed, *where))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def seed_for(seed: Seed, *where: object) -> Seed:
    """Derive the seed for one use; it is secret if `seed` is."""
    if isinstance(seed, int):
        return derive(seed, *where)
    text = "/".join(map(str, where)).encode()
    return hashlib.shake_256(seed + text).digest(SECRET_BYTES)


def generator(seed: int, *where: object) -> torch.Generator:
    """Return a CPU generator for one use, with a seed from `derive`."""
    return torch.Generator().manual_seed(derive(seed, *where))


def generator_from(seed: Seed) -> torch.Generator:
    """Return a CPU generator whose state is set from a number, or from all bits of secret bytes.

    torch's CPU generator keeps only 32 bits of the number given to `manual_seed`, so a secret seed
    could be guessed. Secret bytes fill all 19,968 bits of its state instead.

    >>> generator_from(7).initial_seed()
    7
    >>> first, second = (generator_from(bytes(31) + last) for last in (b"0", b"1"))
    >>> bool((torch.rand(9, generator=first) == torch.rand(9, generator=second)).any())
    False
    """
    fresh = torch.Generator()
    if isinstance(seed, int):
        return fresh.manual_seed(seed)
    fresh.set_state(_twister_state(seed))
    return fresh


def seed_globally(seed: int) -> None:
    """Set the seed of torch's global generators, as `torch.manual_seed` does, but faster.

    `torch.manual_seed` records the call stack for every kind of accelerator that is not in use,
    which takes 0.3 ms, as long as a step of a small model.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Context manager that restores the state of torch's global CPU generator."""
    before = torch.default_generator.get_state()
    try:
        yield
    finally:
        torch.default_generator.set_state(before)


@contextmanager
def drawing_from(seed: Seed, device: torch.device | str = "cpu") -> Iterator[None]:
    """Context manager in which torch's global generators start from `seed`.

    The state of the CPU generator is restored afterwards. With secret bytes the state of the
    generator of `device` is restored, too, so that later numbers reveal nothing about them. An
    accelerator's generator (Philox) keeps 64 bits.
    """
    place = torch.device(device)
    if isinstance(seed, int):
        with undisturbed():
            seed_globally(seed)
            yield
        return
    with undisturbed():
        torch.default_generator.set_state(_twister_state(seed))
        with nullcontext() if place.type == "cpu" else _accelerator_from(seed, place):
            yield


@contextmanager
def _accelerator_from(secret: bytes, place: torch.device) -> Iterator[None]:
    module = torch.get_device_module(place)
    with torch.random.fork_rng(devices=[place], device_type=place.type):
        # manual_seed of a module uses its present device, which may be another one
        with module.device(place) if hasattr(module, "device") else nullcontext():
            module.manual_seed(int.from_bytes(hashlib.sha256(secret).digest()[:8], "big"))
        yield


def _twister_state(secret: bytes) -> Tensor:
    """Return a state for torch's CPU generator, filled with SHAKE-256 of the secret.

    Raises:
        ConfigError: if there are fewer than `SECRET_BYTES` bytes, or the state of this torch
            version has another layout.
    """
    if len(secret) < SECRET_BYTES:
        raise ConfigError.of("secret", f"{len(secret)} bytes", f"{SECRET_BYTES} or more")
    state = _fresh_state().copy()
    words = np.frombuffer(hashlib.shake_256(secret).digest(4 * TWISTER_WORDS), dtype="<u4")
    state[TWISTER_START : TWISTER_START + 8 * TWISTER_WORDS].view("<u8")[:] = words
    return torch.from_numpy(state)


@cache
def _fresh_state() -> npt.NDArray[np.uint8]:
    """Return the state of a new CPU generator, the template of `_twister_state`."""
    state: npt.NDArray[np.uint8] = torch.Generator().manual_seed(0).get_state().numpy()
    if len(state) != TWISTER_STATE_BYTES:
        given = f"{len(state)} bytes in torch {torch.__version__}"
        allowed = f"{TWISTER_STATE_BYTES}, as in known versions; use another torch version"
        raise ConfigError.of("state of a CPU generator", given, allowed)
    return state


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial parameters on the processor from `seed` inside the `with` block.

    The generators of the caller do not change.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # not torch.manual_seed, which would also seed every accelerator
        torch.default_generator.manual_seed(seed)
        yield
