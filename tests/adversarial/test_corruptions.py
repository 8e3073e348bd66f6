"""Corruptions of images, measured like robust accuracy."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from perdure.adversarial import STRENGTHS, corrupted, measure_corruptions
from perdure.errors import ConfigError

IMAGES = torch.rand(8, 2, 12, 12, generator=torch.Generator().manual_seed(0))


def changed(name, strength, **given):
    return corrupted(IMAGES, name, strength, generator=torch.Generator().manual_seed(1), **given)


@pytest.mark.parametrize("name", STRENGTHS)
def test_a_stronger_corruption_changes_images_more(name):
    changes = [(changed(name, strength) - IMAGES).abs().mean() for strength in range(1, 6)]
    assert all(one < two for one, two in pairwise(changes))
    assert changes[0] > 0
    assert changed(name, 5).min() >= 0 and changed(name, 5).max() <= 1


def test_the_blur_equals_the_filter_of_scipy():
    from scipy.ndimage import gaussian_filter

    images = IMAGES.numpy()
    expected = [[gaussian_filter(c, 1.0, mode="nearest") for c in each] for each in images]
    assert np.abs(changed("blur", 5).numpy() - np.array(expected)).max() < 1e-5


def test_noise_and_brightness_follow_the_range_of_inputs():
    wide = 2 * IMAGES - 1
    draws = torch.Generator().manual_seed(1)
    moved = corrupted(wide, "noise", 1, generator=draws, bounds=(-1.0, 1.0))
    assert torch.allclose((moved + 1) / 2, changed("noise", 1), atol=1e-6)
    brighter = corrupted(wide, "brightness", 2, generator=draws, bounds=(-1.0, 1.0))
    assert torch.allclose((brighter + 1) / 2, (IMAGES + 0.1).clamp(max=1), atol=1e-6)


def test_a_card_has_the_accuracy_of_each_corruption():
    class Bright(nn.Module):
        """Two classes by the mean of an image, which noise and blur keep."""

        def forward(self, rows):
            score = rows.mean((1, 2, 3)) - 0.45
            return torch.stack([-score, score], 1)

    images = torch.cat([0.3 * IMAGES + 0.2, 0.3 * IMAGES + 0.6])
    labels = torch.tensor([0] * 8 + [1] * 8)
    card = measure_corruptions(Bright(), images, labels, generator=torch.Generator().manual_seed(0))
    assert card.clean_accuracy == 100 and card.accuracies["noise"] == (100.0,) * 5
    bright = card.accuracies["brightness"]
    assert (bright[0], bright[-1]) == (100.0, 50.0) and list(bright) == sorted(bright)[::-1]
    values = [value for row in card.accuracies.values() for value in row]
    assert card.mean_accuracy == pytest.approx(sum(values) / 20)
    assert "16 records" in str(card) and card.row()["records"] == 16


@pytest.mark.parametrize(
    ("name", "strength", "images", "field"),
    [
        ("fog", 1, IMAGES, "corruption"),
        ("noise", 6, IMAGES, "strength"),
        ("noise", 1, IMAGES[0], "images"),
    ],
)
def test_a_wrong_corruption_is_refused_by_its_field(name, strength, images, field):
    with pytest.raises(ConfigError, match=field):
        corrupted(images, name, strength, generator=torch.Generator())
