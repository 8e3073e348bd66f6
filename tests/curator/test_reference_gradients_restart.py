"""Reference gradients of a restarted run: the same noise on the same sums, and new noise on all
other sums.
"""

import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial

import pytest
from safetensors.torch import load_file

from helpers.learners import refused_then_unseen
from helpers.reference_gradients import (
    BOTH,
    PRIVATE,
    Stopped,
    learner_of,
    loss_of,
    opened,
    reserved,
    stopping,
)
from perdure.learner.checkpoint import SUM
from perdure.privacy.noise.key import NoiseKey
from perdure.privacy.private_sum import ChangedSumError
from perdure.strategies import AGEM
from perdure.utils.atomic_files import save_tensors
from perdure.utils.hashing import digest

# --------------------------------------------------------------------------- a restart


@pytest.fixture
def stopped(toy_stream, toy_model, tmp_path):
    """Return a run that was stopped in its second experience, and a function that restarts it with
    a change.
    """
    stream = toy_stream()
    made = partial(learner_of, folder=tmp_path, iterations=6)

    def again(strategy, stream=stream, seen=False, **changes):
        if seen:
            refused_then_unseen(made(toy_model(stream), strategy, **changes), stream)
        learner = made(toy_model(stream), strategy, **changes)
        learner.fit(stream)
        return learner.private_sum.ledger

    def start(strategy, **changes):
        with pytest.raises(Stopped):
            made(toy_model(stream), strategy, callbacks=[stopping(4)], **changes).fit(stream)
        return stream, again

    return start


def sizes(ledger):
    return {
        purpose: sum(e.purpose.split()[0] == purpose for e in ledger.entries)
        for purpose in ("gradient", "reference")
    }


@BOTH
def test_a_restart_repeats_the_same_noise_on_the_same_sums(stopped, meetings, strategy):
    _, again = stopped(strategy)
    drawn = len(meetings.sums)
    ledger = again(strategy)
    assert drawn == 6 + 2 * 4 and len(meetings.sums) == 2 * 6 + 6 and meetings.reused == 0
    assert sizes(ledger) == {"gradient": 2, "reference": 1}
    assert sorted(len(sums) for sums in meetings.sums.values()) == [1] * 10 + [2] * 8


@BOTH
def test_changed_new_records_get_new_noise_after_a_restart(stopped, meetings, strategy):
    stream, again = stopped(strategy)
    moved = replace(stream[1].train, inputs=stream[1].train.inputs.flip(1))
    ledger = again(
        strategy, replace(stream, experiences=(stream[0], replace(stream[1], train=moved)))
    )
    assert meetings.reused == 0 and sizes(ledger) == {"gradient": 3, "reference": 2}


@BOTH
def test_a_changed_memory_gets_new_noise_after_a_restart(stopped, tmp_path, meetings, strategy):
    _, again = stopped(strategy)
    (*_, last) = sorted((tmp_path / "private").glob("*.safetensors"))
    private = load_file(last)
    private["memory.inputs"][0, 0] += 0.25
    save_tensors(last, private, private=True, metadata={SUM: digest(private).hex()})
    ledger = again(strategy)
    assert meetings.reused == 0 and sizes(ledger) == {"gradient": 3, "reference": 2}


@BOTH
@pytest.mark.parametrize("option", [{"batch_size": 3}, {"memory_size": 8}])
def test_a_changed_memory_option_gets_new_noise_after_a_restart(
    stopped, meetings, strategy, option
):
    _, again = stopped(strategy)
    ledger = again(replace(strategy, **option), seen=True)
    assert meetings.reused == 0 and sizes(ledger) == {"gradient": 3, "reference": 2}


@BOTH
def test_a_changed_clip_norm_gets_new_noise_after_a_restart(stopped, tmp_path, meetings, strategy):
    _, again = stopped(strategy)
    shutil.rmtree(tmp_path / "checkpoint")
    ledger = again(strategy, privacy=replace(PRIVATE, clip_norm=0.7))
    assert meetings.reused == 0 and sizes(ledger) == {"gradient": 4, "reference": 2}


@BOTH
def test_a_changed_sampling_rate_gives_references_new_noise(stopped, meetings, strategy):
    """The reference rate is unchanged, but the other gradients differ, and so do the parameters."""
    _, again = stopped(strategy, privacy=replace(PRIVATE, sampling_rate=0.25))
    ledger = again(strategy, privacy=replace(PRIVATE, sampling_rate=0.5), seen=True)
    assert meetings.reused == 0 and sizes(ledger) == {"gradient": 3, "reference": 2}
    beside = [entry.scope for entry in ledger.entries if "reference" in entry.purpose]
    assert beside[0] == beside[1]


@BOTH
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_changed_reference_loss_gives_a_new_ledger_entry(
    four, toy_model, meetings, strategy, scale
):
    """The block and its gradients are the same, so only the entry of the reference differs."""
    learner = opened(learner_of(toy_model(four), strategy), four, 1)
    of = None if strategy.name == "AGEM" else 0
    for loss in (loss_of(learner), loss_of(learner, scale)):
        learner.begin(1)
        reserved(learner).reference(loss, learner.params, of=of)
    assert meetings.reused == 0
    purposes = [entry.purpose.split()[0] for entry in learner.private_sum.ledger.entries]
    assert purposes.count("reference") == (1 if scale == 1.0 else 2)


@pytest.mark.parametrize("blind", [False, True])
def test_the_noise_reuse_check_finds_noise_used_for_two_sums(
    four, toy_model, meetings, monkeypatch, blind
):
    """A gradient is drawn by hand with the start of another one; with equal tags both would get the
    same noise.
    """
    if blind:
        monkeypatch.setattr(NoiseKey, "tag", lambda key, place, exact: "all alike")
    learner = opened(learner_of(toy_model(four), AGEM(memory_size=12)), four, 1)
    for scale in (1.0, 0.01):
        learner.begin(1)
        curator = reserved(learner)
        rows = learner.session.held.rows
        with suppress(ChangedSumError):
            curator.gradient(loss_of(learner, scale), learner.params, rows, 0)
    assert meetings.reused == int(blind)
