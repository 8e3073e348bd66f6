from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise
from math import comb, sqrt

import pytest
import torch

from perdure.errors import ConfigError, PrivacyError
from perdure.learner.learner import Learner
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.noise.banded import PARTS, BandedNoise, coefficients
from perdure.privacy.settings import Privacy
from perdure.strategies.naive import Naive
from perdure.strategies.replay import Replay

STEPS = 9


def strategy_matrix(steps, bands):
    """Return C: lower-triangular Toeplitz with the coefficients of the square root of the matrix of
    ones.
    """
    matrix = torch.zeros(steps, steps, dtype=torch.float64)
    values = coefficients(bands)
    for i in range(steps):
        for k in range(min(bands, i + 1)):
            matrix[i, i - k] = values[k] / PARTS
    return matrix


@pytest.mark.reference
def test_banded_coefficients_equal_those_of_the_square_root():
    exact = [comb(2 * k, k) / 4**k for k in range(6)]
    assert [c / PARTS for c in coefficients(6)] == pytest.approx(exact, abs=0.5 / PARTS)
    root = strategy_matrix(STEPS, STEPS)
    ones = torch.ones(STEPS, STEPS, dtype=torch.float64).tril()
    torch.testing.assert_close(root @ root, ones, rtol=0, atol=STEPS / PARTS)


@pytest.mark.parametrize("bands", [1, 2, 4, 9, 12])
def test_banded_noise_equals_the_inverse_matrix_times_noise(bands):
    """Sums x and noise z, both integers, give x + C^-1 z."""
    chain = BandedNoise(bands)
    rng = torch.Generator().manual_seed(0)
    sums = torch.randint(-(2**30), 2**30, (STEPS, 3), generator=rng)
    fresh = torch.randint(-(2**40), 2**40, (STEPS, 3), generator=rng)
    inverse = torch.linalg.inv(strategy_matrix(STEPS, bands))
    expected = sums + inverse @ fresh.double() / PARTS
    for step in range(STEPS):
        # asked for twice before it counts, as after an exception
        chain.released(chain.weighted(sums[step], step), step)
        weighted = chain.weighted(sums[step], step)
        value = chain.released(weighted + fresh[step], step)
        chain.commit(sums[step], value, step)
        torch.testing.assert_close(value, expected[step])
        assert chain.deviation(step) == pytest.approx(float(chain.gain * inverse[step].norm()))


def test_banded_sums_are_exact_beyond_the_digits_of_float64():
    chain = BandedNoise(3)
    first = torch.tensor([2**43 + 1])
    chain.commit(first, first.double(), 0)
    second = chain.weighted(torch.tensor([1]), 1)
    assert int(second) == PARTS + coefficients(3)[1] * (2**43 + 1)
    with pytest.raises(PrivacyError, match="too large for correlated noise"):
        chain.weighted(torch.tensor([2**45]), 1)
    with pytest.raises(PrivacyError, match="step 0 was already released"):
        chain.weighted(first, 0)


@pytest.mark.parametrize("bands", [1, 2, 3, 4])
def test_k_banded_steps_of_a_record_cost_k_gaussian_steps(bands):
    """All sets of steps at least `bands` apart: the norm of a record's part of C x, over the
    gain.
    """
    matrix = strategy_matrix(STEPS, bands)
    gain = BandedNoise(bands).gain
    for k in (1, 2, 3):
        for places in combinations(range(STEPS), k):
            if all(later - earlier >= bands for earlier, later in pairwise(places)):
                # the same direction every time, which is the worst
                added = matrix[:, list(places)].sum(1)
                assert float(added.norm()) <= sqrt(k) * gain + 1e-12
    closer = matrix[:, [0, 1]].sum(1)
    # nearer steps would cost more than is charged
    assert bands == 1 or float(closer.norm()) > sqrt(2) * gain


def test_more_bands_give_less_noise_in_the_sum_of_steps():
    steps = 64
    ones = torch.ones(64, 64, dtype=torch.float64).tril()

    def error(bands):
        return (
            float((ones @ torch.linalg.inv(strategy_matrix(steps, bands))).square().sum(1).mean())
            * BandedNoise(bands).gain ** 2
        )

    assert error(1) > 2 * error(4) > 2 * error(16)


# --------------------------------------------------------------------------- in the loop


@pytest.fixture
def learner_of(toy_stream, toy_model):
    def make(stream=None, **changes):
        stream = stream or toy_stream()
        options = {"strategy": Naive(), "epochs": 2, "batch_size": 4, "blocks": 2}
        privacy = Privacy(noise_multiplier=2.0, bands=3, seed=0)
        made = Learner(
            model=toy_model(stream),
            optimizer=partial(torch.optim.SGD, lr=0.1),
            **{"privacy": privacy} | options | changes,
        )
        made.prepare(stream)
        return made

    return make


def batches(learner, index=0):
    """Return the record ids of every step of an experience."""
    learner.begin(index)
    seen = []
    for block in learner.training.remaining_blocks(index, 0):
        learner.session.held.reserve(block, "start")
        seen += [set(learner.session.held.sample(step).ids.tolist()) for step in block]
    return seen


def test_with_bands_a_record_has_one_fixed_step_per_epoch(learner_of, toy_stream):
    seen = batches(learner_of())
    assert len(seen) == 12 and seen[:6] == seen[6:]
    assert sorted(i for ids in seen[:6] for i in ids) == sorted(toy_stream()[0].train.ids.tolist())
    stream = toy_stream()
    fewer = replace(
        stream[0], train=replace(stream[0].train.take(torch.arange(1, 24)), declared_size=24)
    )
    dropped = set(stream[0].train.ids[:1].tolist())
    neighbours = batches(learner_of(replace(stream, experiences=(fewer, stream[1]))))
    assert [ids - dropped for ids in seen] == neighbours


def test_with_bands_only_the_steps_of_a_record_are_charged(learner_of):
    learner = learner_of()
    learner.fit(learner.stream)
    entries = learner.private_sum.ledger.entries
    assert {e.mechanism for e in entries} == {"banded-gaussian"} and {
        e.sampling for e in entries
    } == {"none"}
    assert [(e.steps, e.participations) for e in entries] == [(6, 1)] * 4
    spent = learner.private_sum.ledger.epsilon(["experience-0"], delta=1e-5)
    assert spent == epsilon([Charge(1.0, 2.0, 2, "grid-gaussian")], delta=1e-5)


def test_with_bands_the_noise_meets_the_target_epsilon(learner_of):
    learner = learner_of(
        privacy=Privacy(epsilon=2.0, bands=3, seed=0), strategy=Replay(memory_size=8)
    )
    learner.fit(learner.stream)
    assert 1.95 < learner.private_sum.ledger.worst(1e-5)[1] <= 2.0


def test_more_bands_than_steps_per_epoch_are_refused(learner_of):
    with pytest.raises(
        ConfigError,
        match=r"privacy.bands = 7 is not allowed; allowed: up to 6, the number of steps in",
    ):
        learner_of(privacy=Privacy(noise_multiplier=1.0, bands=7, seed=0)).begin(0)
    for other in (
        {"sampling_rate": 0.1},
        {"epsilon": (1.0, 2.0), "noise_multiplier": None, "sampling_rate": 0.1},
    ):
        with pytest.raises(ConfigError, match=r"privacy.bands"):
            Privacy(**{"noise_multiplier": 1.0, "bands": 2} | other)


def test_a_repeated_block_of_banded_steps_gives_equal_noise(learner_of):
    learner = learner_of()
    learner.begin(0)
    none = lambda clip: None  # noqa: E731

    def draws():
        learner.session.held.reserve(range(6), "start")
        return [
            learner.private_sum.gradient(none, learner.params, step=step)["head.weight"]
            for step in range(6)
        ]

    first = draws()
    again = draws()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    learner.session.held.reserve(range(6), "start")
    learner.private_sum.gradient(none, learner.params, step=0)
    with pytest.raises(
        PrivacyError, match=r"step 2 is not the next step; .* the next one is step 1"
    ):
        learner.private_sum.gradient(none, learner.params, step=2)


@pytest.mark.statistical
def test_banded_noise_of_neighbouring_steps_is_anticorrelated(toy_stream, toy_model, learner_of):
    """The lag-1 correlation of C^-1 z is -c_1 + .

    Over many coordinates; 5 standard errors never miss zero here.
    """
    learner = learner_of(iterations=200, epochs=None, blocks=1)
    learner.begin(0)
    learner.session.held.reserve(range(200), "start")
    none = lambda clip: None  # noqa: E731
    name = next(iter(learner.params))
    drawn = [
        learner.private_sum.gradient(none, learner.params, step=step)[name].flatten()
        for step in range(200)
    ]
    noise = torch.stack(drawn[20:])
    correlation = float((noise[1:] * noise[:-1]).mean() / noise.square().mean())
    inverse = torch.linalg.inv(strategy_matrix(200, 3))[-1]
    expected = float((inverse[1:] * inverse[:-1]).sum() / inverse.square().sum())
    assert correlation == pytest.approx(expected, abs=5 / sqrt(noise.numel())) and expected < -0.3
