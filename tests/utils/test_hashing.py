"""Numbers computed from record ids: mixing function, uniform, normal, independent, and equal under
vmap.
"""

import pytest
import torch

from perdure.data.scenarios import public_coin
from perdure.utils.hashing import hashed, normals, uniforms
from perdure.utils.seeding import derive

MANY = torch.arange(100_000)


def mixed(word):
    """Return SplitMix64's next word after the state `word`, in Python integers."""
    word = (word + 0x9E3779B97F4A7C15) % 2**64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
    return word ^ word >> 31


@pytest.mark.reference
def test_the_hash_of_an_id_equals_splitmix64():
    assert mixed(0) == 0xE220A8397B1DCDAF  # first output of the reference implementation at seed 0
    ids = [0, 1, 12_345, 2**62 + 7, -1, -(2**63)]
    for stream in ((), (3,), (3, -5), (derive("label", 0), 2**63 - 1)):
        salt = 0
        for part in stream:
            salt = mixed((salt + part) % 2**64)
        expected = [mixed(mixed(i % 2**64) ^ salt) for i in ids]
        assert [word % 2**64 for word in hashed(torch.tensor(ids), *stream).tolist()] == expected


@pytest.mark.reference
def test_the_public_number_has_the_upper_bits_of_the_hash():
    expected = [(word % 2**64 >> 11) * 2.0**-53 for word in hashed(MANY[:50], 7, 2).tolist()]
    assert public_coin(MANY[:50], seed=7, purpose=2).tolist() == expected


def test_hashed_uniform_numbers_are_uniform():
    """A fixed hash has no flakiness. The gap to the uniform distribution exceeds 1.36 / sqrt(n) in
    one of 20 samples.

    The gap to the uniform distribution is 1.36 / sqrt(n) in one of 20 samples.
    """
    for stream in ((), (0,), (1,), (derive("label", 0), 1)):
        drawn = uniforms(MANY, *stream).double().sort().values
        assert drawn[0] > 0 and drawn[-1] < 1
        gap = (drawn - (MANY + 0.5) / len(MANY)).abs().max()
        assert gap < 2 / len(MANY) ** 0.5


def unmixed(word):
    """Return the inverse of `mixed`, each step of which can be undone."""
    word ^= word >> 31 ^ word >> 62
    word = word * pow(0x94D049BB133111EB, -1, 2**64) % 2**64
    word ^= word >> 27 ^ word >> 54
    word = word * pow(0xBF58476D1CE4E5B9, -1, 2**64) % 2**64
    word ^= word >> 30 ^ word >> 60
    return (word - 0x9E3779B97F4A7C15) % 2**64


def test_hashed_uniform_numbers_are_never_0_or_1():
    """The ids have the smallest and the largest hash words; the inverse distribution function is
    finite there.
    """
    ids = [unmixed(unmixed(word)) for word in (0, 2**64 - 1)]
    ends = torch.tensor([i - 2**64 if i >= 2**63 else i for i in ids])
    assert hashed(ends).tolist() == [0, -1]
    assert uniforms(ends).tolist() == [2.0**-24, 1 - 2.0**-24]
    assert normals(ends).tolist() == pytest.approx([-5.29, 5.29], abs=0.02)


def test_hashed_normal_numbers_are_normal():
    """A fixed hash has no flakiness. The bounds are four standard errors of the moments of 100,000
    numbers.

    Bounds are four standard errors of the moments of 100,000 numbers.
    """
    for stream in ((), (5,), (derive("noise"), 3)):
        drawn = normals(MANY, *stream).double()
        error = len(MANY) ** -0.5
        assert abs(drawn.mean()) < 4 * error
        assert abs(drawn.square().mean() - 1) < 4 * 2**0.5 * error
        assert abs(drawn.pow(4).mean() - 3) < 4 * 96**0.5 * error


def test_hashed_numbers_of_two_streams_or_ids_are_independent():
    rows = [
        uniforms(MANY),
        uniforms(MANY, 0),
        uniforms(MANY, 1),
        uniforms(MANY, 0, 1),
        uniforms(MANY, 1, 0),
    ]
    rows += [uniforms(MANY + 1), uniforms(MANY + 1, 0)]
    apart = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert float(apart.abs().max()) < 4 / len(MANY) ** 0.5


def test_a_hashed_number_depends_only_on_its_id_and_stream():
    table = uniforms(MANY[:20, None], 9, torch.arange(4))
    assert table.shape == (20, 4)
    for i in (0, 7):
        for j in range(4):
            assert float(table[i, j]) == float(uniforms(torch.tensor(i), 9, j))
    assert torch.equal(torch.func.vmap(lambda i: uniforms(i, 9, torch.arange(4)))(MANY[:20]), table)
    torch.testing.assert_close(
        torch.func.vmap(lambda i: normals(i[None], 9)[0])(MANY[:20]), normals(MANY[:20], 9)
    )
