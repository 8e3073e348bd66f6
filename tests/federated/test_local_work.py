"""Local epochs and local steps of a round, for plain and private clients."""

import json
import math

import pytest

from helpers.federations import SIMULATED, maker, outcome, short
from perdure.data import iid
from perdure.errors import ConfigError, RunError
from perdure.federated import Federation, run_federation
from perdure.strategies import Naive


@pytest.fixture(scope="module")
def streams(stream):
    return iid(short(stream, 1), clients=2, min_size=8, exact=False)


def steps_by_round(stream, streams, federation, **changes):
    """Return the number of optimiser steps of client 1 in every round."""
    counts = []

    def listen(message):
        if message.metadata.message_type == "train" and message.metadata.dst_node_id == 2:
            counts.append(0)

    def count(point, learner):
        if point == "step.done" and learner.client == 1:
            counts[-1] += 1

    make = maker(stream, Naive(), callbacks=[count], **changes)
    server = run_federation(make, streams, federation, listen=listen)
    return counts, server


def test_local_steps_are_done_in_every_round(stream, streams):
    counts, _ = steps_by_round(stream, streams, Federation(clients=2, rounds=3, local_steps=2))
    assert counts == [2, 2, 2]


def test_local_epochs_are_done_in_every_round(stream, streams):
    """The learners ask for 7 iterations an experience, which local epochs replace."""
    federation = Federation(clients=2, rounds=2, local_epochs=2)
    counts, _ = steps_by_round(stream, streams, federation, batch_size=32)
    whole = math.ceil(2 * 2 * streams[1][0].train.declared_size / 32)
    assert sum(counts) == whole
    assert max(counts) - min(counts) <= 1


def test_steps_are_divided_over_rounds_if_none_are_given(stream, streams):
    counts, _ = steps_by_round(stream, streams, Federation(clients=2, rounds=3))
    assert counts == [2, 2, 3]


def test_a_private_plan_reserves_the_local_steps(stream, streams, tmp_path):
    federation = Federation(clients=2, rounds=2, local_steps=3)
    make = maker(stream, Naive(), privacy=SIMULATED)
    run_federation(make, streams, federation, folder=tmp_path)
    lines = (tmp_path / "clients" / "001" / "ledger.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    steps = [e["steps"] for e in entries if e.get("purpose") == "gradient"]
    assert steps == [3, 3]


def test_local_steps_equal_a_learner_that_asks_for_all(stream, streams):
    make = maker(stream, Naive(), iterations=6, privacy=SIMULATED)
    whole = run_federation(make, streams, Federation(clients=2, rounds=3))
    other = maker(stream, Naive(), iterations=1, privacy=SIMULATED)
    local = run_federation(other, streams, Federation(clients=2, rounds=3, local_steps=2))
    assert outcome(whole.learner) == outcome(local.learner)


def test_epochs_and_steps_together_are_refused():
    with pytest.raises(
        ConfigError, match=r"federation\.local_steps = '2, beside local_epochs = 1'"
    ):
        Federation(clients=2, rounds=1, local_steps=2, local_epochs=1)
    with pytest.raises(ConfigError, match=r"federation\.local_epochs = 0"):
        Federation(clients=2, rounds=1, local_epochs=0)


def test_a_run_resumes_only_with_its_local_steps(stream, streams, tmp_path):
    make = maker(stream, Naive())
    run_federation(make, streams, Federation(clients=2, rounds=1, local_steps=1), folder=tmp_path)
    with pytest.raises(RunError, match=r"federation.local_steps \(given 2, stored 1\)"):
        other = Federation(clients=2, rounds=1, local_steps=2)
        run_federation(make, streams, other, folder=tmp_path)
