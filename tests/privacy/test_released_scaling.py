"""Released constants for scaling: their values and their charges."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from helpers.learners import SIMULATED, learner_of  # noqa: F401
from perdure.data import from_arrays, joint, split
from perdure.errors import ConfigError, GuardError, PrivacyError, RunError
from perdure.privacy import ReleasedScaling
from perdure.utils.folder_lock import locked

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.normal(loc=[10, 20], scale=[1, 3], size=(2000, 2)).clip(0, 60)
LABELS = np.arange(2000) % 4


def scaled(scaling, rows=ROWS, **settings):
    test = (rows[:100], LABELS[:100])
    values = {"value_range": (0, 60), "test": test, "standardise": scaling, **settings}
    return from_arrays(rows, LABELS[: len(rows)], **values)


def test_released_constants_standardise_the_training_records():
    data = scaled(ReleasedScaling(noise_multiplier=0.01, seed=0))
    # 0.01 of the half range is the least deviation; what is left is noise of 0.01 sqrt(4) / 2000
    assert data.train.inputs.mean(0).tolist() == pytest.approx([0, 0], abs=0.05)
    assert data.train.inputs.std(0).tolist() == pytest.approx([1, 1], abs=0.05)
    assert torch.equal(data.test.inputs, data.train.inputs[:100])
    assert "mean and deviation of the inputs are a private release" in data.public_facts


def test_each_image_channel_has_its_own_released_constants():
    images = np.stack([np.full((50, 4, 4), value) for value in (0.2, 0.6)], axis=1)
    images[::2] += 0.1
    scaling = ReleasedScaling(noise_multiplier=0.001, seed=0)
    values = {"value_range": (0, 1), "standardise": scaling, "ids": range(50)}
    data = from_arrays(images, LABELS[:50] % 2, test=0.2, **values)
    assert data.train.inputs.mean((0, 2, 3)).abs().max() < 0.3
    assert data.train.inputs.std((0, 2, 3)).tolist() == pytest.approx([1, 1], abs=0.3)


@pytest.mark.statistical
def test_noise_of_released_constants_has_the_stated_scale():
    """20 columns and 40 seeds give 800 draws, whose deviation is off by 10 % in 1 run of 10^4."""
    rows = np.full((100, 20), 30.0)
    means = []
    for seed in range(40):
        low = torch.tensor(0.0)
        scaling = ReleasedScaling(noise_multiplier=2.0, seed=seed)
        mean, _, _ = scaling.constants(
            torch.from_numpy(rows).float(), low, low + 60, partition="rows", size=100
        )
        means.append(mean)
    expected = 30 * 2.0 * math.sqrt(40) / 100  # half a range, noise, sensitivity, records
    inside = torch.cat(means) - 30
    inside = inside[inside.abs() < 30]  # a mean is clamped to the range
    assert 0.8 * expected < float(inside.std()) < 1.2 * expected


def test_a_record_changes_released_constants_within_its_bound():
    far = np.array([[60.0, 60.0], [0.0, 0.0], [30.0, 60.0]])
    half = torch.tensor(0.0)
    scaling = ReleasedScaling(noise_multiplier=0.001, seed=0)
    for row in far:
        one = torch.from_numpy(row[None]).float().repeat(3, 1)
        mean, _, _ = scaling.constants(one, half, half + 60, partition="rows", size=3)
        beyond, _, _ = scaling.constants(one * 1e6, half, half + 60, partition="rows", size=3)
        assert bool((mean <= 60.1).all())
        assert bool((beyond <= 60.1).all())


def test_the_learner_charges_the_scaling_release_before_training(learner_of):  # noqa: F811
    data = scaled(ReleasedScaling(noise_multiplier=20.0, seed=0), ids=range(2000), test=0.2)
    stream = split(data, scenario="class", experiences=2)
    assert stream[1].train.spent == data.train.spent
    learner = learner_of(stream=stream, privacy=SIMULATED)
    learner.prepare(stream)
    entries = learner.private_sum.ledger.entries
    assert [dict(entry.scope) for entry in entries] == [{"experience-0": 1}, {"experience-1": 1}]
    assert {entry.noise_multiplier for entry in entries} == {20.0}
    learner.close()
    plain = replace(
        stream,
        experiences=tuple(replace(e, train=replace(e.train, spent=())) for e in stream),
    )
    without = learner_of(stream=plain, privacy=SIMULATED)
    without.prepare(plain)
    assert not without.private_sum.ledger.entries
    without.close()


def test_a_repeated_scaling_release_has_no_further_cost(tmp_path):
    scaling = ReleasedScaling(noise_multiplier=20.0, folder=tmp_path / "scaling")
    one, two = (scaled(scaling) for _ in range(2))
    assert torch.equal(one.train.inputs, two.train.inputs)
    assert one.train.spent == two.train.spent
    assert len(one.train.spent) == 1
    other = scaled(scaling, ROWS + 0.5)
    assert len(other.train.spent) == 2


def test_a_scaling_folder_serves_one_release_at_a_time(tmp_path):
    """Two at once would each write a ledger without the other's entry."""
    scaling = ReleasedScaling(noise_multiplier=20.0, folder=tmp_path / "scaling")
    with locked(tmp_path / "scaling"), pytest.raises(RunError, match="is in use"):
        scaled(scaling)
    assert len(scaled(scaling).train.spent) == 1


def test_a_simulated_scaling_release_is_refused_in_a_secret_run(learner_of, tmp_path):  # noqa: F811
    data = scaled(ReleasedScaling(noise_multiplier=20.0, seed=0), ids=range(2000), test=0.2)
    stream = split(data, scenario="class", experiences=2)
    privacy = replace(SIMULATED, seed=None)
    learner = learner_of(stream=stream, privacy=privacy, folder=tmp_path)
    with pytest.raises(PrivacyError, match="carry a release with simulated noise"):
        learner.prepare(stream)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("noise_multiplier = 0", lambda: ReleasedScaling(noise_multiplier=0, seed=0)),
        ("folder = None", lambda: ReleasedScaling(noise_multiplier=1.0)),
        ("'released' has no noise", lambda: scaled("released")),
        (
            "ReleasedScaling together with value_range",
            lambda: scaled(ReleasedScaling(noise_multiplier=1.0, seed=0), value_range=None),
        ),
        (
            "removing one row would move others",
            lambda: scaled(ReleasedScaling(noise_multiplier=1.0, seed=0), test=0.2),
        ),
    ],
)
def test_a_scaling_release_without_noise_or_range_is_refused(message, make):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize("cut", [joint, partial(split, scenario="class", experiences=2)])
def test_privacy_refuses_a_test_share_drawn_by_row_numbers(learner_of, cut):  # noqa: F811
    whole, fewer = (from_arrays(ROWS[n:], LABELS[n:], test=0.2) for n in (0, 1))
    one, other = (set(map(tuple, data.train.inputs.tolist())) for data in (whole, fewer))
    assert len(one ^ other) > 100  # one row less, and so many training records come or go
    stream = cut(whole)
    learner = learner_of(stream=stream, privacy=SIMULATED)
    with pytest.raises(GuardError, match="a hash of row numbers chose the training records"):
        learner.prepare(stream)


def test_privacy_accepts_a_test_share_drawn_by_ids_or_given():
    drawn = from_arrays(ROWS, LABELS, test=0.2, ids=range(2000))
    given = from_arrays(ROWS, LABELS, test=(ROWS, LABELS))
    assert not drawn.train.drawn_by_position
    assert not given.train.drawn_by_position
