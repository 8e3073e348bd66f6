"""Scattering and random convolutions: brute-force references, properties, independence and
refusals.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from perdure.errors import ConfigError, DataError
from perdure.models.random_convolutions import RandomConvolutions, random_filters
from perdure.models.scattering import Scattering, low_pass, modulus, morlet


def images(n=3, channels=1, side=28, seed=0):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(seed))


def stripes(angle, side=28):
    """Return (1, 1, side, side) waves of the finest wavelet's frequency in direction `angle`."""
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    return torch.cos(3 * math.pi / 4 * (x * math.cos(angle) + y * math.sin(angle)))[None, None]


def plain_wavelet(scale, direction, orientations):
    """Return the formula of `morlet`, entry by entry."""
    sigma = 0.8 * 2**scale
    slant = 4 / orientations
    xi = 0.75 * math.pi / 2**scale
    reach = math.ceil(3 * sigma / slant)
    theta = math.pi * direction / orientations
    wave = {}
    envelope = {}
    for y in range(-reach, reach + 1):
        for x in range(-reach, reach + 1):
            along = x * math.cos(theta) + y * math.sin(theta)
            across = y * math.cos(theta) - x * math.sin(theta)
            bump = (
                math.exp(-(along**2 + slant**2 * across**2) / (2 * sigma**2))
                * slant
                / (2 * math.pi * sigma**2)
            )
            envelope[y, x] = bump
            wave[y, x] = bump * complex(math.cos(xi * along), math.sin(xi * along))
    balance = sum(wave.values()) / sum(envelope.values())
    return {place: wave[place] - balance * envelope[place] for place in wave}


def plain_modulus(plane, wavelet, step):
    """Return |convolution| with periodic borders, by Fourier transforms, at every step-th pixel."""
    ring = torch.zeros(plane.shape, dtype=torch.complex128)
    for (y, x), value in wavelet.items():
        ring[y % len(ring), x % len(ring)] += value
    return torch.fft.ifft2(torch.fft.fft2(plane) * torch.fft.fft2(ring)).abs()[::step, ::step]


def plain_average(plane, resolution, scales):
    """Return Gaussian means around every 2^J-th pixel inside the margin."""
    margin = 2**scales
    step = 2**resolution
    sigma = 0.8 * 2 ** (scales - 1)
    side = len(plane) * step
    bumps = [
        [math.exp(-((p * step - centre) ** 2) / (2 * sigma**2)) for p in range(len(plane))]
        for centre in range(margin, side - margin, margin)
    ]
    weights = torch.tensor(
        [[bump / sum(line) for bump in line] for line in bumps], dtype=torch.float64
    )
    return weights @ plane @ weights.T


@pytest.mark.reference
def test_scattering_equals_the_brute_force_formula():
    scales = 2
    orientations = 8
    image = images(n=1, side=12)
    plane = F.pad(image, (4,) * 4, mode="reflect")[0, 0].double()
    fine, coarse = (
        [plain_wavelet(j, k, orientations) for k in range(orientations)] for j in range(scales)
    )
    first = [plain_modulus(plane, wavelet, 1) for wavelet in fine]
    expected = [plain_average(plane, 0, scales)]
    expected += [plain_average(moduli, 0, scales) for moduli in first]
    expected += [plain_average(plain_modulus(plane, wavelet, 2), 1, scales) for wavelet in coarse]
    second = [plain_modulus(moduli, wavelet, 2) for moduli in first for wavelet in coarse]
    expected += [plain_average(moduli, 1, scales) for moduli in second]
    found = Scattering(scales=scales, orientations=orientations)(image)[0].double()
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("scales", "orientations", "channels"), [(1, 1, 2), (2, 8, 81), (2, 4, 25), (3, 2, 19)]
)
def test_scattering_shapes_follow_scales_and_orientations(scales, orientations, channels):
    transform = Scattering(scales=scales, orientations=orientations)
    small = 32 // 2**scales
    assert transform.channels == channels
    assert transform(images(side=32)).shape == (3, channels, small, small)
    assert transform(images(n=0, side=32)).shape == (0, channels, small, small)


def test_scattering_works_on_non_square_images():
    turned = Scattering(orientations=4)(images().mT[..., :20, :].mT)
    assert turned.shape == (3, 25, 7, 5)


@pytest.mark.parametrize("scale", [0, 1, 2])
def test_wavelets_have_mean_0_and_peak_at_their_frequency(scale):
    wavelets = morlet(scale, 8)
    assert wavelets.sum((1, 2)).abs().max() < 1e-6
    response = torch.fft.fft2(wavelets, s=(64, 64)).abs()
    for direction, plane in enumerate(response):
        fy, fx = (2 * math.pi * (k - 64 * (k >= 32)) / 64 for k in divmod(int(plane.argmax()), 64))
        centre = 0.75 * math.pi / 2**scale
        angle = math.pi * direction / 8
        assert math.hypot(fx - centre * math.cos(angle), fy - centre * math.sin(angle)) < 0.2


def test_a_rotated_wavelet_is_the_wavelet_of_the_rotated_angle():
    wavelets = morlet(1, 8)
    torch.testing.assert_close(wavelets[4:], wavelets[:4].rot90(-1, (1, 2)))


@pytest.mark.parametrize("direction", range(8))
def test_stripes_activate_the_channel_of_their_direction(direction):
    finest = Scattering()(stripes(math.pi * direction / 8))[0, 1:9].mean((1, 2))
    assert int(finest.argmax()) == direction


def test_a_constant_image_has_only_its_mean_as_feature():
    features = Scattering()(torch.full((1, 1, 16, 16), 0.7))
    torch.testing.assert_close(features[:, 0], torch.full((1, 4, 4), 0.7))
    assert features[:, 1:].abs().max() < 1e-6


def test_the_low_pass_filter_averages_around_each_position():
    for resolution in range(3):
        weights = low_pass(32, 2, resolution)
        assert weights.shape == (6, 32 >> resolution)
        torch.testing.assert_close(weights.sum(1), torch.ones(6))
        assert torch.equal(weights.argmax(1), torch.arange(4, 28, 4) >> resolution)


def test_scattering_features_are_equal_alone_and_in_a_batch():
    x = images(n=5)
    transform = Scattering()
    together = transform(x)
    torch.testing.assert_close(torch.cat([transform(x[i : i + 1]) for i in range(5)]), together)
    torch.testing.assert_close(transform(x, batch_size=2), together)


def test_scattering_does_not_mix_the_channels_of_an_image():
    x = images(channels=3, side=16)
    transform = Scattering(orientations=2)
    apart = torch.cat([transform(x[:, k : k + 1]) for k in range(3)], 1)
    torch.testing.assert_close(transform(x), apart)


def test_a_shift_changes_scattering_less_than_pixels():
    x = images(side=32, n=8)[:, :, 8:24, 8:24]
    x = F.pad(F.interpolate(x, scale_factor=2, mode="bilinear"), (8, 8, 8, 8))
    moved = x.roll(1, 3)

    def change(a, b):
        return float((a - b).norm() / a.norm())

    transform = Scattering()
    assert change(transform(x), transform(moved)) < 0.5 * change(x, moved)


def test_scattering_modulus_is_periodic_at_the_borders():
    x = images(side=16)
    torch.testing.assert_close(modulus(x.roll(4, 2), 1, 4), modulus(x, 1, 4).roll(2, 2))


@pytest.mark.parametrize("field", ["scales", "orientations"])
def test_scattering_refuses_settings_below_1(field):
    with pytest.raises(ConfigError, match=f"{field} = 0 is not allowed"):
        Scattering(**{field: 0})


@pytest.mark.parametrize("shape", [(2, 28, 28), (2, 1, 30, 28), (2, 1, 28, 4)])
def test_scattering_refuses_other_image_shapes(shape):
    with pytest.raises(DataError, match="sides above 4 and divisible by it"):
        Scattering()(torch.zeros(shape))


# --------------------------------------------------------------------------- random convolutions


def test_random_filters_have_mean_0_and_norm_1():
    for channels, size, smoothing in ((1, 7, 1.0), (3, 5, 0.0), (2, 1, 0.0)):
        kernels = random_filters(9, channels, size, smoothing, torch.Generator().manual_seed(1))
        assert kernels.shape == (9, channels, size, size)
        assert kernels.mean((1, 2, 3)).abs().max() < 1e-6
        torch.testing.assert_close(kernels.square().sum((1, 2, 3)), torch.ones(9))


def test_smoothing_makes_random_filters_smoother():
    def roughness(smoothing):
        kernels = random_filters(200, 1, 7, smoothing, torch.Generator().manual_seed(1))
        return float(kernels.diff(dim=3).square().sum((1, 2, 3)).mean())

    assert roughness(2.0) < 0.5 * roughness(1.0) < 0.25 * roughness(0.0)


@pytest.mark.reference
def test_random_convolutions_equal_the_written_out_formula():
    x = images(n=2, channels=2, side=6)
    features = RandomConvolutions(channels=2, filters=3, size=3, pool=2, seed=5)
    around = F.pad(x, (1, 1, 1, 1))
    found = features(x)
    for k, kernel in enumerate(features.kernels):
        plane = torch.stack(
            [
                torch.stack(
                    [
                        (around[:, :, r : r + 3, c : c + 3] * kernel).sum((1, 2, 3))
                        for c in range(6)
                    ],
                    1,
                )
                for r in range(6)
            ],
            1,
        )
        for channel, sign in ((k, 1), (k + 3, -1)):
            rectified = (sign * plane).clamp(min=0)
            means = rectified.view(2, 3, 2, 3, 2).mean((2, 4))
            torch.testing.assert_close(found[:, channel], means, rtol=1e-4, atol=1e-6)


def test_random_convolutions_depend_only_on_seed_and_image():
    x = images(n=5)
    first, again, other = (RandomConvolutions(filters=4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first(x), again(x)) and not torch.allclose(first(x), other(x))
    torch.testing.assert_close(torch.cat([first(x[i : i + 1]) for i in range(5)]), first(x))
    assert first(x).shape == (5, 8, 4, 4) and list(first.parameters()) == [] == list(
        first.state_dict()
    )
    assert (
        repr(first) == "RandomConvolutions(channels=1, filters=4, size=7, pool=7, smoothing=1.0, "
        "root=False, seed=0)"
    )
    x = images(n=2, channels=1, side=14)
    torch.testing.assert_close(RandomConvolutions(filters=4, root=True)(x).square(), first(x))


def test_random_convolutions_are_0_inside_a_constant_image():
    inner = RandomConvolutions(filters=4, size=3, pool=4)(torch.full((1, 1, 12, 12), 0.7))[
        :, :, 1, 1
    ]
    assert inner.abs().max() < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channels": 0}, "channels = 0"),
        ({"filters": 0}, "filters = 0"),
        ({"pool": 0}, "pool = 0"),
        ({"size": 4}, "size = 4 .*odd numbers"),
        ({"size": 1}, "size = 1"),
        ({"smoothing": -1.0}, "smoothing = -1.0"),
    ],
)
def test_random_convolutions_refuse_invalid_settings(options, message):
    with pytest.raises(ConfigError, match=message):
        RandomConvolutions(**options)


@pytest.mark.parametrize("shape", [(2, 28, 28), (2, 3, 28, 28), (2, 1, 28, 6)])
def test_random_convolutions_refuse_other_shapes(shape):
    with pytest.raises(DataError, match="sides from 7"):
        RandomConvolutions()(torch.zeros(shape))
