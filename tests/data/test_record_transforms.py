"""Transforms of torchvision as views: one record at a time, with random numbers of its own."""

from functools import partial

import pytest
import torch
from torchvision.transforms import v2

from perdure.data import Batch, Experience, Records, Stream, Views
from perdure.learner import Learner
from perdure.learner.fingerprint import flat
from perdure.models import mlp
from perdure.privacy import Privacy
from perdure.strategies import Naive

AFFINE = v2.RandomAffine(degrees=20, translate=(0.1, 0.1))
SECRET = bytes(range(32))


def batch_of(inputs):
    return Batch.current(Records(inputs=inputs, labels=torch.zeros(len(inputs)).long()), 0)


def views_of(change, inputs, seed=0, count=2):
    stored = Views(count=count, change=change).attach(batch_of(inputs), seed).stored
    return [stored[f"view.{k}"] for k in range(count)]


@pytest.fixture(scope="module")
def images():
    return torch.rand(6, 1, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("seed", [3, SECRET])
def test_a_transform_draws_for_each_record_and_view(images, seed):
    same = images[:1].expand(4, 1, 6, 6)
    before = torch.get_rng_state()
    first, second = views_of(v2.GaussianNoise(clip=False), same, seed)
    assert torch.equal(torch.get_rng_state(), before)
    noises = torch.cat([first, second]).flatten(1)
    assert len(torch.unique(noises, dim=0)) == 8
    again = views_of(v2.GaussianNoise(clip=False), same, seed)
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    other = views_of(v2.GaussianNoise(clip=False), same, 4)
    assert not torch.equal(first, other[0])


def test_a_view_ignores_the_draws_of_other_records(images):
    def greedy(record):
        for _ in range(int(100 * record.max())):  # a bright record draws more
            torch.rand(3)
        return record + torch.rand(())

    brighter = images.clone()
    brighter[0] *= 3
    one, other = (views_of(v2.Lambda(greedy), inputs)[0] for inputs in (images, brighter))
    assert torch.equal(one[1:], other[1:]) and not torch.equal(one[0], other[0])


def test_a_transform_cannot_write_into_the_records(images):
    before = images.clone()
    (view,) = views_of(v2.RandomErasing(p=1.0, inplace=True), images, count=1)
    assert torch.equal(images, before) and not torch.equal(view, before)


def test_views_by_a_transform_keep_the_place_of_each_record(images):
    (view,) = views_of(v2.RandomHorizontalFlip(p=1.0), images, count=1)
    assert torch.equal(view, images.flip(-1))


@pytest.fixture(scope="module")
def learner_of(images):
    rows = images.repeat(2, 1, 1, 1)
    train, test = (
        Records(inputs=rows / part, labels=torch.arange(12) % 2, ids=torch.arange(12) + 100 * part)
        for part in (1, 100)
    )
    stream = Stream(
        name="images",
        scenario="domain",
        experiences=(Experience(index=0, train=train, test=test, classes=(0, 1)),),
        num_classes=2,
        input_shape=(1, 6, 6),
        assigned_by_record=True,
    )

    def make(change, private, *, steps=2):
        learner = Learner(
            model=mlp(input_shape=(1, 6, 6), num_classes=2, hidden=(2,), seed=0),
            strategy=Naive(),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            iterations=2,
            views=Views(count=2, change=change),
            privacy=Privacy(noise_multiplier=1.0, seed=0) if private else None,
        )
        if steps:
            learner.fit(stream)
        else:
            learner.prepare(stream)
            learner.begin(0)
        return learner

    return make


@pytest.mark.parametrize("private", [False, True])
def test_training_with_a_transform_is_reproducible(learner_of, private):
    ends = [learner_of(v2.Compose([AFFINE]), private).model.state_dict() for _ in range(2)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_the_guard_tests_a_transform_as_code_of_the_user(learner_of):
    ledger = learner_of(AFFINE, True).private_sum.ledger
    assert {entry.independence for entry in ledger.entries} == {"tested"}


def test_the_settings_of_a_transform_are_in_the_fingerprint(learner_of):
    wide = v2.RandomAffine(degrees=30, translate=(0.1, 0.1))
    one, same, other = (
        flat("views", Views(count=2, change=v2.Compose([change])))
        for change in (AFFINE, v2.RandomAffine(degrees=20, translate=(0.1, 0.1)), wide)
    )
    assert one == same and one != other


def test_the_noise_digest_has_settings_that_no_probe_shows(learner_of):
    digests = set()
    for p in (0.0, 1e-9):
        digests.add(learner_of(v2.RandomErasing(p=p), True, steps=0).noise_digest())
    assert len(digests) == 2
