"""Answers of the curator: gradients and releases, with noise, and charged before they are drawn."""

from dataclasses import replace

import pytest
import torch

from helpers.curator_bench import REPLAY, declared, simulated
from perdure.contract.forward import Forward, task_losses
from perdure.errors import PrivacyError

# --------------------------------------------------------------------------- gradients


def test_a_gradient_without_privacy_equals_the_mean_gradient(bench):
    test = bench()
    batch = test.open().held.sample(0)
    loss = task_losses(Forward(test.model), batch, test.curator.context).mean()
    expected = torch.autograd.grad(loss, list(test.params.values()))
    for mine, theirs in zip(test.gradient(batch).values(), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_padded_positions_do_not_change_the_gradient(bench):
    test = bench()
    batch = test.open().held.sample(0)
    padded = replace(batch, valid=torch.arange(len(batch)) < 3)
    for mine, theirs in zip(
        test.gradient(padded).values(), test.gradient(batch.take(slice(3))).values(), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def flat(params):
    return torch.cat([value.detach().flatten() for value in params.values()])


def test_the_private_gradient_is_divided_by_the_declared_size(bench, toy_stream):
    """The same batch with nearly no noise, declared as 24 and as 48 records: the second step is
    half as long.
    """
    tiny = simulated(noise_multiplier=1e-3, sampling_rate=0.5, clip_norm=0.5)
    steps = []
    for size in (24, 48):
        test = bench(tiny, declared(toy_stream(), size, size))
        held = test.open(0, steps=range(1)).held
        steps.append(flat(test.gradient(held.rows.take(slice(5)))))
        assert float(steps[-1].norm()) > 0.02
    noise = {"rtol": 1e-4, "atol": 3e-4}  # seven standard deviations of 1e-3 * 0.5 / 12
    torch.testing.assert_close(steps[1], steps[0] / 2, **noise)
    rows = bench()
    batch = rows.open().curator.raw("a test").take(slice(5))
    by_hand = torch.zeros_like(steps[0])
    for i in range(5):
        one = flat(rows.gradient(batch.take(slice(i, i + 1))))
        by_hand += one * min(1.0, 0.5 / float(one.norm()))
    torch.testing.assert_close(steps[0], by_hand / 12, **noise)  # 0.5 * 24


def big_model(stream):
    from perdure.models.classifiers import mlp

    return mlp(input_shape=stream.input_shape, num_classes=4, hidden=(1000,), seed=0)


def has_scale(noise, scale):
    """True if 10,000 normals have standard deviation `scale` within 4 % (5.7 standard errors:
    1e-8).
    """
    return abs(float(noise.std()) / scale - 1) < 0.04


@pytest.mark.statistical
def test_an_empty_batch_still_adds_noise_of_the_stated_scale(bench, toy_stream):
    stream = toy_stream()
    test = bench(simulated(noise_multiplier=1.5, clip_norm=0.2), stream, big_model(stream))
    held = test.open(0, steps=range(2)).held
    empty = held.rows.take(slice(0))
    noise = flat(test.gradient(empty, 0)) * held.exposure.rate * held.exposure.pool_size
    assert len(noise) > 10_000 and has_scale(noise, 1.5 * 0.2) and abs(float(noise.mean())) < 0.02
    assert not has_scale(noise, 1.5 * 0.2 * 2 / 3) and not has_scale(noise, 1.5 * 0.2 * 3 / 2)
    other = flat(test.gradient(empty, 1)) * 8
    assert abs(float(torch.corrcoef(torch.stack([noise, other]))[0, 1])) < 0.05  # each step its own


@pytest.mark.statistical
def test_a_release_has_the_stated_noise_around_the_clipped_sum(bench, toy_stream):
    """Rows of norm 5 in one direction are clipped to 0.3; the noise is 2 x 3 x 0.3 on each of
    10,000 coordinates.
    """
    stream = toy_stream()
    test = bench(simulated(noise_multiplier=2.0, release_noise=3.0), stream)
    curator = test.open().curator

    def query(forward, batch):
        return torch.zeros(len(batch), 10_000).index_fill(1, torch.tensor([0]), 5.0)

    released = curator.release(query, clip_norm=0.3, purpose="test")["value"]
    noise = released - torch.zeros(10_000).index_fill(0, torch.tensor([0]), 24 * 0.3)
    assert has_scale(noise, 1.8) and abs(float(noise[0])) < 5 * 1.8
    assert not has_scale(noise, 1.8 * 2 / 3) and not has_scale(noise, 1.8 * 3 / 2)
    entry = test.ledger.entries[-1]
    assert (
        entry.noise_multiplier == 6.0
        and entry.clip_norm == 0.3
        and entry.scope == {"experience-0": 1.0}
    )
    assert (entry.purpose, entry.sampling, entry.steps) == ("release:test", "none", 1)


# ------------------------------------------------------------------------- charge first, or nothing


def test_a_step_is_charged_before_its_noise_is_drawn(bench):
    test = bench(simulated())
    held = test.open(0, steps=range(3)).held
    assert test.trace == ["ledger.before-append", "ledger.appended", "ledger.head-written"]
    test.gradient(held.sample(0), 0)
    assert test.trace[3:] == ["noise.drawn"]
    (entry,) = test.ledger.entries
    assert (entry.first_step, entry.steps, entry.scope) == (
        0,
        3,
        {"experience-0": 8 / 24},
    ) and entry.simulated


def test_a_release_is_charged_before_its_noise_is_drawn(bench):
    test = bench(simulated())
    test.open().curator.release(lambda forward, batch: batch.inputs, clip_norm=1.0, purpose="mean")
    assert test.trace == [
        "ledger.before-append",
        "ledger.appended",
        "ledger.head-written",
        "noise.drawn",
    ]


def test_a_step_without_a_charge_is_refused(bench):
    test = bench(simulated())
    held = test.open(0, steps=range(2, 4)).held
    for step in (0, 4):
        with pytest.raises(PrivacyError, match=f"step {step} was not charged.*reserve"):
            held.sample(step)
        with pytest.raises(PrivacyError, match=f"step {step} was not charged"):
            test.gradient(held.rows, step)
    assert "noise.drawn" not in test.trace


def test_a_step_of_the_next_experience_needs_its_own_charge(bench):
    test = bench(simulated())
    test.whole(0, REPLAY, steps=range(2))
    held = test.open(1, REPLAY).held
    with pytest.raises(PrivacyError, match="step 0 was not charged"):
        test.gradient(held.rows, 0)


def test_two_releases_are_two_charges_with_independent_noise(bench):
    test = bench(simulated())
    curator = test.open().curator
    queries = (lambda forward, batch: batch.inputs, lambda forward, batch: 1 - batch.inputs)
    first, second = (
        curator.release(query, clip_norm=10.0, purpose="mean")["value"] for query in queries
    )
    assert [entry.purpose for entry in test.ledger.entries] == ["release:mean"] * 2
    records = test.stream[0].train.inputs
    noise = torch.stack([first - records.sum(0), second - (1 - records).sum(0)])
    assert float((noise[0] - noise[1]).abs().min()) > 0.1
    assert test.trace.count("noise.drawn") == test.trace.count("ledger.head-written") == 2


def test_a_repeated_release_after_restart_is_not_charged_again(bench):
    test = bench(simulated())
    answers = [
        test.open().curator.release(
            lambda forward, batch: batch.inputs, clip_norm=1.0, purpose="mean"
        )["value"]
        for _ in "ab"
    ]
    assert torch.equal(*answers) and len(test.ledger.entries) == 1


def test_changed_records_never_get_the_same_release_noise(bench, toy_stream):
    stream = toy_stream()
    answers = []
    for shift in (0.0, 1e-3):
        moved = replace(stream[0].train, inputs=stream[0].train.inputs + shift)
        test = bench(
            simulated(), replace(stream, experiences=(replace(stream[0], train=moved), stream[1]))
        )
        answers.append(
            test.open().curator.release(lambda f, b: b.inputs, clip_norm=1e-6, purpose="mean")[
                "value"
            ]
        )
    # clipped to nearly nothing: this is noise
    assert float((answers[0] - answers[1]).abs().max()) > 1e-6


def test_a_release_of_an_empty_partition_still_adds_noise(bench, toy_stream):
    stream = declared(toy_stream(), 24, 24)
    nobody = replace(stream[0].train.take(torch.zeros(0, dtype=torch.int64)), declared_size=24)
    test = bench(
        simulated(), replace(stream, experiences=(replace(stream[0], train=nobody), stream[1]))
    )
    held = test.open(0, steps=range(1)).held
    batch = held.sample(0)
    assert len(batch) == 0
    with pytest.raises(
        PrivacyError, match="the rows of step 0 were already drawn; only the training loop"
    ):
        held.sample(0)
    released = test.curator.release(
        lambda f, b: {"x": b.inputs, "n": b.labels.float()}, clip_norm=1.0, purpose="sums"
    )
    assert (
        released["x"].shape == (5,)
        and released["n"].shape == ()
        and bool((released["x"] != 0).all())
    )
    assert float(flat(test.gradient(batch, 0)).abs().min()) > 0
