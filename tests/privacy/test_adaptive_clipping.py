import math
from functools import partial

import pytest
import torch

from perdure.errors import ConfigError, PrivacyError
from perdure.learner.learner import Learner
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.clipping.clip import WITHIN, Clip, sum_of_clipped
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import PrivateSum, Schedule
from perdure.privacy.settings import Privacy
from perdure.strategies.ewc import EWC
from perdure.strategies.naive import Naive

SHAPE = {"w": torch.zeros(20_000)}


def private_sum(noise_multiplier=1.0, steps=400, expected=256.0, **changes):
    privacy = Privacy(noise_multiplier=noise_multiplier, clipping=Adaptive(**changes), seed=0)
    key = NoiseKey.from_seed(0)
    ledger = Ledger.open(None, key=key)
    ledger.declare("p", 1000)
    made = PrivateSum(
        privacy=privacy, schedule=Schedule(noise=(noise_multiplier,)), ledger=ledger, key=key
    )
    made.reserve(
        scope={"p": 0.256},
        steps=range(steps),
        start="",
        data="",
        expected=expected,
        numbers=20_000,
    )
    return made


@pytest.mark.reference
@pytest.mark.parametrize("noise_multiplier", [0.7, 1.0, 3.0])
def test_adaptive_gradient_and_count_together_cost_the_charge(noise_multiplier):
    adaptive = Adaptive()
    expected = 64.0
    of_gradient = adaptive.gradient_noise(noise_multiplier, expected)
    both = [Charge(1.0, of_gradient, 1), Charge(1.0, 2 * adaptive.count_noise * expected, 1)]
    assert of_gradient > noise_multiplier
    charged = epsilon([Charge(1.0, noise_multiplier, 1)], delta=1e-5)
    assert epsilon(both, delta=1e-5) == pytest.approx(charged, abs=2e-3)


def test_adaptive_clipping_refuses_too_little_count_noise():
    with pytest.raises(
        PrivacyError, match=r"count_noise = 0.05 .* 10 records per step .* allowed: more than 0.05"
    ):
        Adaptive().gradient_noise(1.0, 10.0)
    for wrong in (
        {"quantile": 0.0},
        {"quantile": 1.5},
        {"learning_rate": 0.0},
        {"count_noise": math.inf},
    ):
        with pytest.raises(ConfigError, match=f"adaptive.{next(iter(wrong))}"):
            Adaptive(**wrong)


@pytest.mark.statistical
@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.8])
def test_the_adaptive_clip_norm_converges_to_the_quantile(quantile):
    """The 256 records of every step have norms 1 to 256; the count's noise moves the share by 0.05
    on average.
    """
    made = private_sum(noise_multiplier=0.5, quantile=quantile)
    norms = torch.arange(1.0, 257.0)

    def clipped(clip):
        return {"w": torch.zeros(1), **clip.count({"w": norms**2})}

    seen = []
    for step in range(400):
        made.gradient(clipped, {"w": torch.zeros(1)}, step=step)
        seen.append(made.clip_norm)
    assert sum(seen[200:]) / 200 == pytest.approx(256 * quantile, rel=0.1)


@pytest.mark.statistical
def test_adaptive_noise_follows_the_changing_clip_norm():
    """The standard deviation of 20,000 draws is off by 0.5 % on average and never by 3 %."""
    made = private_sum(count_noise=0.05, expected=20.0)
    of_gradient = Adaptive().gradient_noise(1.0, 20.0)
    assert of_gradient > 1.15
    for step in range(3):
        before = made.clip_norm
        released = made.gradient(lambda clip: None, SHAPE, step=step)
        assert released.keys() == {"w"} and made.clip_norm != before
        assert float(released["w"].std()) == pytest.approx(of_gradient * before, rel=0.03)
    assert made.ledger.entries[-1].noise_multiplier == 1.0


def test_one_record_changes_count_by_half_and_sum_by_clip_norm():
    rows = {"a": torch.tensor([[3.0], [0.1], [0.2]]), "b": torch.tensor([[4.0], [0.1], [0.1]])}
    clip = Clip(norm=1.0, counted=True)
    whole = sum_of_clipped(rows, clip)
    for i in range(3):
        kept = torch.arange(3) != i
        fewer = sum_of_clipped({name: value[kept] for name, value in rows.items()}, clip)
        assert abs(float(whole[WITHIN] - fewer[WITHIN])) == 0.5
        assert float(torch.cat([whole[n] - fewer[n] for n in rows]).norm()) <= 1 + 1e-6


@pytest.mark.parametrize("strategy", [Naive(), EWC(strength=1.0)])
def test_a_resumed_adaptive_run_is_bit_identical(toy_stream, toy_model, strategy):
    privacy = Privacy(
        noise_multiplier=1.0, clipping=Adaptive(count_noise=0.2), clip_norm=0.1, seed=0
    )

    def fresh():
        made = Learner(
            model=toy_model(toy_stream()),
            strategy=strategy,
            optimizer=partial(torch.optim.SGD, lr=0.5),
            iterations=6,
            batch_size=8,
            blocks=2,
            privacy=privacy,
        )
        made.prepare(toy_stream())
        made.begin(0)
        return made

    whole = fresh()
    first = fresh()
    second = fresh()
    for part in (0, 1):
        whole.train(whole.training.block(0, part, 2))
    first.train(first.training.block(0, 0, 2))
    second.restore(first.snapshot())
    assert second.curator.clip_norm == first.curator.clip_norm != 0.1
    second.begin(0)
    second.train(second.training.block(0, 1, 2))
    for learner in (whole, second):
        learner.finish()
    assert second.curator.clip_norm == whole.curator.clip_norm
    theirs = whole.model.state_dict()
    assert all(
        torch.equal(value, theirs[name]) for name, value in second.model.state_dict().items()
    )
    releases = [
        entry for entry in whole.private_sum.ledger.entries if entry.purpose == "release:fisher"
    ]
    assert all(entry.clip_norm == pytest.approx(whole.curator.clip_norm**2) for entry in releases)
