"""Noise drawn before it is requested: the same integers, or none."""

import os
import threading

import pytest
import torch

from perdure.privacy.noise.ahead import AHEAD_FROM, DrawAhead
from perdure.privacy.noise.key import NoiseKey

PLACE = {"purpose": "gradient", "entry": "e0", "step": 3, "nonce": "n"}
SCALE = 1.1 * 2**21
N = AHEAD_FROM + 5


def added(key, **changes):
    place = PLACE | changes
    total = torch.arange(place.pop("n", N))
    key.add_noise(total, place.pop("scale", SCALE), **place)
    return total


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"purpose": "reference"},
        {"entry": "e1"},
        {"step": 4},
        {"nonce": "another"},
        {"scale": 2 * SCALE},
        {"n": N - 1},
    ],
)
def test_noise_drawn_ahead_equals_noise_drawn_when_needed(changes):
    """Whatever is requested next equals the answer of a key without a draw ahead."""
    key = NoiseKey.from_seed(0)
    key.draw_ahead(N, SCALE, **PLACE)
    assert torch.equal(added(key, **changes), added(NoiseKey.from_seed(0), **changes))
    assert torch.equal(added(key), added(NoiseKey.from_seed(0)))


def test_noise_drawn_ahead_is_used_once_and_by_name():
    ahead = DrawAhead()
    ahead.begin("a", N, lambda room: room.__iadd__(7))
    assert ahead.take("b") is None
    taken = ahead.take("a")
    assert len(taken) == N and (taken == 7).all()
    assert ahead.take("a") is None


def test_noise_is_drawn_ahead_on_another_thread():
    goes_on = threading.Event()
    ahead = DrawAhead()
    ahead.begin("a", N, lambda room: room.fill(1 + 1 * goes_on.wait(60)))
    goes_on.set()
    assert (ahead.take("a") == 2).all()


def test_noise_that_failed_ahead_is_drawn_again_when_needed():
    ahead = DrawAhead()
    ahead.begin("a", N, lambda room: room.reshape(-1, 0))
    assert ahead.take("a") is None


def test_a_running_draw_is_not_overwritten_by_a_second_draw():
    may_end = threading.Event()
    ahead = DrawAhead()
    ahead.begin("a", N, lambda room: room.fill(1 * may_end.wait(60)))
    ahead.begin("b", N, lambda room: room.fill(2))
    assert ahead.take("b") is None
    may_end.set()
    assert (ahead.take("a") == 1).all()


def test_small_noise_draws_start_no_thread():
    ahead = DrawAhead()
    before = threading.active_count()
    ahead.begin("a", AHEAD_FROM - 1, lambda room: room.fill(1))
    assert threading.active_count() == before and ahead.take("a") is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="without fork there is nothing to test")
def test_a_forked_process_draws_its_own_noise():
    """The child has no copy of the thread, and the array it was writing is incomplete."""
    key = NoiseKey.from_seed(0)
    key.draw_ahead(N, SCALE, **PLACE)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        equal = torch.equal(added(key), added(NoiseKey.from_seed(0)))
        os.write(writing, b"y" if equal else b"n")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reading, 1) == b"y"
