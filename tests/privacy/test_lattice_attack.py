"""Noise that lies on a lattice tells which of two sums it was added to (Mironov 2012).

The attacker knows both sums, with and without one record, and looks at what was released less the
one and less the other: the angle of two coordinates of a Box-Muller pair, or the uniform number
behind their radius, lies on the lattice of the generator's words for the true sum only.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers.parties import opened_party, private_sum_of
from perdure.contract.forward import Forward, task_losses
from perdure.data.records import Batch
from perdure.learner.learner import Learner
from perdure.models import mlp
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.settings import Privacy
from perdure.queries.batch_gradients import clipped_gradient
from perdure.strategies.naive import Naive

TRIALS = 200
NUMBERS = 400
NOISE = 4.0


def pairs(z):
    """Return the coordinates of one pair of words: i and i + half."""
    half = (len(z) + 1) // 2
    y = z[half:].double()
    return z[: len(y)].double(), y


def angles(z):
    """Return the mean distance of pair angles to float32 numbers, as which they were drawn."""
    x, y = pairs(z)
    turn = torch.atan2(y, x) % (2 * math.pi)
    return float((turn - turn.float().double()).abs().mean())


def radii(z):
    """Return the mean distance of the uniforms behind large radii to multiples of 2^-53."""
    x, y = pairs(z)
    square = x.square() + y.square()
    far = square.topk(min(20, len(square))).values
    units = torch.exp(-far / 2) * 2.0**53
    return float((units - units.round()).abs().mean())


STATISTICS = {"32-bit angles": angles, "53-bit radii": radii}


def guessed(statistic, output, without, with_record, sigma):
    """True if the statistic says that the record was present."""
    return statistic((output - with_record) / sigma) < statistic((output - without) / sigma)


def judge(right):
    """Assert 72 to 128 right guesses of 200, which a blind guesser misses once in 10^4 runs."""
    assert len(right) == TRIALS
    assert 0.36 <= sum(right) / TRIALS <= 0.64, f"{sum(right)} of {TRIALS} right"


@pytest.mark.statistical
@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_the_noise_of_a_release_does_not_reveal_membership(toy_stream, toy_model, statistic):
    stream = toy_stream()
    privacy = Privacy(noise_multiplier=NOISE, release_noise=1.0, seed=0)
    made = private_sum_of(stream, privacy)
    _, curator = opened_party(stream, toy_model(stream), private_sum=made)
    direction = torch.linspace(-1, 1, NUMBERS) / torch.linspace(-1, 1, NUMBERS).norm()
    ids = stream[0].train.ids
    target = int(ids[0])
    coins = torch.randint(0, 2, (TRIALS,), generator=torch.Generator().manual_seed(0)).tolist()
    right = []
    for trial, there in enumerate(coins):

        def query(forward, batch, there=there):
            counted = (batch.ids != target) | bool(there)
            return counted[:, None] * direction

        output = curator.release(query, clip_norm=1.0, purpose=f"trial {trial}")["value"]
        without = direction * (len(ids) - 1)
        right.append(guessed(statistic, output, without, without + direction, NOISE) == bool(there))
    judge(right)


@pytest.fixture(scope="module")
def steps(toy_data):
    """Return gradients and momenta of 200 steps that do not change the model, half without one
    record, and both clipped sums.
    """
    from perdure.data.scenarios import split

    stream = split(toy_data, scenario="class", experiences=2)
    model = partial(mlp, input_shape=stream.input_shape, num_classes=stream.num_classes, seed=0)
    made = model(hidden=(20,))
    seen = []
    for there in (True, False):
        train = stream[0].train
        rows = train if there else train.take(torch.arange(1, len(train)))
        first = replace(stream[0], train=replace(rows, declared_size=len(train)))
        looked = []

        def look(point, learner, looked=looked):
            if point == "step.done":
                optimizer = learner.current_optimizer
                momenta = [
                    optimizer.state[p]["momentum_buffer"].flatten() for p in learner.params.values()
                ]
                grads = [p.grad.flatten() for p in learner.params.values()]
                looked.append((torch.cat(grads), torch.cat(momenta).clone()))

        learner = Learner(
            model=model(hidden=(20,)),
            strategy=Naive(),
            optimizer=partial(torch.optim.SGD, lr=1e-30, momentum=1e-12),
            iterations=TRIALS // 2,
            batch_size=len(train),
            privacy=Privacy(noise_multiplier=NOISE, seed=int(there), sampling_rate=1.0),
            callbacks=[look],
        )
        learner.prepare(replace(stream, experiences=(first, stream[1])))
        learner.begin(0)
        learner.train(learner.training.block(0, 0, 1))
        seen += [(there, *pair) for pair in looked]
        context = learner.session.held.context
    sums = []
    for rows in (train.take(torch.arange(1, len(train))), train):
        batch = Batch.current(rows, 0)
        params = dict(made.named_parameters())
        losses = lambda forward, part: task_losses(forward, part, context)  # noqa: E731
        total = clipped_gradient(Forward(made), losses, params, batch, Clip(norm=1.0), None)
        sums.append(torch.cat([total[name].flatten() for name in params]).double())
    return seen, sums, len(train)


@pytest.mark.statistical
@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
@pytest.mark.parametrize("place", ["gradient", "momentum"])
def test_the_noise_of_a_step_does_not_reveal_membership(steps, statistic, place):
    seen, (without, with_record), expected = steps
    right = []
    for there, gradient, momentum in seen:
        output = (gradient if place == "gradient" else momentum).double() * expected
        right.append(guessed(statistic, output, without, with_record, NOISE) == there)
    judge(right)
