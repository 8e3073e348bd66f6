from functools import partial

import pytest
import torch
from torch import nn
from torchvision.transforms import v2

from perdure.adversarial import PGD
from perdure.contract.forward import Forward
from perdure.data.augmentation import Views, shift_and_flip
from perdure.data.experience import Experience, Stream
from perdure.data.records import Batch, Records
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.models.classifiers import cnn, mlp
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.settings import Privacy
from perdure.queries.batch_gradients import clipped_gradient
from perdure.strategies.lwf import LwF
from perdure.strategies.naive import Naive
from perdure.strategies.replay import Replay


def jitter(record):
    return record + 0.05 * torch.randn(record.shape)


def batch_of(n=6, shape=(1, 6, 6)):
    place = torch.Generator().manual_seed(0)
    return Batch.current(
        Records(inputs=torch.rand(n, *shape, generator=place), labels=torch.arange(n) % 2), 0
    )


@pytest.fixture
def learner_of(toy_stream, toy_model):
    def make(**changes):
        options = {
            "strategy": Naive(),
            "iterations": 6,
            "batch_size": 8,
            "views": Views(count=3, change=jitter),
        }
        stream = toy_stream()
        made = Learner(
            model=toy_model(stream), optimizer=partial(torch.optim.SGD, lr=0.5), **options | changes
        )
        made.prepare(stream)
        return made

    return make


def test_shift_and_flip_fills_the_shifted_border_with_zeros():
    batch = batch_of(n=200)
    views = Views(count=1, change=shift_and_flip(pixels=1)).attach(batch, seed=3).stored["view.0"]
    wide = nn.functional.pad(batch.inputs, (1, 1, 1, 1))
    moves = []
    for old, new in zip(wide, views, strict=True):
        found = [
            (r, c)
            for r in range(3)
            for c in range(3)
            if torch.equal(old[:, r : r + 6, c : c + 6], new)
        ]
        assert len(found) == 1
        moves += found
    assert set(moves) == {(r, c) for r in range(3) for c in range(3)}


def coin(record):
    return record if torch.rand(()) < 0.5 else record.flip(-1)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    "change", [coin, v2.GaussianBlur(99), v2.RandomCrop(4), v2.RandomResize(3, 9)]
)
def test_a_view_function_that_fails_gives_one_error_line(change, private):
    records = Records(inputs=torch.rand(12, 3, 6, 6), labels=torch.arange(12) % 2)
    one = Experience(index=0, train=records, test=records, classes=(0, 1))
    stream = Stream(
        experiences=(one,), num_classes=2, scenario="domain", name="pictures", input_shape=(3, 6, 6)
    )
    learner = Learner(
        model=mlp(input_shape=(3, 6, 6), num_classes=2, hidden=(2,), seed=0),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=1,
        views=Views(count=2, change=change),
        privacy=Privacy(noise_multiplier=1.0, seed=0) if private else None,
    )
    with pytest.raises(ConfigError, match=r"views\.change") as caught:
        learner.fit(stream)
    assert "\n" not in str(caught.value)


def test_views_refuse_a_change_that_is_not_a_function():
    with pytest.raises(ConfigError, match=r"views\.change = 'flip' .*a function"):
        Views(count=1, change="flip")


def test_shift_and_flip_mirrors_half_of_the_images():
    batch = batch_of(n=400)
    views = (
        Views(count=1, change=shift_and_flip(pixels=0, flip=True))
        .attach(batch, seed=0)
        .stored["view.0"]
    )
    mirrored = (views == batch.inputs.flip(-1)).flatten(1).all(1)
    same = (views == batch.inputs).flatten(1).all(1)
    assert bool((mirrored ^ same).all()) and 150 < int(mirrored.sum()) < 250


def test_views_differ_between_records_and_depend_on_the_seed():
    batch = batch_of()
    views = Views(count=2, change=jitter)
    first = views.attach(batch, 1)
    again = views.attach(batch, 1)
    other = views.attach(batch, 2)
    noise = [first.stored[f"view.{k}"] - batch.inputs for k in (0, 1)]
    assert not torch.allclose(*noise) and not torch.allclose(noise[0][0], noise[0][1])
    assert torch.equal(first.stored["view.1"], again.stored["view.1"])
    assert not torch.equal(first.stored["view.1"], other.stored["view.1"])


def test_the_change_function_of_views_gets_one_record_at_a_time():
    seen = []

    def peek(record):
        seen.append(record.shape)
        return record - record.mean(0, keepdim=True)

    Views(count=1, change=peek).attach(batch_of(), 0)
    assert seen == [torch.Size([1, 6, 6])]


def test_the_loss_of_a_record_is_the_mean_over_its_views():
    batch = batch_of()
    views = Views(count=3, change=jitter)
    attached = views.attach(batch, 0)
    loss = lambda rows: rows.inputs.flatten(1).square().sum(1)  # noqa: E731
    expected = torch.stack(
        [attached.stored[f"view.{k}"].flatten(1).square().sum(1) for k in range(3)]
    ).mean(0)
    torch.testing.assert_close(views.losses(loss, attached), expected)
    torch.testing.assert_close(views.losses(loss, batch), loss(batch))


@pytest.mark.parametrize("strategy", [Naive(), LwF(strength=0.5), Replay(memory_size=8)])
@pytest.mark.parametrize("private", [False, True])
def test_training_with_views_learns_and_is_reproducible(learner_of, toy_stream, strategy, private):
    privacy = Privacy(noise_multiplier=0.5, seed=0) if private else None
    ends = []
    for _ in range(2):
        learner = learner_of(strategy=strategy, privacy=privacy, iterations=30)
        matrix = learner.fit(toy_stream())
        ends.append(learner.model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert matrix[0, 0] > 80


def test_views_change_neither_sensitivity_nor_privacy_charges(learner_of):
    learner, plain = (
        learner_of(privacy=Privacy(noise_multiplier=1.0, seed=0), views=v)
        for v in (Views(count=3, change=jitter), None)
    )
    for one in (learner, plain):
        one.begin(0)
        one.train(one.training.block(0, 0, 1))
    charges = [one.private_sum.ledger.charges("experience-0") for one in (learner, plain)]
    assert charges[0] == charges[1]
    batch = learner.views.attach(learner.session.held.rows, 5)
    clip = Clip(norm=0.01)
    forward = learner.session.forward
    whole = clipped_gradient(forward, learner.session.losses, learner.params, batch, clip, None)
    for i in range(0, len(batch), 5):
        others = batch.take(torch.arange(len(batch)) != i)
        fewer = clipped_gradient(
            forward, learner.session.losses, learner.params, others, clip, None
        )
        moved = torch.stack([(whole[n] - fewer[n]).square().sum() for n in whole]).sum().sqrt()
        assert 0.009 < float(moved) <= 0.01 * (1 + 1e-4)


def test_the_learner_refuses_views_together_with_an_adversary(learner_of):
    with pytest.raises(ConfigError, match="None with an adversary"):
        learner_of(adversary=PGD(epsilon=0.1, steps=1))
    with pytest.raises(ConfigError, match=r"views.count = 0"):
        Views(count=0, change=jitter)


# --------------------------------------------------------------------------- passes in bfloat16


def test_bfloat16_training_keeps_parameters_in_float32(toy_stream, learner_of):
    learner = learner_of(
        views=None,
        precision="bfloat16",
        privacy=Privacy(noise_multiplier=0.3, seed=0),
        iterations=60,
    )
    matrix = learner.fit(toy_stream())
    assert matrix[0, 0] > 80 and {p.dtype for p in learner.params.values()} == {torch.float32}
    with pytest.raises(
        ConfigError, match=r"precision = 'half' is not allowed; allowed: float32, bfloat16"
    ):
        learner_of(precision="half")


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_bfloat16_record_changes_the_sum_by_at_most_clip_norm(kind, learner_of, toy_stream):
    learner = learner_of(
        views=None, precision="bfloat16", privacy=Privacy(noise_multiplier=1.0, seed=0)
    )
    learner.begin(0)
    batch = learner.session.held.rows
    params = learner.params
    forward = learner.session.forward
    if kind == "cnn":
        model = cnn(input_shape=(1, 8, 8), num_classes=4, width=4, seed=0)
        place = torch.Generator().manual_seed(1)
        inputs = torch.rand(len(batch), 1, 8, 8, generator=place)
        batch = Batch.from_tensors(batch.tensors() | {"inputs": inputs})
        forward = Forward(model)
        params = dict(model.named_parameters())
    clip = Clip(norm=0.01)
    sums = [
        clipped_gradient(forward, learner.session.losses, params, rows, clip, None)
        for rows in (batch, batch.take(slice(1, None)), batch.take(slice(0, 1)))
    ]
    assert {value.dtype for value in sums[0].values()} == {torch.float32}
    length = lambda total: float(  # noqa: E731
        torch.stack([v.double().square().sum() for v in total.values()]).sum().sqrt()
    )
    assert length(sums[2]) <= 0.01 * (1 + 1e-4)
    assert length({n: sums[0][n] - sums[1][n] for n in params}) <= 0.01 * (1 + 1e-4)
