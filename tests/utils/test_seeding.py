import numpy as np
import pytest
import torch

from perdure.errors import ConfigError
from perdure.utils.seeding import SECRET_BYTES, drawing_from, generator_from

SECRET = bytes(range(SECRET_BYTES))


def flipped(secret, bit):
    changed = bytearray(secret)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def drawn(seed):
    return tuple(torch.rand(4, generator=generator_from(seed)).tolist())


def test_generator_from_uses_every_bit_of_a_secret():
    secrets = [SECRET, *(flipped(SECRET, bit) for bit in range(8 * SECRET_BYTES))]
    assert len({drawn(secret) for secret in secrets}) == len(secrets)


def test_generator_from_secret_bytes_has_more_than_32_bits():
    """torch keeps 32 bits of a number, so two numbers that agree in them draw the same."""
    assert drawn(5) == drawn(5 + 2**32)
    assert drawn(SECRET) != drawn(SECRET[:4] + bytes(28)) != drawn(bytes(28) + SECRET[-4:])


def test_generator_from_fills_the_whole_state_of_the_generator():
    """NumPy's Mersenne twister with the same words draws the same numbers, so no word was lost."""
    generator = generator_from(SECRET)
    wide = generator.get_state()[24 : 24 + 8 * 624].view(624, 8)
    assert not wide[:, 4:].any()
    words = wide[:, :4].contiguous().view(torch.int32).flatten().numpy().astype(np.uint32)
    twister = np.random.RandomState()
    twister.set_state(("MT19937", words, 624))
    theirs = twister.randint(0, 2**32, size=2000, dtype=np.uint32)
    ours = torch.rand(2000, generator=generator).numpy() * 2**24
    assert (ours == theirs % 2**24).all()


def test_generator_from_refuses_a_short_secret():
    with pytest.raises(ConfigError, match="secret = '8 bytes' is not allowed; allowed: 32 or more"):
        generator_from(b"8 bytes.")


@pytest.mark.parametrize("seed", [7, SECRET])
def test_drawing_from_a_seed_changes_no_global_generator(seed):
    before = torch.get_rng_state()
    with drawing_from(seed):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with drawing_from(seed):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3, generator=generator_from(seed)), first)
