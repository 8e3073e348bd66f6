import copy
import hashlib
import hmac
import math
import pickle
import stat

import numpy as np
import pytest
import torch
from scipy import stats

from perdure.errors import ConfigError, PrivacyError
from perdure.privacy.noise.key import NoiseKey, keystream, keystream_reader, subkey

STREAM = {"purpose": "gradient", "entry": "e0", "step": 0}
N = 40_000


SCALE = 1.1 * 2**21
"""Grid steps in a standard deviation."""


def draw(key=None, n=N, scale=SCALE, **changes):
    key = key or NoiseKey.from_seed(0)
    total = torch.zeros(n, dtype=torch.int64)
    key.add_noise(total, scale, **(STREAM | changes))
    return total.double() / scale


# ---- the key


def test_the_key_file_is_created_once_with_mode_0600(tmp_path):
    path = tmp_path / "private" / "noise.key"
    first = NoiseKey.from_os(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_bytes()) == 32
    assert NoiseKey.from_os(path).mac(b"x") == first.mac(b"x")
    assert [p.name for p in path.parent.iterdir()] == ["noise.key"]
    assert not first.simulated


def test_two_noise_keys_from_the_operating_system_differ(tmp_path):
    a = NoiseKey.from_os(tmp_path / "a")
    b = NoiseKey.from_os(tmp_path / "b")
    assert a.mac(b"x") != b.mac(b"x")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602])
def test_a_key_file_readable_by_others_is_refused(tmp_path, mode):
    path = tmp_path / "noise.key"
    NoiseKey.from_os(path)
    path.chmod(mode)
    with pytest.raises(PrivacyError, match="chmod 600"):
        NoiseKey.from_os(path)


def test_a_noise_key_file_of_another_length_is_refused(tmp_path):
    path = tmp_path / "noise.key"
    path.write_bytes(b"short")
    path.chmod(0o600)
    with pytest.raises(PrivacyError, match="32 bytes, but 5 were given"):
        NoiseKey.from_os(path)


def test_a_key_file_written_first_by_another_process_is_kept(tmp_path, monkeypatch):
    path = tmp_path / "noise.key"
    first = NoiseKey.from_os(path)
    # as for one that looked before the file was there
    monkeypatch.setattr(type(path), "exists", lambda self: False)
    assert NoiseKey.from_os(path).mac(b"x") == first.mac(b"x")
    assert [p.name for p in tmp_path.iterdir()] == ["noise.key"]


def test_the_noise_key_cannot_be_printed_pickled_or_copied(tmp_path):
    key = NoiseKey.from_os(tmp_path / "noise.key")
    secret = (tmp_path / "noise.key").read_bytes()
    assert repr(key) == str(key) == "NoiseKey(secret)"
    assert secret.hex() not in key.mac(b"")
    # writing is what must fail; nothing is ever loaded
    for leak in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(PrivacyError):
            leak(key)


def test_simulated_keys_are_marked_and_depend_on_every_seed_part():
    keys = [
        NoiseKey.from_seed(*p)
        for p in [(0,), (1,), ("0",), (0, "a"), ("0a",), (0, "a", ""), (2**32,)]
    ]
    assert all(key.simulated for key in keys)
    assert repr(keys[0]) == "NoiseKey(simulated)"
    assert len({key.mac(b"x") for key in keys}) == len(keys)
    assert NoiseKey.from_seed(0, "a").mac(b"x") == keys[3].mac(b"x")


def test_from_seed_refuses_an_object_without_a_stable_name():
    with pytest.raises(ConfigError):
        NoiseKey.from_seed(object())


def test_the_mac_key_differs_from_every_noise_stream_key():
    key = NoiseKey(bytes(32), simulated=False)
    assert key.mac(b"m") != hmac.new(bytes(32), b"m", hashlib.sha256).hexdigest()
    assert key.mac(b"m") != key.mac(b"n")
    kinds = [
        subkey(bytes(32), *c)
        for c in [
            ("mac",),
            ("tags", ""),
            ("uniform", "", "", 0, 1),
            ("integers", "", "", 0, "", 0, 1.0),
        ]
    ]
    assert len(set(kinds)) == 4


# ---- the streams


@pytest.mark.reference
def test_the_keystream_equals_aes_256_ctr():
    """The reference encrypts counters block by block, because NIST SP 800-38A uses another
    counter.
    """
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = bytes(range(32))
    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    expected = b"".join(block.update(i.to_bytes(16, "big")) for i in range(300))
    assert keystream(key, 16 * 300 - 3).tobytes() == expected[:-3]
    assert keystream(key, 0).tobytes() == b""


def test_a_keystream_reader_continues_at_the_last_position():
    read = keystream_reader(bytes(32), 40)
    assert (
        b"".join(read(n).tobytes() for n in (40, 5, 0, 16, 39))
        == keystream(bytes(32), 100).tobytes()
    )


def test_equal_seeds_and_purposes_give_equal_pinned_noise():
    """Pinned values keep simulated runs reproducible from one version to the next."""
    assert torch.equal(draw(), draw())
    key = NoiseKey.from_seed(0, "client 3")
    u = key.uniform(2, **STREAM)
    z = torch.zeros(2, dtype=torch.int64)
    key.add_noise(z, 2.0**20, **STREAM)
    t = key.tags(torch.tensor([0, -1]), "memory")
    pinned = (
        [0.5192421856097101, 0.3509415407009505, 0.443228750135922, 0.5145880189490496],
        [232902, 1445231],
    )
    assert torch.equal(torch.cat((u, t)), torch.tensor(pinned[0], dtype=torch.float64))
    assert z.tolist() == pinned[1]


@pytest.mark.parametrize(
    "change",
    [
        {"purpose": "reference"},
        {"entry": "e1"},
        {"step": 1},
        {"key": NoiseKey.from_seed(1)},
        {"n": N - 1},
        {"nonce": "another"},
        {"scale": SCALE * (1 + 2**-30)},
    ],
)
def test_a_changed_seed_purpose_or_scale_gives_other_noise(change):
    base = draw()
    other = draw(**change)
    m = min(len(base), len(other))
    # integers repeat by chance at a given position with probability below 1e-6
    assert (base[:m] == other[:m]).sum() <= 2


def test_add_noise_adds_to_the_given_sum():
    total = torch.arange(5) * 10**6
    NoiseKey.from_seed(0).add_noise(total, SCALE, **STREAM)
    assert torch.equal((total - torch.arange(5) * 10**6).double() / SCALE, draw(n=5))
    NoiseKey.from_seed(0).add_noise(torch.zeros(0, dtype=torch.int64), SCALE, **STREAM)


def test_tags_of_sums_are_equal_only_for_equal_sums():
    key = NoiseKey.from_seed(0)
    exact = np.arange(5)
    assert key.tag("a", exact) == key.tag("a", exact.copy())
    others = [key.tag("b", exact), key.tag("a", exact[:4]), key.tag("a", exact + 1)]
    assert key.tag("a", exact) not in others


def test_uniform_numbers_are_in_0_to_1_with_53_bits():
    u = NoiseKey.from_seed(0).uniform(N, **STREAM)
    assert u.dtype == torch.float64 and u.shape == (N,)
    assert u.min() >= 0 and u.max() < 1
    # 32-bit values would collide here with probability 0.17, 24-bit ones surely
    assert len(u.unique()) == N
    assert (u * 2**53 == (u * 2**53).round()).all() and ((u * 2**40) % 1 != 0).any()
    assert NoiseKey.from_seed(0).uniform(0, **STREAM).shape == (0,)


def test_tags_of_records_depend_only_on_the_record_id():
    key = NoiseKey.from_seed(0)
    ids = torch.arange(-500, 500)
    tags = key.tags(ids, "memory")
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(key.tags(ids[order], "memory"), tags[order])
    assert torch.equal(key.tags(ids[3:4], "memory"), tags[3:4])
    assert torch.equal(
        key.tags(torch.tensor([7, 7]), "memory")[0], key.tags(torch.tensor([7]), "memory")[0]
    )
    assert len(tags.unique()) == 1000
    assert not (tags == key.tags(ids, "other")).any()


# ---- statistics. All keys are simulated, so each test is deterministic; under a fresh key a
# correct implementation would fail each comparison with the probability named beside it.


def scale_p_value(z, scale):
    """Return the two-sided p-value of variance = scale^2 under normality."""
    chi2 = (z**2).sum().item() / scale**2
    return 2 * min(stats.chi2.cdf(chi2, len(z)), stats.chi2.sf(chi2, len(z)))


@pytest.mark.statistical
@pytest.mark.parametrize("seed", range(5))
def test_the_noise_scale_is_1_and_not_two_thirds_or_three_halves(seed):
    """Flakiness is 1e-6 per seed; the wrong scales are rejected with power 1 - 1e-100."""
    z = draw(NoiseKey.from_seed(seed), n=4001)
    assert scale_p_value(z, 1) > 1e-6
    assert scale_p_value(z, 2 / 3) < 1e-12 and scale_p_value(z, 3 / 2) < 1e-12


@pytest.mark.statistical
@pytest.mark.parametrize("seed", [0])
def test_noise_of_the_key_is_normally_distributed(seed):
    """Flakiness is 1e-6; a scale of 1.02 or a mean of 0.02 is rejected at n = 400,000."""
    z = draw(NoiseKey.from_seed(seed), n=400_000).numpy()
    assert stats.kstest(z, "norm").pvalue > 1e-6
    assert (
        stats.kstest(1.02 * z, "norm").pvalue < 1e-6
        and stats.kstest(z + 0.02, "norm").pvalue < 1e-6
    )
    beyond = int((np.abs(z) > 4).sum())  # 25 expected
    assert stats.binomtest(beyond, len(z), 2 * stats.norm.sf(4)).pvalue > 1e-6


@pytest.mark.statistical
@pytest.mark.parametrize("source", ["uniform", "tags"])
def test_uniform_numbers_of_the_key_are_uniform(source):
    """Flakiness is 1e-6; a probability that is 1 % too high is rejected at n = 200,000."""
    key = NoiseKey.from_seed(1)
    n = 200_000
    u = (
        key.uniform(n, **STREAM) if source == "uniform" else key.tags(torch.arange(n), "memory")
    ).numpy()
    assert stats.kstest(u, "uniform").pvalue > 1e-6
    assert stats.kstest(u**1.02, "uniform").pvalue < 1e-6
    low_bits = (u * 2**53).astype(np.int64) % 16
    assert stats.chisquare(np.bincount(low_bits, minlength=16)).pvalue > 1e-6


@pytest.mark.statistical
def test_noise_streams_are_independent_of_shifted_streams():
    """240 correlations, each beyond 5.5 sigma with probability 4e-8; a correlation of 0.05 would
    show.
    """
    streams = [
        draw(step=s, purpose=p, entry=e) for s in (0, 1, 2) for p in "ab" for e in ("x", "y")
    ]
    rows = torch.stack([*streams, *(s.roll(lag) for s in streams[:2] for lag in (1, N // 2))])
    for values in (rows, rows**2):
        off_diagonal = torch.corrcoef(values) - torch.eye(len(values))
        assert off_diagonal.abs().max() * math.sqrt(N) < 5.5
    mixed = torch.stack((rows[0], 0.05 * rows[0] + rows[1]))
    assert torch.corrcoef(mixed)[0, 1] * math.sqrt(N) > 5.5


@pytest.mark.statistical
def test_sampling_of_a_record_is_independent_over_steps():
    """Rate 0.1, 2,000 records, 100 steps: each record's count is binomial. Flakiness is 1e-6 per
    comparison.

    Flakiness 1e-6 per comparison.
    """
    key = NoiseKey.from_seed(2)
    coins = torch.stack(
        [key.uniform(2000, purpose="sample", entry="e", step=s) < 0.1 for s in range(100)]
    )
    for counts, trials in ((coins.sum(0), 100), (coins.sum(1), 2000)):
        spread = ((counts - 0.1 * trials) ** 2).sum().item() / (0.09 * trials)
        assert 1e-6 < stats.chi2.cdf(spread, len(counts)) < 1 - 1e-6
